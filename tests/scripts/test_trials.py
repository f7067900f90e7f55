"""Each variant of scripts/trials trains a step with the weights that it is named for."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from workspace import Run

from nnunetv2_selfreg.data.foreground import as_list
from nnunetv2_selfreg.networks.features import FeatureTaps

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "trials"
LAMBDAS = {
    "ScrOnly": (0.015, 0),
    "IfdOnly": (0, 0.015),
    "Tenth": (0.0015, 0.0015),
    "Strong": (0.1, 0.1),
    "PaperIFD": (0.015, 0.015),
    "Warm": (0.015 * 0.0067379, 0.015 * 0.0067379),  # exp(-5) at the start
    "Unit": (0.015, 0.015),
    "AllBlocks": (0.015, 0.015),
    "IntoFinal": (0.015, 0.015),
    "StraightPort": (0.015, 0.015),
}
# After a fifth of the training, which is half of the default ramp: 10 exp(-5 / 4).
HALF_WAY = 2.8650480
CONSISTENCY_WEIGHTS = {
    "Weight0": 0,
    "Weight1": HALF_WAY / 10,
    "Weight10": HALF_WAY,
    "Weight100": HALF_WAY * 10,
    "Weight1000": HALF_WAY * 100,
    "NoRamp": 10,
    "LongRamp": 100 * 0.0407622,  # exp(-5 * 0.8^2)
    "Slow": HALF_WAY * 10,
    "OneView": HALF_WAY,
    "Double": HALF_WAY * 10,
}


COPY_PASTE = {
    "SmallBox": {"box_ratio": 1 / 3},
    "HalfBox": {"box_ratio": 1 / 2},
    "LargeBox": {"box_ratio": 5 / 6},
    "Unlabeled0": {"unlabeled_weight": 0},
    "Unlabeled1": {"unlabeled_weight": 1},
    "Mixture1": {"mixture_weight": 1},
    "NoWarmUp": {"warm_up": 0},
    "LongWarmUp": {"warm_up": 0.4, "ramp_up_length": 0.7},
    "LabeledOnly": {"warm_up": 1},
    "Unmixed": {"warm_up": 1},
    "NoRamp": {"ramp_up_length": 1e-6},
    "NoTeacher": {"ema_decay": 0},
    "OwnLabels": {},
    "Largest": {"largest_component": True},
    "OneView": {},
    "WeakViews": {},
    "MixturesOnly": {"mixture_weight": 1},
}
DEFAULTS = {
    "box_ratio": 2 / 3,
    "unlabeled_weight": 0.5,
    "mixture_weight": 0.5,
    "warm_up": 0.1,
    "ramp_up_length": 0.4,
    "ema_decay": 0.99,
    "largest_component": False,
}

NETWORKS = {
    "AdamW": ("AdamW", 5e-4),
    "UXNetNarrow": ("AdamW", 5e-4),
    "UXNetNarrowSGD": ("SGD", 1e-2),
    "UXNetNarrowSlow": ("AdamW", 1e-4),
    "UXNetNarrowFast": ("AdamW", 2e-3),
    "SelfRegUXNetNarrow": ("AdamW", 5e-4),
    "KMaxUXNetNarrow": ("AdamW", 5e-4),
    "KMaxUXNetNarrowSGD": ("SGD", 1e-2),
    "SwinUNETRNarrow": ("AdamW", 5e-4),
    "SwinUNETRNarrowSGD": ("SGD", 1e-2),
    "SelfRegSwinUNETRNarrow": ("AdamW", 5e-4),
}


@pytest.fixture
def started(data_sets, tmp_path, monkeypatch):
    """A variant of a trainer, built by nnU-Net and ready for its first step."""

    def start(name: str):
        monkeypatch.setenv("nnUNet_results", str(tmp_path))
        monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([os.environ["nnUNet_extTrainer"], str(FOLDER)]))
        trainer = Run(data_sets.name("labels"), "2d", name).build()
        trainer.on_train_start()
        return trainer

    return start


@pytest.mark.parametrize("variant", LAMBDAS)
def test_variant_of_selfreg(variant, started):
    trainer = started(f"nnUNetTrainerSelfReg{variant}")
    trainer.on_train_epoch_start()
    outputs = trainer.train_step(next(trainer.dataloader_train))
    lambdas = LAMBDAS[variant]
    weighted = sum(weight * outputs.get(term, 0) for weight, term in zip(lambdas, ("scr", "ifd"), strict=True))
    assert outputs["loss"] == pytest.approx(outputs["segmentation"] + weighted, rel=1e-5)
    assert weighted > 0
    assert (trainer.loss.ifd_order, trainer.loss.ifd_stop_gradient) == (
        ("index", True) if variant == "PaperIFD" else ("activation", False)
    )


def test_terms_of_unit_features_do_not_depend_on_their_scale(started):
    trainer = started("nnUNetTrainerSelfRegUnit")
    batch = next(trainer.dataloader_train)
    norms = [m for m in trainer.network.modules() if isinstance(m, torch.nn.modules.instancenorm._InstanceNorm)]
    segmentation = trainer.loss.loss

    def terms_and_radial_gradient():
        torch.manual_seed(0)  # of the channels that are compared
        features = trainer.network(batch["data"])
        terms = trainer.loss(features, batch["target"]) - segmentation(features, batch["target"])
        # Scale and shift of the norms scale all features, so the gradient along them is that of the scale.
        parameters = [p for norm in norms for p in (norm.weight, norm.bias)]
        gradients = torch.autograd.grad(terms, parameters)
        radial = sum(float((g * p).detach().sum()) for g, p in zip(gradients, parameters, strict=True))
        return torch.stack([trainer.loss.terms[name] for name in ("scr", "ifd")]), radial

    before, radial = terms_and_radial_gradient()
    assert abs(radial) < 1e-5
    for norm in norms:
        norm.weight.data *= 10
        norm.bias.data *= 10
    torch.testing.assert_close(terms_and_radial_gradient()[0], before, rtol=1e-3, atol=0)


def test_every_convolution_block_is_read(started):
    trainer = started("nnUNetTrainerSelfRegAllBlocks")
    stages = FeatureTaps.blocks(trainer.network)
    convolutions = [[m for stage in part for m in stage.modules() if hasattr(m, "all_modules")] for part in stages]
    assert [len(part) for part in trainer.loss.taps.blocks(trainer.network)] == [len(part) for part in convolutions]
    assert trainer.loss.taps.blocks(trainer.network)[1][-1] is stages[1][-1].convs[-1]


@pytest.mark.parametrize("variant", ["IntoFinal", "StraightPort"])
def test_straight_port_has_the_same_terms_and_stops_the_gradient_of_scr_unless_it_forgets(variant, started):
    features = [torch.randn(2, channels, 4, 4, requires_grad=True) for channels in (6, 2)]
    final = torch.randn(2, 4, 8, 8, requires_grad=True)

    def terms_and_gradient(loss):
        torch.manual_seed(0)  # of the channels that are compared
        terms = torch.stack([loss._scr(features, final, final.shape[2:]), loss._ifd(features)])
        final.grad = None
        terms.sum().backward()
        return terms.detach(), final.grad is not None and final.grad.abs().sum() > 0

    expected, stopped = terms_and_gradient(started("nnUNetTrainerSelfReg").loss)
    terms, flows = terms_and_gradient(started(f"nnUNetTrainerSelfReg{variant}").loss)
    torch.testing.assert_close(terms, expected)
    assert (stopped, flows) == (False, variant == "IntoFinal")


@pytest.mark.parametrize("variant", CONSISTENCY_WEIGHTS)
def test_variant_of_mean_teacher(variant, started):
    trainer = started(f"nnUNetTrainerMeanTeacher{variant}")
    trainer.current_epoch = trainer.num_epochs // 5
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    expected = batch["data_weak"] if variant == "OneView" else batch["data"][-len(batch["data_weak"]) :].clone()
    outputs = trainer.train_step(batch)
    assert outputs["consistency_weight"] == pytest.approx(CONSISTENCY_WEIGHTS[variant], rel=1e-4)
    assert trainer.ema_decay == (0.999 if variant == "Slow" else 0.99)
    labeled = len(batch["data"]) - len(batch["data_weak"])
    assert len(batch["data_weak"]) == labeled * (2 if variant == "Double" else 1)
    assert torch.equal(batch["data"][-len(batch["data_weak"]) :], expected)


@pytest.mark.parametrize("variant", COPY_PASTE)
def test_variant_of_copy_paste(variant, started):
    trainer = started(f"nnUNetTrainerCopyPaste{variant}")
    assert {name: getattr(trainer, name) for name in DEFAULTS} == {**DEFAULTS, **COPY_PASTE[variant]}
    trainer.current_epoch = trainer.num_epochs // 2
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    count = len(batch["data_weak"])
    strong, weak = batch["data"][-count:], batch["data_weak"]
    asked, seen = [], []
    labels, network = trainer.pseudo_labels, trainer.network.forward
    trainer.pseudo_labels = lambda images, target: asked.append(images) or labels(images, target)
    trainer.network.forward = lambda images: seen.append(images) or network(images)
    outputs = trainer.train_step(batch)
    assert outputs["loss"] == pytest.approx(
        outputs["segmentation"]
        + trainer.mixture_weight
        * (outputs["labeled_part"] + outputs["unlabeled_part_weight"] * outputs["unlabeled_part"]),
        rel=1e-4,
    )
    student = seen[-1]
    if trainer.warm_up == 1:
        assert not asked
        made = trainer.student_batch(batch)
        labeled = len(batch["data"]) - count
        index = torch.cat((torch.arange(count), torch.arange(count) + 1)) % labeled
        again = torch.equal(made["data"][-2 * count :], batch["data"][index])
        same_targets = map(torch.equal, made["mixed_target"], [scale[index] for scale in as_list(batch["target"])])
        assert {again, *same_targets} == {variant == "Unmixed"}
        return
    assert torch.equal(asked[0], strong if variant == "OneView" else weak)
    pasted = weak if variant == "WeakViews" else strong
    inward = student[-2 * count : -count]  # the middle of a patch is in every box of two thirds
    middle = tuple(length // 2 for length in student.shape[2:])
    if trainer.box_ratio > 1 / 2:
        assert torch.equal(inward[(..., *middle)], pasted[(..., *middle)])
    assert len(student) == (2 * count if variant == "MixturesOnly" else len(batch["data"]) + count)
    assert (outputs["segmentation"] == 0) == (variant == "MixturesOnly")


def test_labels_of_the_network_itself_or_of_its_average(started):
    labels = {}
    for variant in ("", "OwnLabels"):
        trainer = started(f"nnUNetTrainerCopyPaste{variant}")
        for parameter in trainer.network.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
        for parameter in trainer.teacher.module.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
        batch = labels.setdefault("batch", next(trainer.dataloader_train))
        with torch.no_grad():
            outputs = [
                part(batch["data_weak"])[0].argmax(1, keepdim=True)
                for part in (trainer.teacher.module, trainer.network)
            ]
        labels[variant] = trainer.pseudo_labels(batch["data_weak"], batch["target"])[0]
        assert not torch.equal(*outputs)
        assert torch.equal(labels[variant], outputs[variant == "OwnLabels"].to(labels[variant].dtype))


@pytest.mark.parametrize("variant", NETWORKS)
def test_variant_of_the_networks(variant, started):
    trainer = started(f"nnUNetTrainer{variant}")
    assert (type(trainer.optimizer).__name__, trainer.initial_lr) == NETWORKS[variant]
    full_resolution = next(part for part in reversed(trainer.network.decoder.seg_layers))
    channels = next(full_resolution.parameters()).shape[1]
    assert channels == (12 if "Swin" in variant else 16 if "Narrow" in variant else 4)


def test_stock_with_three_times_the_samples(started):
    trainer = started("nnUNetTrainerTriple")
    loader, stock = trainer.dataloader_train.data_loader, started("nnUNetTrainer").dataloader_train.data_loader
    assert len(next(loader)["data"]) == 3 * trainer.configuration_manager.batch_size
    shares = [np.mean([each.get_do_oversample(n) for n in range(each.batch_size)]) for each in (loader, stock)]
    assert 0 < shares[0] == shares[1]
