"""Two processes with gloo on the CPU drive the trainer as `-num_gpus 2` would on two GPUs."""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workspace import Run, write_pseudo_labels

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.tensors import as_list

EPOCHS, ITERATIONS = 1, 2


def on_the_cpu(trainer):
    """nnU-Net insists on CUDA in a process group; the test replaces just that."""
    import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as module

    trainer.device = torch.device("cpu")
    trainer.grad_scaler = None
    module.DDP = lambda network, device_ids: DistributedDataParallel(network)
    return trainer


def in_two_processes(function: Callable, *arguments) -> None:
    """Calls it in each with the rank first."""
    mp.start_processes(function, args=arguments, nprocs=2, start_method="forkserver")


@contextmanager
def joined(rank: int, folder: str, run: Run) -> Iterator:
    """The trainer of one of two processes, which leave together."""
    torch.set_num_threads(1)
    os.environ["nnUNet_results"] = folder  # conftest's server has that of the session
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    trainer = on_the_cpu(run.build())
    yield trainer
    dist.barrier()
    # DDP ends before the process group, not when the interpreter does: their threads must not live so long.
    vars(trainer).clear()
    gc.collect()
    dist.destroy_process_group()


def train(rank: int, folder: str, run: Run) -> None:
    with joined(rank, folder, run) as trainer:
        train_and_report(rank, folder, trainer)


def train_and_report(rank: int, folder: str, trainer) -> None:
    trainer.configuration_manager.configuration["batch_size"] = 4  # two labelled samples a rank, which copy-paste mixes
    if getattr(trainer, "unlabeled_batch_size", 0) is None:
        trainer.unlabeled_batch_size = 3
    torch.manual_seed(rank)  # equal weights at the start are DDP's business
    trainer.initialize()
    first_teacher = copied_weights(trainer, "teacher")
    np.random.seed(rank)  # noqa: NPY002 (nnU-Net's loaders draw from it)
    outputs, unlabeled = [], []
    step = trainer.train_step

    def recorded(batch):
        unlabeled.append(len(batch["data"]) - len(as_list(batch["target"])[0]))
        outputs.append(step(batch))
        return outputs[-1]

    trainer.train_step = recorded
    trainer.run_training()
    torch.save(
        {
            "outputs": outputs,
            "weights": [p.detach() for p in trainer.network.parameters()],
            "curves": trainer.logger.local_logger.my_fantastic_logging,
            "empty": all(taps.empty for taps in taps_of(trainer)),
            "unlabeled": unlabeled,
            "first_teacher": first_teacher,
            "teacher": copied_weights(trainer, "teacher"),
            "partner": [
                p for partner in getattr(trainer, "_partners", {}).values() for p in copied_weights(partner, "module")
            ],
        },
        f"{folder}/rank{rank}.pth",
    )


def taps_of(trainer) -> list:
    return [getattr(part, name) for part, name in ((trainer, "tap"), (trainer.loss, "taps")) if hasattr(part, name)]


def copied_weights(trainer, part: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in getattr(trainer, part).parameters()] if hasattr(trainer, part) else []


TERMS = {
    "nnUNetTrainerSelfRegUAMeanTeacher": {"segmentation", "scr", "ifd", "consistency", "kept_voxels", "student_dice"},
    "nnUNetTrainerSelfRegCopyPaste": {"segmentation", "scr", "ifd", "labeled_part", "unlabeled_part", "student_dice"},
    "nnUNetTrainerLabeledCopyPaste": {"segmentation", "labeled_part", "student_dice"},
    "nnUNetTrainerSelfRegSelfTraining": {"segmentation", "scr", "ifd", "pseudo_segmentation"},
    "nnUNetTrainerDualTask": {"segmentation", "distance", "consistency"},
    "nnUNetTrainerSelfRegDualTaskMutual": {"segmentation", "scr", "ifd", "distance_dice", "consistency"},
    "nnUNetTrainerTinySelfRegSwinUNETR": {"segmentation", "scr", "ifd"},
    "nnUNetTrainerTinyUXNet": set(),
    "nnUNetTrainerTinySwinUNETR": set(),
    "nnUNetTrainerTinySelfRegUXNet": {"segmentation", "scr", "ifd"},
    "nnUNetTrainerTinyKMaxUXNet": {"query_segmentation", "convolutional", "query_distribution"},
    "nnUNetTrainerTinyDualKMaxUXNet": {"segmentation", "query_distribution", "query_consistency"},
    "nnUNetTrainerTinyDualKMaxUXNetTwo": {"segmentation", "query_distribution", "query_consistency"},
}


PARTS_OF_OTHERS = (
    "nnUNetTrainerLabeledCopyPaste",
    "nnUNetTrainerTinySelfRegSwinUNETR",
    "nnUNetTrainerTinyUXNet",
    "nnUNetTrainerTinySwinUNETR",
    "nnUNetTrainerTinySelfRegUXNet",
    "nnUNetTrainerTinyKMaxUXNet",
    "nnUNetTrainerTinyDualKMaxUXNet",
)
CASES = [pytest.param(name, marks=pytest.mark.matrix if name in PARTS_OF_OTHERS else ()) for name in TERMS]


