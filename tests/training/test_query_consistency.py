"""Dual KMax UX-Net: what the terms are, what sees which view, what is saved, and what is refused."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from small_trainers.nnUNetTrainerTinyBackbones import nnUNetTrainerTinyDualKMaxUXNet, nnUNetTrainerTinyDualKMaxUXNetTwo
from workspace import Run, initialised, start, weights, whole_and_resumed

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.errors import SettingError, UnsupportedError
from nnunetv2_selfreg.losses.agreement import contrastive_agreement
from nnunetv2_selfreg.training.query_consistency import QueryConsistency
from nnunetv2_selfreg.training.selfreg import SelfRegularized

SHARED, TWO = "nnUNetTrainerTinyDualKMaxUXNet", "nnUNetTrainerTinyDualKMaxUXNetTwo"
LENGTH = "_2epochs_2iters"


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))


def build(data_sets, name: str = SHARED, **attributes):
    trainer = Run(data_sets.name("ignore"), "2d", name + LENGTH).build()
    for attribute, value in attributes.items():
        setattr(trainer, attribute, value)
    return trainer


def loss_of_view(trainer, network, images, target) -> float:
    """The supervised loss of labelled images alone: no norm looks beyond its sample."""
    with torch.no_grad():
        return float(trainer.segmentation_loss(copy.deepcopy(network)(images), target))


@pytest.mark.parametrize("form", ["contrastive", "squared"])
@pytest.mark.parametrize("name", [SHARED, TWO])
def test_terms_are_recomputed_from_each_views_own_pass(name, form, data_sets, results):
    weight = {"segmentation_consistency_weight": 0.7, "query_consistency_weight": 0.3}
    trainer = start(build(data_sets, name, consistency=form, **weight))
    trainer.current_epoch = 1
    batch = Batch.split(next(trainer.dataloader_train))
    strong_network = trainer.network if name == SHARED else trainer.strong_partner.module
    strong_images = torch.cat((batch.labeled, batch.strong))
    weak_images = torch.cat((batch.further["labeled_weak"], batch.weak))
    with torch.no_grad():
        strong, weak = (
            copy.deepcopy(network)(images)
            for network, images in ((strong_network, strong_images), (trainer.network, weak_images))
        )
    pairs = {
        "segmentation_consistency": (strong.segmentation, weak.segmentation),
        "query_consistency": (strong.log_assignments[-1].exp(), weak.log_assignments[-1].exp()),
    }
    count = len(batch.labeled)
    expected = {
        "segmentation": loss_of_view(trainer, trainer.network, weak_images[:count], batch.target),
        "strong_segmentation": loss_of_view(trainer, strong_network, strong_images[:count], batch.target),
    }
    for term, (a, b) in pairs.items():
        if form == "contrastive":
            expected[term] = float(contrastive_agreement(a, b, 0.5))
        else:
            if term == "segmentation_consistency":
                a, b = torch.softmax(a, 1), torch.softmax(b, 1)
            expected[term] = float(((a - b) ** 2).mean())
    found = trainer.weighted_terms(batch)
    assert {term: float(value.detach()) for term, (_, value) in found.items()} == pytest.approx(expected, rel=1e-4)
    assert {term: weight for term, (weight, _) in found.items()} == pytest.approx(
        {
            "segmentation": 1,
            "strong_segmentation": 1,
            "segmentation_consistency": 0.7,  # the second of two epochs is beyond the ramp
            "query_consistency": 0.3,
        }
    )


@pytest.mark.parametrize("form", ["contrastive", "squared"])
def test_consistencies_see_unlabelled_samples_and_the_supervision_does_not(form, data_sets, results):
    trainer = start(build(data_sets, consistency=form))
    batch = Batch.split(next(trainer.dataloader_train))

    def terms(of: Batch) -> dict[str, float]:
        return {name: float(term.detach()) for name, (_, term) in trainer.weighted_terms(of).items()}

    before, after = terms(batch), terms(replace(batch, strong=batch.strong.flip(-1)))
    changed = {name for name in before if before[name] != pytest.approx(after[name], rel=1e-6)}
    assert changed == {"segmentation_consistency", "query_consistency"}


def test_weak_view_of_a_labelled_sample_lies_where_its_target_does(data_sets, results):
    """Labels tell the weak view's intensities apart, as they do those of the patch that nnU-Net augments."""
    trainer = start(build(data_sets))
    batches = [Batch.split(next(trainer.dataloader_train)) for _ in range(8)]
    weak = torch.cat([batch.further["labeled_weak"] for batch in batches])
    strong = torch.cat([batch.labeled for batch in batches])
    target = torch.cat([batch.target[0] for batch in batches])
    assert weak.shape == strong.shape
    assert not torch.equal(weak, strong)
    inside, outside = weak[(target == 1) | (target == 2)], weak[target == 0]
    assert inside.mean() - outside.mean() > outside.std()
    misplaced = target.flip(-1)
    assert weak[misplaced == 0].mean() > outside.mean()


@pytest.mark.parametrize("name", [SHARED, pytest.param(TWO, marks=pytest.mark.matrix)])
def test_resumed_training_equals_one_without_interruption(name, data_sets, results, tmp_path, monkeypatch):
    run = Run(data_sets.name("ignore"), "2d", name + LENGTH)
    whole, second = whole_and_resumed(run, tmp_path, monkeypatch)
    torch.testing.assert_close(weights(second.network), weights(whole.network), rtol=0, atol=0)
    if name == TWO:
        mine, others = (weights(trainer.strong_partner.module) for trainer in (whole, second))
        torch.testing.assert_close(mine, others, rtol=0, atol=0)


