"""Each variant of scripts/trials trains a step with the weights that it is named for."""

import os
from pathlib import Path

import pytest
import torch
from workspace import Run

from nnunetv2_selfreg.features import FeatureTaps

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
        terms = torch.stack([loss._scr(features, final), loss._ifd(features)])
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
