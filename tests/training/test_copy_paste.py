"""Copy-paste: what is mixed, what its loss is, what the teacher labels, and what is refused."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerCELoss import nnUNetTrainerCELoss
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerTopkLoss import nnUNetTrainerDiceTopK10Loss
from torch import distributed as dist
from workspace import Run, seed, start, weights, whole_and_resumed

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.data.mixing import at_size
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.tensors import as_list
from nnunetv2_selfreg.training.copy_paste import CopyPaste, Mixtures

NAME = "nnUNetTrainerCopyPaste_4epochs_2iters"
VARIANTS = ("labels", "regions", "ignore", "regions_ignore")
COARSE_COUNTS = (0.6, 0.4)  # nnU-Net gives the last scale no weight, and the tests' plans have two


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


def mixed(trainer) -> tuple[Batch, Mixtures]:
    """A batch of the loaders, and the mixtures of it."""
    batch = Batch.split(next(trainer.dataloader_train))
    return batch, trainer.mixtures(batch)


def loss_of_output(trainer, output, batch: Batch, mixtures: Mixtures) -> torch.Tensor:
    """The loss if this is the network's output of the labelled samples and these mixtures."""
    trainer.network, trainer.mixtures = (lambda _: output), (lambda _: mixtures)
    trainer.terms.clear()
    return trainer.terms.total(trainer.weighted_terms(batch))


def at_every_scale(target: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """As nnU-Net's loader makes targets of the one at full resolution."""
    scales = [[a / b for a, b in zip(scale.shape[2:], target.shape[2:], strict=True)] for scale in like]
    downsample = DownsampleSegForDSTransform(scales)._apply_to_segmentation
    return [torch.stack(scale) for scale in zip(*map(downsample, target), strict=True)]


def some_of(batch: dict, labeled: int, unlabeled: int) -> Batch:
    """Of one of 3 and 3 samples."""
    whole = Batch.split(batch)
    target = [scale[:labeled] for scale in whole.target]
    return Batch(whole.labeled[:labeled], whole.strong[:unlabeled], whole.weak[:unlabeled], target)


@pytest.fixture
def three(run):
    """A trainer with three samples of each kind."""
    trainer = run.build()
    trainer.configuration_manager.configuration["batch_size"] = 3
    return trainer


NUMBERS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 3)]


@pytest.mark.parametrize(("labeled", "unlabeled"), NUMBERS)
def test_mixtures_go_both_ways_and_have_different_labelled_samples(labeled, unlabeled, three):
    trainer = after_warm_up(three)
    batch = some_of(next(trainer.dataloader_train), labeled, unlabeled)
    seen, network = [], trainer.network
    trainer.network = lambda images: seen.append(images) or network(images)
    made, mixtures = [], trainer.mixtures
    trainer.mixtures = lambda batch: made.append(mixtures(batch)) or made[-1]
    trainer.weighted_terms(batch)
    (images,), (mixtures,) = seen, made
    assert len(images) == labeled + 2 * unlabeled
    assert torch.equal(images, torch.cat((batch.labeled, mixtures.images)))
    pseudo = trainer.pseudo_labels(batch.weak, batch.target)[0]
    inward, outward = mixtures.other.chunk(2)
    assert torch.equal(inward, ~outward)
    sides = [int(2 / 3 * length) for length in images.shape[2:]]
    assert (inward.sum((1, 2, 3, 4)) == np.prod(sides)).all()
    labels = mixtures.target[0]
    for u in range(unlabeled):
        for number, partner, part in ((u, u, inward[u]), (unlabeled + u, u + 1, outward[u])):
            partner %= labeled
            assert torch.equal(mixtures.images[number], torch.where(part, batch.strong[u], batch.labeled[partner]))
            assert torch.equal(labels[number], torch.where(part, pseudo[u], batch.target[0][partner]))
    for scale, expected in zip(mixtures.target, at_every_scale(labels, mixtures.target), strict=True):
        assert torch.equal(scale, expected)


def test_each_mixture_has_a_box_of_its_own(three):
    boxes = mixed(after_warm_up(three))[1].other[:3]
    assert len({tuple(box.nonzero()[0].tolist()) for box in boxes}) > 1


