"""Copy-paste: what is mixed, what its loss is, what the teacher labels, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from workspace import Run, start, weights, whole_and_resumed

from nnunetv2_selfreg.losses.copy_paste import at_size

NAME = "nnUNetTrainerCopyPaste_4epochs_2iters"
VARIANTS = ("labels", "regions", "ignore", "regions_ignore")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))


@pytest.fixture
def run(data_sets, results):
    return Run(data_sets.name("ignore"), "3d_fullres", NAME)


def after_warm_up(trainer):
    trainer = start(trainer)
    trainer.current_epoch = 1
    return trainer


def mixed(trainer) -> tuple[dict, dict]:
    """A batch of the loaders, and what the student gets of it."""
    batch = next(trainer.dataloader_train)
    return batch, trainer.student_batch(batch)


def test_student_gets_the_labelled_samples_and_both_mixtures_of_strong_views(run):
    trainer = after_warm_up(run.build())
    batch, student = mixed(trainer)
    labeled, strong = batch["data"][:2], batch["data"][2:]
    assert len(student["data"]) == 6
    assert torch.equal(student["data"][:2], labeled)
    inward, outward = student["labeled_part"].chunk(2)
    assert torch.equal(inward, ~outward)
    assert torch.equal(student["data"][2:4], torch.where(inward, labeled, strong))
    assert torch.equal(student["data"][4:], torch.where(inward, strong, labeled.flip(0)))
    sides = [int(2 / 3 * length) for length in labeled.shape[2:]]
    assert ((~inward).sum((1, 2, 3, 4)) == np.prod(sides)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_labels_the_weak_views(variant, run, data_sets):
    """Recomputed from a copy of the teacher; labelled voxels keep their label, ignored ones included."""
    trainer = after_warm_up(Run(data_sets.name(variant), "3d_fullres", NAME).build())
    trainer.train_step(next(trainer.dataloader_train))
    trainer.train_step(next(trainer.dataloader_train))  # student and teacher differ from here on
    teacher = copy.deepcopy(trainer.teacher.module)
    batch, student = mixed(trainer)
    with torch.no_grad():
        logits = teacher(batch["data_weak"])[0]
    regions = trainer.label_manager.has_regions
    pseudo = logits > 0 if regions else logits.argmax(1, keepdim=True)
    if variant == "regions_ignore":
        pseudo = torch.cat((pseudo, torch.zeros_like(pseudo[:, :1])), 1)
    assert pseudo.float().std() > 0
    target, part = batch["target"][0], student["labeled_part"][:2]
    assert student["mixed_target"][0].dtype == target.dtype
    expected = torch.cat([torch.where(part, target, pseudo), torch.where(part, pseudo, target.flip(0))])
    torch.testing.assert_close(student["mixed_target"][0], expected.to(target.dtype), rtol=0, atol=0)
    assert [scale.shape[2:] for scale in student["mixed_target"]] == [scale.shape[2:] for scale in batch["target"]]


def test_mixtures_are_of_labelled_samples_until_the_warm_up_ends(run):
    trainer = start(run.build())
    trainer.warm_up = 0.25  # one epoch of four
    trainer.teacher_probabilities = None  # not asked
    batch, student = mixed(trainer)
    labeled, part = batch["data"][:2], student["labeled_part"][:2]
    expected = [torch.where(part, labeled, labeled.flip(0)), torch.where(part, labeled.flip(0), labeled.flip(0))]
    assert torch.equal(student["data"][2:], torch.cat(expected))
    output = trainer.network(student["data"])
    trainer.semi_supervised_loss(output, student["target"], student)
    assert trainer.loss_terms()["unlabeled_weight"] == 1
    del trainer.teacher_probabilities
    trainer.current_epoch = 1
    assert not torch.equal(mixed(trainer)[1]["data"][2:4], torch.cat(expected)[:2])
    trainer.train_step(next(trainer.dataloader_train))
    ramp = np.exp(-5 * (1 - 0.25 / 0.4) ** 2)
    assert float(trainer.loss_terms()["unlabeled_weight"]) == pytest.approx(0.5 * ramp, rel=1e-5)


def cropped(values: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The box in which `part` `(1, 1, *spatial)` is True."""
    where = part[0, 0].nonzero()
    first, last = where.amin(0), where.amax(0)
    return values[(..., *(slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True)))]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_a_box_is_nnunets_loss_of_the_cropped_box(variant, configuration, data_sets, results):
    trainer = after_warm_up(Run(data_sets.name(variant), configuration, NAME).build())
    batch, student = mixed(trainer)
    box = ~student["labeled_part"][:1]  # the same for all samples, so that they can be cropped
    count = len(student["labeled_part"])
    with torch.no_grad():
        output = [3 * torch.randn_like(scale) for scale in trainer.network(student["data"])]
    mixtures, target = [scale[-count:] for scale in output], student["mixed_target"]
    parts = [at_size(box, scale.shape[2:]) for scale in target]
    pairs = [
        [cropped(values, part) for values, part in zip(scales, parts, strict=True)] for scales in (mixtures, target)
    ]
    expected = nnUNetTrainer._build_loss(trainer)(*pairs)
    student["labeled_part"] = box.expand(count, -1, *box.shape[2:])
    trainer.semi_supervised_loss(output, batch["target"], student)
    torch.testing.assert_close(trainer.loss_terms()["labeled_part"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_everything_is_nnunets_loss(variant, data_sets, results):
    trainer = after_warm_up(Run(data_sets.name(variant), "3d_fullres", NAME).build())
    batch, student = mixed(trainer)
    output = trainer.network(student["data"])
    student["labeled_part"] = torch.ones_like(student["labeled_part"])
    loss = trainer.semi_supervised_loss(output, batch["target"], student)
    mixtures = [scale[2:] for scale in output]
    expected = nnUNetTrainer._build_loss(trainer)(mixtures, student["mixed_target"])
    torch.testing.assert_close(trainer.loss_terms()["labeled_part"], expected.detach())
    assert torch.isfinite(loss)  # though nothing is unlabelled


@pytest.mark.parametrize("variant", ["ignore", "regions_ignore"])
def test_ignored_voxels_stay_ignored(variant, data_sets, results):
    trainer = after_warm_up(Run(data_sets.name(variant), "3d_fullres", NAME).build())
    batch, student = mixed(trainer)
    output = [scale.detach().requires_grad_() for scale in trainer.network(student["data"])]
    trainer.semi_supervised_loss(output, batch["target"], student).backward()
    for scale, target in zip(output[:-1], student["mixed_target"], strict=False):  # nnU-Net gives the last no weight
        ignored = target[:, -1:] == (3 if variant == "ignore" else 1)
        gradient = scale.grad[-len(target) :].abs().sum(1, keepdim=True)
        if scale is output[0]:
            assert ignored.any()
            assert gradient[~ignored].min() > 0
        assert (gradient[ignored] == 0).all()


def test_loss_is_the_sum_of_its_parts(run):
    trainer = after_warm_up(run.build())
    trainer.mixture_weight, trainer.unlabeled_weight = 0.7, 3.0
    outputs = trainer.train_step(next(trainer.dataloader_train))
    weight = 3 * np.exp(-5 * (1 - 0.25 / 0.4) ** 2)
    mixtures = outputs["labeled_part"] + weight * outputs["unlabeled_part"]
    assert outputs["loss"] == pytest.approx(outputs["segmentation"] + 0.7 * mixtures, rel=1e-5)


@pytest.mark.parametrize("name", ["unlabeled_weight", "mixture_weight"])
def test_weight_0_leaves_the_labelled_part(name, run):
    """In value and in gradient: of the mixtures' labelled voxels, and with `mixture_weight` of none of them."""
    trainer = after_warm_up(run.build())
    setattr(trainer, name, 0.0)
    batch, student = mixed(trainer)
    output = [scale.detach().requires_grad_() for scale in trainer.network(student["data"])]
    loss = trainer.semi_supervised_loss(output, batch["target"], student)
    loss.backward()
    terms = trainer.loss_terms()
    stock = nnUNetTrainer._build_loss(trainer)([scale.detach()[:2] for scale in output], batch["target"])
    torch.testing.assert_close(terms["segmentation"], stock)
    labeled = trainer.mixture_weight * terms["labeled_part"]
    torch.testing.assert_close(loss.detach(), stock + labeled)
    gradient = output[0].grad[2:].abs().sum(1, keepdim=True)
    assert (gradient[~student["labeled_part"]] == 0).all()
    assert (gradient.sum() > 0) == (name == "unlabeled_weight")


def test_teacher_gets_no_gradient_and_follows(run):
    trainer = after_warm_up(run.build())
    before = weights(trainer.teacher.module)
    trainer.train_step(next(trainer.dataloader_train))
    assert all(p.grad is None for p in trainer.teacher.parameters())
    assert not torch.equal(before[0], weights(trainer.teacher.module)[0])


def test_selfreg_sees_all_that_the_student_sees(data_sets, results):
    run = Run(data_sets.name("labels"), "2d", "nnUNetTrainerSelfRegCopyPaste_4epochs_2iters")
    trainer = after_warm_up(run.build())
    seen, take = [], trainer.loss.taps.take
    trainer.loss.taps.take = lambda: seen.append(take()) or seen[-1]
    trainer.train_step(next(trainer.dataloader_train))
    assert [len(features.final) for features in seen] == [6]
    assert trainer.loss.taps.empty


def test_largest_component_of_the_teachers_labels(run):
    trainer = after_warm_up(run.build())
    trainer.largest_component = True
    spots = torch.zeros(2, 3, *trainer.configuration_manager.patch_size)
    spots[:, 0] = 0.5
    spots[:, 1, 2:5, 2:5, 2:5] = 1
    spots[:, 1, 7, 7, 7] = 1
    trainer.teacher_probabilities = lambda _: spots
    batch = next(trainer.dataloader_train)
    (labels, *_) = trainer.pseudo_labels(batch["data_weak"], batch["target"])
    assert labels[:, 0, 2:5, 2:5, 2:5].all()
    assert labels.sum() == 2 * 27


def test_more_unlabelled_samples_than_labelled_ones(run):
    trainer = run.build()
    trainer.unlabeled_batch_size = 3
    trainer = after_warm_up(trainer)
    batch, student = mixed(trainer)
    assert len(student["data"]) == 2 + 2 * 3
    part = student["labeled_part"][2]
    assert torch.equal(student["data"][4][part], batch["data"][0][part])  # the third partner is the first again


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("box_ratio", 0),
        ("box_ratio", 1),
        ("mixture_weight", -1),
        ("unlabeled_weight", float("nan")),
        ("warm_up", 1.0),
        ("ema_decay", 1.0),
    ],
)
def test_impossible_setting_is_named(attribute, value, run):
    trainer = run.build()
    setattr(trainer, attribute, value)
    with pytest.raises(ValueError, match=f"{attribute} is {value}, it must be"):
        trainer.initialize()


def test_patch_in_which_the_box_is_empty_is_named(run):
    trainer = run.build()
    trainer.box_ratio = 0.01
    with pytest.raises(ValueError, match=r"a box of 0.01 of a patch of .* voxels is empty"):
        trainer.initialize()


def test_batch_without_a_labelled_sample_is_an_error(run):
    trainer = after_warm_up(run.build())
    batch = next(trainer.dataloader_train)
    batch["data"], batch["target"] = batch["data"][2:], [scale[:0] for scale in batch["target"]]
    with pytest.raises(ValueError, match="no labelled sample"):
        trainer.train_step(batch)


def test_resumed_training_equals_one_without_interruption(run, tmp_path, monkeypatch):
    whole, second = whole_and_resumed(run, tmp_path, monkeypatch)
    torch.testing.assert_close(weights(second.network), weights(whole.network), rtol=0, atol=0)
    torch.testing.assert_close(weights(second.teacher), weights(whole.teacher), rtol=0, atol=0)
    curves = [t.logger.local_logger.my_fantastic_logging for t in (whole, second)]
    for name in ("unlabeled_weight", "labeled_part", "unlabeled_part", "train_losses", "student_dice"):
        np.testing.assert_array_equal(curves[1][name], curves[0][name])
