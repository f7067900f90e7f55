"""Time and memory of a training step, stock nnU-Net and others in turn, in one process, on real batches.

    python scripts/measure/step_time.py 4 3d_fullres -tr nnUNetTrainer nnUNetTrainerSelfReg -device cpu
    python scripts/measure/step_time.py 2 3d_fullres -f 5 -b 4 -tr nnUNetTrainer nnUNetTrainerMeanTeacher -device cpu

Each round takes one labelled batch of the data set and gives it to every trainer, the first one being the reference; a
semi-supervised trainer takes part of it as unlabelled samples, so that the networks see as many: half of it, or of 6
samples copy-paste takes 2 labelled and 2 unlabelled ones, which it mixes both ways. The step is one of the middle of
the training. Reported are the median time of a step, the median and quartiles of the ratio to the reference round by
round (a machine's speed drifts, a ratio of neighbours does not), and the peak of tensor memory above what is held
between steps. Then, likewise, the time in which each trainer's own loader makes a sample, in this process.
`nnUNetTrainerSelfRegStraightPort`, which computes the same terms the published way, is there for comparison with
`nnUNet_extTrainer=trainers:scripts/trials`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from build_trainer import add_plan, build, check
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from nnunetv2_selfreg.benchmark.machine import machine
from nnunetv2_selfreg.tensors import cut
from nnunetv2_selfreg.training.semi_supervised import SemiSupervised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan(parser)
    parser.add_argument("-tr", nargs="+", default=["nnUNetTrainer", "nnUNetTrainerSelfReg"], metavar="TRAINER")
    parser.add_argument("-b", type=int, metavar="N", help="samples a step; default: the plan's batch size")
    parser.add_argument("--rounds", type=int, default=15, help="after two that are not counted")
    parser.add_argument("--without-loading", action="store_true", help="measure the steps only")
    parser.add_argument("-o", type=Path, help="write the table as JSON to this file")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    if arguments.b is not None and arguments.b < 1:
        parser.error("-b must be at least 1")
    check(parser, arguments, arguments.tr)

    torch.set_flush_denormal(True)  # on a CPU denormals would drown the result
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train does
    # Trainers of one process would share compiled code that knows nothing of the others' hooks.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results  # a trainer writes a log file as soon as it exists
        built = build(dict.fromkeys([*arguments.tr, "nnUNetTrainer"]), arguments)
        trainers, stock = {name: built[name] for name in arguments.tr}, built["nnUNetTrainer"]
        for trainer in (*trainers.values(), stock):
            trainer.current_epoch = trainer.num_epochs // 2  # past the warm-up of copy-paste
            trainer.batch_size = arguments.b or trainer.batch_size
            if isinstance(trainer, SemiSupervised):
                try:
                    numbers_of_samples(trainer, trainer.batch_size)
                except ValueError as error:
                    parser.error(str(error))
        os.environ["nnUNet_n_proc_DA"] = "0"  # no workers beside the steps
        loading = {} if arguments.without_loading else measure_loading(trainers, arguments.rounds)
        labeled, _ = stock.get_dataloaders()
        seconds, memory = measure(trainers, labeled, arguments.rounds)
    rows = summary(seconds, memory, loading)
    print_table(rows)
    if arguments.o:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": machine(arguments.device)}
        about |= {name: str(value) for name, value in vars(arguments).items()}
        arguments.o.write_text(json.dumps({"rows": rows, **about}, indent=4))


def measure(trainers: dict[str, Any], loader: Any, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each step, and peak memory in bytes of one more. All trainers of a round get the same samples."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for count in tqdm(range(rounds + 2), desc="Steps", disable=None):
        batch = next(loader)
        shift = count % len(trainers)  # so that none is always the first on a new batch
        for name in [*trainers, *trainers][shift : shift + len(trainers)]:
            samples = batch_for(trainers[name], batch)
            start = time.perf_counter()
            loss = trainers[name].train_step(samples)["loss"]  # on the CPU, so nothing is still queued on a GPU
            if count >= 2:
                seconds[name].append(time.perf_counter() - start)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of {name} is {loss}")
    memory = {name: peak_memory(trainer, batch_for(trainer, batch)) for name, trainer in trainers.items()}
    return seconds, memory


def batch_for(trainer: Any, batch: dict) -> dict:
    """A stock batch as the trainer takes it, so that its network sees as many samples: for a semi-supervised one the
    last of them have no labels, and without deep supervision there is one target."""
    if isinstance(batch["target"], list) and not trainer.enable_deep_supervision:
        batch = {**batch, "target": batch["target"][0]}
    if not isinstance(trainer, SemiSupervised):
        return batch
    labeled, unlabeled = numbers_of_samples(trainer, len(batch["data"]))
    target, others = cut(batch["target"], labeled)
    pseudo_target, _ = cut(others, unlabeled)  # as good as a teacher's
    data, keys = batch["data"][: labeled + unlabeled], batch["keys"][: labeled + unlabeled]
    stream = trainer.labeled_stream(GivenBatch({"data": data[:labeled], "target": target, "keys": keys[:labeled]}))
    unlabeled_part = {"data_weak": data[labeled:], "pseudo_target": pseudo_target}
    return {**next(stream), **unlabeled_part, "data": data, "keys": keys}


class GivenBatch:
    """Stands for nnU-Net's loader where a labelled batch is there already; images become what its transforms make."""

    transforms = ComposeTransforms([])

    def __init__(self, batch: dict) -> None:
        self.batch = batch

    def __iter__(self) -> GivenBatch:
        return self

    def __next__(self) -> dict:
        images = [self.transforms(image=image, segmentation=None)["image"] for image in self.batch["data"]]
        return {**self.batch, "data": torch.stack(images)}