@pytest.mark.parametrize(("labeled", "unlabeled"), NUMBERS)
def test_mixtures_are_of_labelled_samples_until_the_warm_up_ends(labeled, unlabeled, three):
    trainer = start(three)
    trainer.mixture_warm_up = 0.25  # one epoch of four
    trainer.teacher_probabilities = None  # not asked
    batch = some_of(next(trainer.dataloader_train), labeled, unlabeled)
    require_mixtures_of_labeled(batch, trainer.mixtures(batch), unlabeled)


def require_mixtures_of_labeled(batch: Batch, made: Mixtures, count: int) -> None:
    """`count` in each direction."""
    mine, target = batch.labeled, batch.target[0]
    labeled = len(mine)
    mixtures, labels = made.images, made.target[0]
    box = made.other[:count]
    assert len(mixtures) == len(labels) == 2 * count
    for u in range(count):
        a, b = u % labeled, (u + 1) % labeled
        for number, outside, inside in ((u, a, b), (count + u, b, a)):
            assert torch.equal(mixtures[number], torch.where(box[u], mine[inside], mine[outside]))
            assert torch.equal(labels[number], torch.where(box[u], target[inside], target[outside]))
    if labeled > 1:
        assert not any(torch.equal(mixture, sample) for mixture in mixtures for sample in mine)
    for scale, expected in zip(made.target, at_every_scale(labels, made.target), strict=True):
        assert torch.equal(scale, expected)


LABELS_ALONE = [
    ("ignore", "3d_fullres", NAME, True),
    ("labels", "2d", NAME, False),
    ("regions_ignore", "2d", NAME.replace("CopyPaste", "SelfRegCopyPaste"), True),
]


@pytest.mark.parametrize(("variant", "configuration", "name", "deep_supervision"), LABELS_ALONE)
def test_labels_alone_when_asked_for(variant, configuration, name, deep_supervision, data_sets, results, monkeypatch):
    """Nothing unlabelled has to be there, and the mixtures are to the end what they are in the warm-up."""
    trainer = Run(data_sets.name(variant), configuration, name).build()
    trainer.unlabeled_batch_size, trainer.enable_deep_supervision = 0, deep_supervision
    monkeypatch.setattr(trainer, "unlabeled_pool", lambda: pytest.fail("the pool is asked for"))
    trainer = after_warm_up(trainer)
    batch = next(trainer.dataloader_train)
    samples = trainer.configuration_manager.batch_size
    assert len(batch["data"]) == len(as_list(batch["target"])[0]) == samples
    split = Batch.split(batch)
    require_mixtures_of_labeled(split, trainer.mixtures(split), samples)
    assert trainer.train_step(batch)["unlabeled_part_weight"] == 1
    trainer.on_validation_epoch_start()
    assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])


def test_weight_of_the_unlabelled_part_is_full_in_the_warm_up_then_ramped(run):
    trainer = start(run.build())
    trainer.mixture_warm_up = 0.25
    assert trainer.train_step(next(trainer.dataloader_train))["unlabeled_part_weight"] == 1
    trainer.current_epoch, trainer._steps_in_epoch = 1, 0
    weights_then = [trainer.train_step(next(trainer.dataloader_train))["unlabeled_part_weight"] for _ in range(2)]
    ramps = [np.exp(-5 * (1 - done / 0.15) ** 2) for done in (0, 0.125)]  # from 0.25 to 0.4, in steps of an eighth
    assert weights_then == pytest.approx([0.5 * ramp for ramp in ramps], rel=1e-5)