def test_two_networks_learn_and_the_one_of_the_weak_views_serves(data_sets, results):
    trainer = start(build(data_sets, TWO))
    before = [[p.clone() for p in weights(module)] for module in (trainer.network, trainer.strong_partner.module)]
    assert not all(torch.equal(a, b) for a, b in zip(*before, strict=True))
    trainer.train_step(next(trainer.dataloader_train))
    for old, module in zip(before, (trainer.network, trainer.strong_partner.module), strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(old, weights(module), strict=True))
    batch = Batch.split(next(trainer.dataloader_train))
    seen = {}
    for name, module in (("weak", trainer.network), ("strong", trainer.strong_partner.module)):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    trainer.weighted_terms(batch)
    assert torch.equal(seen["strong"], batch.images)
    assert torch.equal(seen["weak"], torch.cat((batch.further["labeled_weak"], batch.weak)))


@pytest.mark.parametrize(
    ("attribute", "term"),
    [
        ("segmentation_consistency_weight", "segmentation_consistency"),
        ("query_consistency_weight", "query_consistency"),
    ],
)
def test_consistency_without_a_weight_is_left_out(attribute, term, data_sets, results):
    trainer = start(build(data_sets, **{attribute: 0}))
    outputs = trainer.train_step(next(trainer.dataloader_train))
    assert {"segmentation_consistency", "query_consistency"} - set(outputs) == {term}
    assert outputs["consistency_ramp"] == pytest.approx(np.exp(-5))


def test_labels_alone_suffice(data_sets, results):
    trainer = start(build(data_sets, unlabeled_batch_size=0))
    batch = next(trainer.dataloader_train)
    assert "data_weak" not in batch
    assert np.isfinite(trainer.train_step(batch)["query_consistency"])


def test_single_sample_a_step_is_compared_by_squares_and_the_log_says_so(data_sets, results):
    trainer = build(data_sets, unlabeled_batch_size=0)
    trainer.configuration_manager.configuration["batch_size"] = 1
    start(trainer)
    assert "One sample a step" in Path(trainer.log_file).read_text()
    outputs = trainer.train_step(next(trainer.dataloader_train))
    assert 0 < outputs["segmentation_consistency"] < 1
    unlabeled = build(data_sets)
    unlabeled.configuration_manager.configuration["batch_size"] = 1
    start(unlabeled)
    assert unlabeled.consistency == "contrastive"  # a labelled and an unlabelled one


def test_selfreg_regularises_the_network_of_the_weak_views(data_sets, results):
    class Trainer(SelfRegularized, nnUNetTrainerTinyDualKMaxUXNetTwo):
        pass

    trainer = start(initialised(Trainer, Run(data_sets.name("ignore"), "2d", "nnUNetTrainer")))
    outputs = trainer.train_step(next(trainer.dataloader_train))
    supervised = outputs["segmentation"] + outputs["strong_segmentation"]
    consistency = (
        0.1 * outputs["consistency_ramp"] * (outputs["segmentation_consistency"] + outputs["query_consistency"])
    )
    regularised = supervised + 0.015 * (outputs["scr"] + outputs["ifd"]) + consistency
    assert outputs["loss"] == pytest.approx(regularised, rel=1e-4)


def test_other_networks_are_refused(data_sets, results):
    class OnUNet(QueryConsistency, nnUNetTrainer):
        pass

    with pytest.raises(UnsupportedError, match=r"OnUNet trains a network that segments by queries.*KMaxUXNetBackbone"):
        initialised(OnUNet, Run(data_sets.name("ignore"), "2d", "nnUNetTrainer"))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("consistency", "cosine"),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("segmentation_consistency_weight", -1.0),
        ("query_consistency_weight", float("nan")),
    ],
)
def test_impossible_settings(attribute, value, data_sets, results):
    with pytest.raises(SettingError, match=f"{SHARED}{LENGTH}.{attribute} is {value}, it must be"):
        build(data_sets, **{attribute: value}).initialize()


@pytest.mark.parametrize("steps", [2, pytest.param(200, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("form", ["contrastive", "squared"])
def test_steps_in_half_precision_stay_finite(form, steps, data_sets, results):
    """As on a GPU: the loss scaled, half precision where torch allows it."""

    def with_small_patches(configurations):
        configurations["2d"]["patch_size"] = [16, 16]

    run = Run(data_sets.name("ignore"), "2d", "nnUNetTrainer")
    attributes = {"consistency": form, "ramp_up_length": 1e-6}
    trainer = start(initialised(nnUNetTrainerTinyDualKMaxUXNet, run, with_small_patches, **attributes))
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    loss_of = trainer.loss_of

    def in_half_precision(batch):
        with torch.autocast("cpu", dtype=torch.float16):
            return loss_of(batch)

    trainer.loss_of = in_half_precision
    batch = next(trainer.dataloader_train)
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(steps)]
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())
    assert trainer.grad_scaler.get_scale() >= 2**6
    assert steps < 100 or losses[-1] < losses[0]


def test_activation_checkpointing_changes_no_term(data_sets, results):
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        trainer = build(data_sets)
        type(trainer).activation_checkpointing = on  # the class builds the network
        try:
            start(trainer)
        finally:
            del type(trainer).activation_checkpointing
        assert ("forward" in vars(trainer.network.decoder.mask_decoder)) == on
        torch.manual_seed(1)
        images = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
        target = [torch.zeros(2, 1, *output.shape[2:]) for output in trainer.network(images).convolutional]
        batch = Batch(images, images + 1, images + 2, target, {"labeled_weak": images + 3})
        loss = trainer.terms.total(trainer.weighted_terms(batch))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in trainer.network.parameters())])
    torch.testing.assert_close(*found)