def numbers_of_samples(trainer: SemiSupervised, seen: int) -> tuple[int, int]:
    """Labelled and unlabelled samples, of which the network sees as many as possible alike, and `seen` in all.

    Raises:
        ValueError: these are too few.
    """
    of_labeled, of_unlabeled = trainer.passes_of_labeled, trainer.passes_of_unlabeled
    fewest = of_labeled + of_unlabeled
    if seen < fewest:
        raise ValueError(f"{seen} samples are too few for {type(trainer).__name__}: -b {fewest} at least")
    unlabeled = seen // fewest
    return (seen - of_unlabeled * unlabeled) // of_labeled, unlabeled


def measure_loading(trainers: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds for each sample, of one batch a round from each trainer's loader."""
    loaders = {name: trainer.get_dataloaders()[0] for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for count in tqdm(range(rounds + 2), desc="Loading", disable=None):
        for name, loader in loaders.items():
            start = time.perf_counter()
            batch = next(loader)
            if count >= 2:
                seconds[name].append((time.perf_counter() - start) / len(batch["data"]))
    return seconds


def peak_memory(trainer: Any, batch: dict) -> int:
    """Bytes of tensors that a step allocates at its peak, above what the trainer holds between steps."""
    trained = trainer.trained_modules() if isinstance(trainer, SemiSupervised) else [(None, trainer.optimizer)]
    for _, optimizer in trained:
        optimizer.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.train_step(batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step(batch)
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def summary(
    seconds: dict[str, list[float]], memory: dict[str, int], loading: dict[str, list[float]]
) -> list[dict[str, Any]]:
    reference = next(iter(seconds))
    rows = []
    for name, times in seconds.items():
        low, middle, high = ratio_quartiles(times, seconds[reference])
        row = {
            "trainer": name,
            "seconds": statistics.median(times),
            "ratio": middle,
            "ratio_quartiles": [low, high],
            "memory_mib": memory[name] / 2**20,
            "memory_ratio": memory[name] / memory[reference],
        }
        if loading:
            row["loading_seconds"] = statistics.median(loading[name])
            row["loading_ratio"] = ratio_quartiles(loading[name], loading[reference])[1]
        rows.append(row)
    return rows


def ratio_quartiles(times: list[float], reference: list[float]) -> list[float]:
    """Quartiles of the ratio round by round."""
    return statistics.quantiles([mine / theirs for mine, theirs in zip(times, reference, strict=True)], n=4)


def print_table(rows: list[dict[str, Any]]) -> None:
    with_loading = "loading_seconds" in rows[0]
    titles = ["trainer", "step, s", "ratio (quartiles)", "memory, MiB", "ratio"]
    titles += ["loading a sample, ms", "ratio"] if with_loading else []
    print(f"\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        cells = [row["trainer"], f"{row['seconds']:.3f}", f"{row['ratio']:.3f} ({low:.3f}–{high:.3f})"]
        cells += [f"{row['memory_mib']:.0f}", f"{row['memory_ratio']:.3f}"]
        cells += [f"{1000 * row['loading_seconds']:.0f}", f"{row['loading_ratio']:.3f}"] if with_loading else []
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