def test_weight_is_full_after_a_warm_up_that_is_longer_than_the_ramp(run):
    trainer = start(run.build())
    trainer.mixture_warm_up = trainer.ramp_up_length = 0.25
    trainer.current_epoch = 1
    assert trainer.train_step(next(trainer.dataloader_train))["unlabeled_part_weight"] == 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_labels_the_weak_views(variant, run, data_sets):
    """Recomputed from a copy of the teacher."""
    trainer = after_warm_up(Run(data_sets.name(variant), "3d_fullres", NAME).build())
    trainer.train_step(next(trainer.dataloader_train))
    trainer.train_step(next(trainer.dataloader_train))  # student and teacher differ from here on
    teacher = copy.deepcopy(trainer.teacher.module)
    batch = next(trainer.dataloader_train)
    with torch.no_grad():
        logits = teacher(batch["data_weak"])[0]
    expected = logits > 0 if trainer.label_manager.has_regions else logits.argmax(1, keepdim=True)
    if variant == "regions_ignore":
        expected = torch.cat((expected, torch.zeros_like(expected[:, :1])), 1)
    assert expected.float().std() > 0
    found = trainer.pseudo_labels(batch["data_weak"], batch["target"])
    assert found[0].dtype == batch["target"][0].dtype
    torch.testing.assert_close(found[0], expected.to(found[0].dtype), rtol=0, atol=0)


