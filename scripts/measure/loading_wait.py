"""How long the steps of a training wait for the processes that load its batches.

    python scripts/measure/loading_wait.py 4 3d_fullres -f 5 -tr nnUNetTrainer nnUNetTrainerDualTask -device cpu

For each trainer: the median time of a step, and the median and the longest time in which its next batch was waited for,
once the loading processes have filled their queue. A batch is the trainer's own: a semi-supervised one has unlabelled
samples beside the plan's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

from build_trainer import add_plan, build, check
from tqdm import tqdm

WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan(parser)
    parser.add_argument("-tr", nargs="+", default=["nnUNetTrainer", "nnUNetTrainerDualTask"], metavar="TRAINER")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help=f"after {WARM_UP} that are not counted")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers must be at least 1: without workers every batch is waited for")

    check(parser, arguments, arguments.tr)

    os.environ["nnUNet_n_proc_DA"] = str(arguments.workers)
    print("| trainer | step, s | wait, ms | longest wait, ms |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results  # a trainer writes a log file as soon as it exists
        for name, trainer in build(arguments.tr, arguments).items():
            waits, steps = measure(trainer, arguments.steps)
            median, longest = 1000 * statistics.median(waits), 1000 * max(waits)
            print(f"| {name} | {statistics.median(steps):.3f} | {median:.1f} | {longest:.1f} |")


def measure(trainer, count: int) -> tuple[list[float], list[float]]:
    """Seconds in which each batch was waited for, and of each step."""
    loader, validation = trainer.get_dataloaders()
    waits, steps = [], []
    for _ in tqdm(range(WARM_UP + count), disable=None):
        begin = time.perf_counter()
        batch = next(loader)
        loaded = time.perf_counter()
        trainer.train_step(batch)  # its loss is on the CPU in the end, so nothing is still queued on a GPU
        waits.append(loaded - begin)
        steps.append(time.perf_counter() - loaded)
    for augmenter in (loader, validation):
        augmenter._finish()
    return waits[WARM_UP:], steps[WARM_UP:]


if __name__ == "__main__":
    main()
