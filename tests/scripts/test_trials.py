"""Each trial is its base with what the table says, and trains a step with the weights that it is named for."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from trials import variants
from trials.variants import TRIALS
from workspace import Run

from nnunetv2_selfreg.data.batch import Batch
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


COPY_PASTE = [name for name in TRIALS if name.startswith("nnUNetTrainerCopyPaste")]
NETWORKS = {
    "AdamW": ("AdamW", 5e-4),
    "UXNetNarrow": ("AdamW", 5e-4),
    "UXNetNarrowSGD": ("SGD", 1e-2),
    "UXNetNarrowSlow": ("AdamW", 1e-4),
    "UXNetNarrowFast": ("AdamW", 2e-3),
    "SelfRegUXNetNarrow": ("AdamW", 5e-4),
    "KMaxUXNetNarrow": ("AdamW", 5e-4),
    "KMaxUXNetSlimFast": ("AdamW", 2e-3),
    "KMaxUXNetNarrowSGD": ("SGD", 1e-2),
    "SwinUNETRNarrow": ("AdamW", 5e-4),
    "SwinUNETRNarrowSGD": ("SGD", 1e-2),
    "SelfRegSwinUNETRNarrow": ("AdamW", 5e-4),
}


@pytest.fixture(autouse=True)
def trials_are_searched(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([os.environ["nnUNet_extTrainer"], str(FOLDER)]))


@pytest.fixture
def started(data_sets, tmp_path, monkeypatch):
    """A trainer, built by nnU-Net and ready for its first step."""

    def start(name: str):
        monkeypatch.setenv("nnUNet_results", str(tmp_path))
        trainer = Run(data_sets.name("labels"), "2d", name).build()
        trainer.on_train_start()
        return trainer

    return start


@pytest.mark.parametrize("name", TRIALS)
def test_trial_differs_from_its_base_in_what_the_table_says_and_in_nothing_else(name):
    trial, trainer = TRIALS[name], getattr(variants, name)
    *mixins, base = trainer.__bases__
    assert (trainer.__name__, base.__name__, (*mixins,)) == (name, trial.base, trial.mixins)
    assert {key: value for key, value in vars(trainer).items() if not key.startswith("__")} == trial.attributes
    before = {key: getattr(base, key) for key in trial.attributes}  # so none is misspelt
    assert all(before[key] != value for key, value in trial.attributes.items())
    assert trial.attributes or trial.mixins
    assert recursive_find_trainer_class_by_name(name).__name__ == name


def test_titles_tell_trials_apart():
    assert len({trial.title for trial in TRIALS.values()}) == len(TRIALS)


def test_trial_takes_a_training_length(started):
    trainer = started("nnUNetTrainerMeanTeacherNoRamp_25epochs_200iters")  # a trial of a trial
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (25, 200)
    assert (trainer.consistency_weight, trainer.ramp_up_length) == (10, 1e-9)


def test_name_that_the_table_has_not_is_no_trial():
    with pytest.raises(AttributeError, match="nnUNetTrainerCopyPasteNoBox is not in the table of trials"):
        variants.nnUNetTrainerCopyPasteNoBox  # noqa: B018
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer nnUNetTrainerCopyPasteNoBox"):
        recursive_find_trainer_class_by_name("nnUNetTrainerCopyPasteNoBox")


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
        trainer.terms.clear()
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
    seen, network = [], trainer.network.forward
    trainer.network.forward = lambda images: seen.append(images) or network(images)
    outputs = trainer.train_step(batch)
    assert outputs["consistency_weight"] == pytest.approx(CONSISTENCY_WEIGHTS[variant], rel=1e-4)
    assert trainer.ema_decay == (0.999 if variant == "Slow" else 0.99)
    labeled = len(batch["data"]) - len(batch["data_weak"])
    assert len(batch["data_weak"]) == labeled * (2 if variant == "Double" else 1)
    unlabeled = batch["data_weak"] if variant == "OneView" else batch["data"][labeled:]
    assert torch.equal(seen[0], torch.cat((batch["data"][:labeled], unlabeled)))


@pytest.mark.parametrize("name", COPY_PASTE)
def test_variant_of_copy_paste(name, started):
    variant, trainer = name.removeprefix("nnUNetTrainerCopyPaste"), started(name)
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
        outputs.get("segmentation", 0)
        + trainer.mixture_weight
        * (outputs["labeled_part"] + outputs["unlabeled_part_weight"] * outputs["unlabeled_part"]),
        rel=1e-4,
    )
    (student,) = seen
    assert len(student) == (2 * count if variant == "MixturesOnly" else len(batch["data"]) + count)
    assert ("segmentation" in outputs) == (variant != "MixturesOnly")
    if trainer.mixture_warm_up == 1:
        assert not asked
        return
    assert torch.equal(asked[0], strong if variant == "OneView" else weak)
    inward = student[-2 * count : -count]  # the middle of a patch is in every box of two thirds
    middle = tuple(length // 2 for length in student.shape[2:])
    if trainer.box_ratio > 1 / 2:
        assert torch.equal(inward[(..., *middle)], strong[(..., *middle)])


@pytest.mark.parametrize("variant", ["LabeledOnly", "Unmixed"])
def test_labelled_samples_are_mixed_or_repeated(variant, started):
    trainer = started(f"nnUNetTrainerCopyPaste{variant}")
    batch = Batch.split(next(trainer.dataloader_train))
    index = torch.cat((torch.arange(len(batch.strong)), torch.arange(len(batch.strong)) + 1)) % len(batch.labeled)
    made = trainer.mixtures(batch)
    again = map(torch.equal, [made.images, *made.target], [each[index] for each in (batch.labeled, *batch.target)])
    assert {*again} == {variant == "Unmixed"}


@pytest.mark.parametrize("variant", NETWORKS)
def test_variant_of_the_networks(variant, started):
    trainer = started(f"nnUNetTrainer{variant}")
    assert (type(trainer.optimizer).__name__, trainer.initial_lr) == NETWORKS[variant]
    full_resolution = next(part for part in reversed(trainer.network.decoder.seg_layers))
    channels = next(full_resolution.parameters()).shape[1]
    assert channels == (12 if "Swin" in variant else 16 if "Narrow" in variant or "Slim" in variant else 4)


@pytest.mark.parametrize(
    ("variant", "scale", "weight", "activation"),
    [
        ("", 0.1, 0, torch.nn.GELU),
        ("Scale1", 1, 0, torch.nn.GELU),
        ("LiveBranches", 0.1, 1, torch.nn.GELU),
        ("NoActivation", 0.1, 0, torch.nn.Identity),
    ],
)
def test_variants_of_the_k_means_layer(variant, scale, weight, activation, started):
    decoder = started(f"nnUNetTrainerKMaxUXNetSlim{variant}").network.decoder.mask_decoder
    assert float(decoder.masks.scale) == pytest.approx(scale)
    for layer in decoder.layers:
        assert float(layer.masks.scale) == pytest.approx(scale)
        assert all((b[-1].weight == weight).all() for b in (layer.update, layer.attention, layer.feed_forward))
        assert type(layer.activation) is activation
        assert layer.value.weight.shape[0] == 64


def test_stock_with_three_times_the_samples(started):
    trainer = started("nnUNetTrainerTriple")
    loader, stock = trainer.dataloader_train.data_loader, started("nnUNetTrainer").dataloader_train.data_loader
    assert len(next(loader)["data"]) == 3 * trainer.configuration_manager.batch_size
    shares = [np.mean([each.get_do_oversample(n) for n in range(each.batch_size)]) for each in (loader, stock)]
    assert 0 < shares[0] == shares[1]