def cropped(values: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The box in which `part` `(1, 1, *spatial)` is True."""
    where = part[0, 0].nonzero()
    first, last = where.amin(0), where.amax(0)
    return values[(..., *(slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True)))]


def of_both_halves(loss, output: list, target: list) -> torch.Tensor:
    """L(x_in) + L(x_out)."""
    return sum(loss(*([scale.chunk(2)[half] for scale in scales] for scales in (output, target))) for half in (0, 1))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_a_box_is_nnunets_loss_of_the_cropped_box(variant, configuration, data_sets, results):
    trainer = after_warm_up(Run(data_sets.name(variant), configuration, NAME).build())
    _, mixtures = mixed(trainer)
    box = mixtures.other[:1]  # the same for all samples, so that they can be cropped
    count = len(mixtures.other)
    with torch.no_grad():
        output = [3 * torch.randn_like(scale) for scale in trainer.network(mixtures.images)]
    parts = [at_size(box, scale.shape[2:]) for scale in mixtures.target]
    pairs = [
        [cropped(values, part) for values, part in zip(scales, parts, strict=True)]
        for scales in (output, mixtures.target)
    ]
    stock = nnUNetTrainer._build_loss(trainer)
    stock.weight_factors = trainer.partial_loss.weight_factors = COARSE_COUNTS
    expected = of_both_halves(stock, *pairs)
    boxes = box.expand(count, -1, *box.shape[2:])
    for name, other in (("unlabeled_part", boxes), ("labeled_part", ~boxes)):
        _, found = trainer.mixture_terms(output, mixtures._replace(other=other))[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_everything_is_nnunets_loss(variant, deep_supervision, data_sets, results):
    trainer = Run(data_sets.name(variant), "3d_fullres", NAME).build()
    trainer.enable_deep_supervision = deep_supervision
    trainer = after_warm_up(trainer)
    batch = next(trainer.dataloader_train)
    mixtures = trainer.mixtures(Batch.split(batch))
    output = trainer.network(mixtures.images)
    nothing = mixtures._replace(other=torch.zeros_like(mixtures.other))
    terms = trainer.mixture_terms(output, nothing)
    stock = nnUNetTrainer._build_loss(trainer)
    stock = (
        stock if deep_supervision else lambda output, target: nnUNetTrainer._build_loss(trainer)(output[0], target[0])
    )
    expected = of_both_halves(stock, as_list(output), mixtures.target)
    torch.testing.assert_close(terms["labeled_part"][1], expected)
    assert torch.isfinite(terms["unlabeled_part"][1])  # though nothing is unlabelled
    assert np.isfinite(trainer.train_step(batch)["loss"])


@pytest.mark.parametrize("variant", ["ignore", "regions_ignore"])
def test_ignored_voxels_stay_ignored(variant, data_sets, results):
    trainer = after_warm_up(Run(data_sets.name(variant), "3d_fullres", NAME).build())
    trainer.partial_loss.weight_factors = COARSE_COUNTS
    _, mixtures = mixed(trainer)
    output = [scale.detach().requires_grad_() for scale in trainer.network(mixtures.images)]
    trainer.terms.total(trainer.mixture_terms(output, mixtures)).backward()
    for scale, target in zip(output, mixtures.target, strict=True):
        ignored = target[:, -1:] == (3 if variant == "ignore" else 1)
        gradient = scale.grad.abs().sum(1, keepdim=True)
        assert ignored.any()
        assert gradient[~ignored].min() > 0
        assert (gradient[ignored] == 0).all()


def test_loss_is_the_sum_of_its_parts(run):
    trainer = after_warm_up(run.build())
    trainer.mixture_weight, trainer.unlabeled_weight = 0.7, 3.0
    outputs = trainer.train_step(next(trainer.dataloader_train))
    weight = 3 * np.exp(-5 * (1 - 0.15 / 0.3) ** 2)  # at 0.25, between 0.1 and 0.4
    mixtures = outputs["labeled_part"] + weight * outputs["unlabeled_part"]
    assert outputs["loss"] == pytest.approx(outputs["segmentation"] + 0.7 * mixtures, rel=1e-5)


@pytest.mark.parametrize("name", ["unlabeled_weight", "mixture_weight"])
def test_weight_0_leaves_the_labelled_part(name, run):
    """In value and in gradient: of the mixtures' labelled voxels, and with `mixture_weight` of none of them."""
    trainer = after_warm_up(run.build())
    setattr(trainer, name, 0.0)
    batch, mixtures = mixed(trainer)
    images = torch.cat((batch.labeled, mixtures.images))
    output = [scale.detach().requires_grad_() for scale in trainer.network(images)]
    loss = loss_of_output(trainer, output, batch, mixtures)
    loss.backward()
    terms = trainer.terms
    stock = nnUNetTrainer._build_loss(trainer)([scale.detach()[:2] for scale in output], batch.target)
    torch.testing.assert_close(terms["segmentation"], stock)
    labeled = trainer.mixture_weight * terms["labeled_part"]
    torch.testing.assert_close(loss.detach(), stock + labeled)
    gradient = output[0].grad[2:].abs().sum(1, keepdim=True)
    assert (gradient[mixtures.other] == 0).all()
    assert (gradient.sum() > 0) == (name == "unlabeled_weight")


def test_teacher_gets_no_gradient_and_follows(run):
    trainer = after_warm_up(run.build())
    trainer.teacher.requires_grad_(True)
    modes, run_teacher = [], trainer._run_teacher
    trainer._run_teacher = lambda image: modes.append(torch.is_grad_enabled()) or run_teacher(image)
    before = weights(trainer.teacher.module)
    trainer.train_step(next(trainer.dataloader_train))
    assert modes == [False]
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


@pytest.mark.parametrize("variant", ["labels", "regions_ignore"])
def test_largest_component_of_the_teachers_labels(variant, data_sets, results):
    trainer = after_warm_up(Run(data_sets.name(variant), "3d_fullres", NAME).build())
    trainer.largest_component = True
    regions = variant == "regions_ignore"
    spots = torch.zeros(2, 2 if regions else 3, *trainer.configuration_manager.patch_size)
    spots[:, 0] = 0.4
    organ = spots[:, 0 if regions else 1]
    organ[:, 2:5, 2:5, 2:5] = 1
    organ[:, 7, 7, 7] = 1
    trainer.teacher_probabilities = lambda _: spots
    batch = next(trainer.dataloader_train)
    (labels, *_) = trainer.pseudo_labels(batch["data_weak"], batch["target"])
    assert labels[:, 0, 2:5, 2:5, 2:5].all()
    assert labels.sum() == 2 * 27


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("mixture_weight", -1),
        ("unlabeled_weight", float("nan")),
        ("mixture_warm_up", 1.1),
        ("ema_decay", 1.0),
    ],
)
def test_impossible_setting_is_named(attribute, value, run):
    trainer = run.build()
    setattr(trainer, attribute, value)
    with pytest.raises(ValueError, match=rf"nnUNetTrainerCopyPaste_.*\.{attribute} is {value}, it must be"):
        trainer.initialize()