@pytest.fixture(scope="module", params=CASES)
def ranks(request, data_sets):
    trainer = f"{request.param}_{EPOCHS}epochs_{ITERATIONS}iters"
    labels = "ignore" if "KMax" in request.param else "regions_ignore"  # clusters are no regions
    configuration = "2d" if "Swin" in request.param else "3d_fullres"  # where its padding takes long
    run = Run(data_sets.name(labels), configuration, trainer)
    if "SelfTraining" in request.param:
        write_pseudo_labels(run)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", folder)
        in_two_processes(train, folder, run)
        results = [torch.load(f"{folder}/rank{rank}.pth", weights_only=False) for rank in (0, 1)]
        files = os.listdir(run.folder)
    return results, files, TERMS[request.param]


def test_ranks_see_different_batches_and_agree_on_the_weights(ranks):
    (first, second), *_ = ranks
    assert first["outputs"][0]["loss"] != second["outputs"][0]["loss"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    for name in ("first_teacher", "teacher", "partner"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


def test_unlabelled_samples_are_divided_among_the_ranks(ranks):
    results, _, terms = ranks
    expected = (
        [2, 1] if terms & {"consistency", "unlabeled_part", "query_consistency", "pseudo_segmentation"} else [0, 0]
    )
    assert [result["unlabeled"] for result in results] == [[share] * ITERATIONS for share in expected]


def test_pseudo_dice_is_of_all_ranks(ranks):
    results, _, terms = ranks
    for name in ("mean_fg_dice", *(terms & {"student_dice"})):
        values = [result["curves"][name] for result in results]
        assert values[0] == values[1]


def test_terms_are_means_over_all_ranks(ranks):
    results, _, terms = ranks
    for name in terms - {"student_dice"}:  # which is of the validation
        expected = np.mean([step[name] for result in results for step in result["outputs"]])
        for result in results:
            assert result["curves"][name] == [pytest.approx(expected)]


def test_nothing_is_kept_and_one_rank_writes(ranks):
    results, files, _ = ranks
    assert all(result["empty"] for result in results)
    assert sorted(f for f in files if f.endswith((".pth", ".part"))) == ["checkpoint_best.pth", "checkpoint_final.pth"]


def of_a_share(rank: int, folder: str, run: Run, function: Callable, samples: list) -> None:
    """What a function of a trainer makes of every other sample, on one of two ranks."""
    with joined(rank, folder, run) as trainer:
        trainer.initialize()
        torch.save(function(trainer, *_at(samples, slice(rank, None, 2))).detach(), f"{folder}/rank{rank}.pth")


def _at(samples, place: slice):
    """Of tensors, and lists of them."""
    return samples[place] if isinstance(samples, torch.Tensor) else [_at(part, place) for part in samples]


def check_that_ranks_share_their_dice(run: Run, function: Callable, samples: list, folder: str) -> None:
    """Each gets the Dice of all samples in one process."""
    in_two_processes(of_a_share, folder, run, function, samples)
    trainer = run.build()
    trainer.initialize()
    expected = function(trainer, *samples)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(f"{folder}/rank{rank}.pth"), expected)


def dice_of_distances(trainer, distance: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    images = torch.zeros_like(target)
    return trainer.distance_loss(distance, Batch(images, images[:0], images[:0], [target]))


def test_batch_dice_of_distances_where_only_one_rank_sees_a_class(data_sets, tmp_path, monkeypatch):
    """What the other rank wrongly predicts counts."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    run = Run(data_sets.name("labels"), "2d", "nnUNetTrainerDualTaskMutual")
    target = torch.zeros(2, 1, 8, 8)
    target[0, 0, :4], target[0, 0, 4:], target[1, 0, :2] = 1, 2, 2
    distance = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)) / 1000
    check_that_ranks_share_their_dice(run, dice_of_distances, [distance, target], str(tmp_path))


def dice_of_part(trainer, *arguments) -> torch.Tensor:
    """The loss of copy-paste's mixtures without the cross-entropy, which each rank takes of its own samples."""
    trainer.partial_loss.loss.weight_ce = 0
    return trainer.loss_of_part(*arguments)


def test_batch_dice_of_parts_of_mixtures_where_only_one_rank_sees_a_class(data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    run = Run(data_sets.name("labels"), "2d", "nnUNetTrainerCopyPaste")
    generator = torch.Generator().manual_seed(0)
    output = [torch.randn(4, 3, size, size, generator=generator) for size in (32, 16)]
    target = [torch.zeros(4, 1, size, size) for size in (32, 16)]
    for scale in target:
        scale[::2, :, : len(scale[0, 0]) // 2] = 1
    part = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    part[..., 4:28, 4:28] = True
    check_that_ranks_share_their_dice(run, dice_of_part, [output, target, part], str(tmp_path))
