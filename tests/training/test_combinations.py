"""Families composed with other networks, and with other trainers of nnU-Net's."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants import lr_schedule, optimizer
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup
from workspace import Run, initialised, start, weights, whole_and_resumed

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.errors import UnsupportedError
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


def stock_variants() -> list[type[nnUNetTrainer]]:
    """All of nnU-Net's trainers that are about the optimiser or its schedule."""
    folders = (lr_schedule, optimizer)
    modules = [
        import_module(f"{folder.__name__}.{module.name}")
        for folder in folders
        for module in iter_modules(folder.__path__)
    ]
    own = [vars(module).values() for module in modules]
    found = {cls for values in own for cls in values if isinstance(cls, type) and issubclass(cls, nnUNetTrainer)}
    return sorted(found - {nnUNetTrainer}, key=lambda cls: cls.__name__)


def test_all_stock_variants_are_looked_at():
    assert {"nnUNetTrainerAdam3en4", "nnUNetTrainerCosAnneal", "nnUNetTrainer_warmup"} < {
        cls.__name__ for cls in stock_variants()
    }


@pytest.mark.parametrize("family", [DualTask, DualTaskMutual])
@pytest.mark.parametrize("base", stock_variants())
def test_partner_has_the_optimiser_of_whatever_trainer_it_is(base, family, run):
    """Or training is refused before it starts."""
    if "Adan" in base.__name__ and find_spec("adan_pytorch") is None:
        pytest.skip("nnU-Net needs adan_pytorch for it")

    class Composed(family, base):
        pass

    if base is nnUNetTrainer_warmup:
        with pytest.raises(UnsupportedError, match="no optimiser of that module's parameters"):
            initialised(Composed, run)
        return
    trainer = initialised(Composed, run)
    partner = trainer.distance_partner
    assert type(partner.optimizer) is type(trainer.optimizer)
    assert type(partner.schedule) is type(trainer.lr_scheduler)
    for module, optimizer_ in trainer.trained_modules():
        held = [p for group in optimizer_.param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in module.parameters()]


@pytest.mark.parametrize("family", [DualTask, DualTaskMutual])
def test_partner_without_an_optimiser_of_its_own_is_refused(family, run):
    """A second call of its configure_optimizers returns the network's own optimiser."""

    class Composed(family, nnUNetTrainer_warmup):
        pass

    with pytest.raises(NotImplementedError, match=r"Composed trains a second module.*no optimiser of that module's"):
        initialised(Composed, run)