@pytest.mark.parametrize(
    ("ratio", "problem"),
    [
        (0, "the box ratio is 0, it must be between 0 and 1"),
        (1, "the box ratio is 1, it must be between 0 and 1"),
        (0.01, "a box of 0.01 of a patch of .* voxels is empty: take a larger ratio or patch"),
    ],
)
def test_impossible_box_is_named_with_its_setting(ratio, problem, run):
    trainer = run.build()
    trainer.box_ratio = ratio
    with pytest.raises(ValueError, match=rf"nnUNetTrainerCopyPaste_.*\.box_ratio: {problem} \(3d_fullres\)"):
        trainer.initialize()


ALONE = [(1, 1, 0.1, True), (1, 1, 0.0, False), (2, 1, 0.1, False), (3, 2, 0.1, True), (4, 2, 0.1, False)]


@pytest.mark.parametrize(("batch_size", "processes", "warm_up", "told"), ALONE)
def test_log_tells_that_one_sample_is_mixed_with_itself(batch_size, processes, warm_up, told, run, monkeypatch):
    trainer = with_samples(run, batch_size, processes, monkeypatch)
    trainer.mixture_warm_up = warm_up
    trainer.initialize()
    assert ("mixed with itself" in Path(trainer.log_file).read_text()) == told


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (3, 2)])
def test_one_sample_that_would_be_mixed_with_itself_to_the_end_is_an_error(batch_size, processes, run, monkeypatch):
    trainer = with_samples(run, batch_size, processes, monkeypatch)
    trainer.unlabeled_batch_size = 0
    with pytest.raises(ValueError, match="unlabeled_batch_size is 0, it must be 1 at least, or None, where a GPU has"):
        trainer.initialize()


def with_samples(run, batch_size: int, processes: int, monkeypatch):
    """A trainer with a plan's batch of this size, which so many processes share."""
    trainer = run.build()
    if processes > 1:  # as in the first of them
        build = nnUNetTrainer.initialize
        monkeypatch.setattr(nnUNetTrainer, "initialize", lambda self: build(self) or setattr(self, "is_ddp", True))
        monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    trainer.configuration_manager.configuration["batch_size"] = batch_size
    return trainer


def test_batch_without_a_labelled_sample_is_an_error(run):
    trainer = after_warm_up(run.build())
    batch = next(trainer.dataloader_train)
    batch["data"], batch["target"] = batch["data"][2:], [scale[:0] for scale in batch["target"]]
    with pytest.raises(ValueError, match="no labelled sample"):
        trainer.train_step(batch)


def test_uneven_shares_are_refused_where_processes_share_their_dice(data_sets, results):
    trainer = Run(data_sets.name("labels"), "2d", NAME).build()
    trainer.unlabeled_batch_size, trainer.is_ddp = 3, True
    assert trainer.configuration_manager.batch_dice
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda: 2)
        with pytest.raises(
            ValueError, match="unlabeled_batch_size is 3, it must be divisible by the number of processes, 2"
        ):
            trainer._unlabeled_of_this_rank()
        trainer.unlabeled_batch_size = -2
        with pytest.raises(ValueError, match="it must be 0 at least"):
            trainer._unlabeled_of_this_rank()


def of_class(trainer_class: type, data_sets):
    """A trainer of a class that nnU-Net does not find by its name."""
    built = Run(data_sets.name("labels"), "2d", NAME).build()
    plans = {**built.plans_manager.plans, "continue_training": False}
    return trainer_class(plans, "2d", 0, built.dataset_json, torch.device("cpu"))


@pytest.mark.parametrize(
    ("base", "name"),
    [(nnUNetTrainerCELoss, "RobustCrossEntropyLoss"), (nnUNetTrainerDiceTopK10Loss, "DC_and_topk_loss")],
)
def test_loss_that_cannot_ignore_is_named(base, name, data_sets, results):
    class OtherLoss(CopyPaste, base):
        pass

    trainer = of_class(OtherLoss, data_sets)
    with pytest.raises(NotImplementedError, match=f"the loss here is {name}"):
        trainer.initialize()


def test_another_loss_serves_the_mixtures_too(data_sets, results):
    class DiceAlone(CopyPaste, nnUNetTrainer):
        def _build_loss(self):
            loss = super()._build_loss()
            loss.loss.weight_ce = 0
            return loss

    trainer = of_class(DiceAlone, data_sets)
    trainer.initialize()
    assert trainer.loss.loss.weight_ce == trainer.partial_loss.loss.weight_ce == 0
    assert trainer.loss.loss.ignore_label is None
    assert trainer.partial_loss.loss.ignore_label is not None


