"""Families composed with other networks, and with other trainers of nnU-Net's."""

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainerCosAnneal import nnUNetTrainerCosAnneal
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam
from workspace import Run, initialised, start, weights, whole_and_resumed

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.training.backbones import KMaxUXNetBackbone
from nnunetv2_selfreg.training.dual_task import DualTask, DualTaskMutual

LENGTH = "_2epochs_2iters"
KMAX_TERMS = {"query_segmentation", "convolutional", "query_distribution"}
COMBINATIONS = {
    "nnUNetTrainerTinyKMaxMeanTeacher": {"segmentation", "consistency", *KMAX_TERMS},
    "nnUNetTrainerTinyKMaxUAMeanTeacher": {"segmentation", "consistency", "kept_voxels", *KMAX_TERMS},
    "nnUNetTrainerTinyKMaxCopyPaste": {"segmentation", "labeled_part", "unlabeled_part", *KMAX_TERMS},
    "nnUNetTrainerTinyKMaxDualTask": {"segmentation", "distance", "consistency", *KMAX_TERMS},
    "nnUNetTrainerTinyKMaxSelfRegMeanTeacher": {"segmentation", "scr", "ifd", "consistency", *KMAX_TERMS},
    "nnUNetTrainerTinySwinDualTask": {"segmentation", "distance", "consistency"},
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))


@pytest.fixture
def run(data_sets, results):
    return Run(data_sets.name("ignore"), "2d", "nnUNetTrainer")


CHOSEN = ("nnUNetTrainerTinyKMaxMeanTeacher",)  # the others run in the matrix


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHOSEN else pytest.mark.matrix) for name in COMBINATIONS]
)
def test_family_trains_and_resumes_on_another_network(name, data_sets, results, tmp_path, monkeypatch):
    run = Run(data_sets.name("ignore"), "2d", name + LENGTH)
    whole, second = whole_and_resumed(run, tmp_path, monkeypatch)
    torch.testing.assert_close(weights(second.network), weights(whole.network), rtol=0, atol=0)
    curves = whole.logger.local_logger.my_fantastic_logging
    for term in COMBINATIONS[name]:
        assert np.isfinite(curves[term]).all(), term
        assert len(curves[term]) == 2, term


def test_inner_losses_terms_are_of_the_labelled_samples(data_sets, results):
    """The log of a composed trainer has the k-means loss of labelled samples, not that of copy-paste's mixtures."""
    trainer = start(Run(data_sets.name("labels"), "2d", "nnUNetTrainerTinyKMaxCopyPaste" + LENGTH).build())
    batch = next(trainer.dataloader_train)
    split = Batch.split(batch)
    outputs, network = [], trainer.network
    trainer.network = lambda images: outputs.append(network(images)) or outputs[-1]
    trainer.weighted_terms(split)
    labeled, _ = split.cut(outputs[0])
    expected = float(trainer.segmentation_loss.loss.loss(labeled.segmentation, split.target[0]))
    assert float(trainer.terms["query_segmentation"]) == pytest.approx(expected, rel=1e-5)


def test_copy_pastes_parts_have_all_losses_of_the_k_means_network(data_sets, results):
    """With everything in one part, its loss is that of both halves of the mixtures, queries' assignment included."""
    trainer = start(Run(data_sets.name("labels"), "2d", "nnUNetTrainerTinyKMaxCopyPaste" + LENGTH).build())
    mixtures = trainer.mixtures(Batch.split(next(trainer.dataloader_train)))
    output = trainer.network(mixtures.images)
    nothing = torch.zeros_like(mixtures.other)
    _, found = trainer.mixture_terms(output, mixtures._replace(other=nothing))["labeled_part"]
    half = len(nothing) // 2
    halves = (Batch(nothing[:half], nothing[half:], nothing[half:], []).cut(part) for part in (output, mixtures.target))
    expected = sum(trainer.segmentation_loss(*pair) for pair in zip(*halves, strict=True))
    torch.testing.assert_close(found, expected)


def test_segmentation_loss_is_the_one_that_selfreg_wraps(data_sets, results):
    trainer = Run(data_sets.name("labels"), "2d", "nnUNetTrainerSelfRegMeanTeacher" + LENGTH).build()
    trainer.initialize()
    assert type(trainer.loss).__name__ == "SelfRegularizedLoss"
    assert trainer.segmentation_loss is trainer.loss.loss


def test_second_network_that_would_not_learn_is_named(run):
    class Mutual(DualTaskMutual, KMaxUXNetBackbone, nnUNetTrainer):
        width, deepest, queries = 4, 16, 24

    with pytest.raises(NotImplementedError, match="second network without deep supervision, with which alone KMaxUXN"):
        initialised(Mutual, run)


@pytest.mark.parametrize("base", [nnUNetTrainerAdam, nnUNetTrainerCosAnneal])
def test_partner_has_the_optimiser_of_whatever_trainer_it_is(base, run):
    class Composed(DualTask, base):
        pass

    trainer = initialised(Composed, run)
    partner = trainer.distance_partner
    assert type(partner.optimizer) is type(trainer.optimizer)
    assert type(partner.schedule) is type(trainer.lr_scheduler)
    held = [p for group in partner.optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in partner.module.parameters()]


@pytest.mark.parametrize("family", [DualTask, DualTaskMutual])
def test_partner_without_an_optimiser_of_its_own_is_refused(family, run):
    """A second call of its configure_optimizers returns the network's own optimiser."""

    class Composed(family, nnUNetTrainer_warmup):
        pass

    with pytest.raises(NotImplementedError, match=r"Composed trains a second module.*no optimiser of that module's"):
        initialised(Composed, run)