def test_number_of_unlabelled_samples_must_not_be_negative(run):
    trainer = run.build()
    trainer.unlabeled_batch_size = -1
    trainer.initialize()
    with pytest.raises(ValueError, match="unlabeled_batch_size is -1, it must be 0 at least, or None"):
        trainer.get_dataloaders()


def test_fold_without_an_unlabelled_case_is_named(run, tmp_path):
    trainer = run.build()
    trainer.initialize()
    shutil.copytree(trainer.preprocessed_dataset_folder_base, tmp_path / "preprocessed")
    splits = load_json(str(tmp_path / "preprocessed" / "splits_final.json"))
    save_json([{**split, "unlabeled": []} for split in splits], str(tmp_path / "preprocessed" / "splits_final.json"))
    name = Path(trainer.preprocessed_dataset_folder).name
    shutil.rmtree(tmp_path / "preprocessed" / f"{name}_unlabeled", ignore_errors=True)
    trainer.preprocessed_dataset_folder_base = str(tmp_path / "preprocessed")
    trainer.preprocessed_dataset_folder = str(tmp_path / "preprocessed" / name)
    with pytest.raises(UserError, match="Fold 0 has no unlabelled case"):
        trainer.get_dataloaders()


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_in_mixed_precision(variant, data_sets, results):
    """All of it, as on a GPU, in the half precision that a CPU has."""
    trainer = after_warm_up(Run(data_sets.name(variant), "2d", NAME).build())
    batch, losses = next(trainer.dataloader_train), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(float(trainer.loss_of(batch)))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


@pytest.mark.matrix  # as of the dual-task trainers, which run always
@pytest.mark.usefixtures("compiling_without_code")
def test_compiled_training_is_the_eager_one(data_sets, results):
    """Compiled as on a GPU; teacher and SelfReg's hooks too, and with a validation between two steps."""
    run = Run(data_sets.name("regions_ignore"), "2d", "nnUNetTrainerSelfRegCopyPaste_4epochs_2iters")
    batches, runs = [], []
    for compiled in (False, True):
        seed(0)
        trainer = run.build()
        if compiled:
            trainer._do_i_compile = lambda: True
        trainer = after_warm_up(trainer)
        batches = batches or [next(trainer.dataloader_train) for _ in range(2)]
        seed(1)  # boxes and SelfReg's channels
        first = trainer.train_step(copy.deepcopy(batches[0]))
        trainer.on_validation_epoch_start()
        validation = trainer.validation_step(copy.deepcopy({**batches[0], "data": batches[0]["data"][:2]}))
        trainer.on_train_epoch_start()
        second = trainer.train_step(copy.deepcopy(batches[1]))
        modules = (trainer.network, trainer.teacher.module)
        runs.append((first, validation, second, [weights(module) for module in modules]))
    assert all(isinstance(part, torch._dynamo.OptimizedModule) for part in (trainer.network, trainer._run_teacher))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)


def test_resumed_training_equals_one_without_interruption(run, tmp_path, monkeypatch):
    """The interruption is in the warm-up, and the ramp begins in the second of the last two epochs."""
    monkeypatch.setattr(CopyPaste, "mixture_warm_up", 0.6)
    monkeypatch.setattr(CopyPaste, "ramp_up_length", 1.0)
    whole, second = whole_and_resumed(run, tmp_path, monkeypatch)
    torch.testing.assert_close(weights(second.network), weights(whole.network), rtol=0, atol=0)
    torch.testing.assert_close(weights(second.teacher), weights(whole.teacher), rtol=0, atol=0)
    curves = [t.logger.local_logger.my_fantastic_logging for t in (whole, second)]
    for name in ("unlabeled_part_weight", "labeled_part", "unlabeled_part", "train_losses", "student_dice"):
        np.testing.assert_array_equal(curves[1][name], curves[0][name])
    assert 0 < curves[0]["unlabeled_part_weight"][-1] < 0.5
