"""Trainers against stock nnU-Net: one plan, the same cases and iterations, every run through nnU-Net's own commands.

    python -m nnunetv2_selfreg.benchmark.runs left-atrium-8 -o runs -tr nnUNetTrainer nnUNetTrainerMeanTeacher --repetitions 3
    python -m nnunetv2_selfreg.benchmark.runs -d 4 -c 3d_fullres -f 0 1 -o runs -tr nnUNetTrainer nnUNetTrainerSelfReg
    python -m nnunetv2_selfreg.benchmark.runs left-atrium-8 -o runs -tr nnUNetTrainer --jobs > jobs.txt

A protocol (`scripts/protocols/*.json`) names data set, folds, plan and length; what is missing of plans, preprocessed
cases and folds is made first. Without one, any preprocessed data set will do. Each run has an `nnUNet_results` of its
own and ends with a `metrics.csv` and a `result.json`; the *last* checkpoint is what is validated. Start the command
again after an interruption: finished runs are skipped, the others continue from their last whole checkpoint or begin
anew. `--jobs` prints a command for each unfinished run instead, for SLURM arrays or GNU parallel.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from tqdm import tqdm

from nnunetv2_selfreg.benchmark.commands import ExitStatusError
from nnunetv2_selfreg.benchmark.protocol import Protocol, protocol_names
from nnunetv2_selfreg.benchmark.run import Run, check_setting, is_full_disk
from nnunetv2_selfreg.errors import UserError

FAILURES = (ExitStatusError, UserError, OSError, ValueError)


def execute(runs: list[Run]) -> int:
    """Executes the runs, all of them even if some fail; the status is 1 then. A full disk ends it at once."""
    failed = 0
    seldom = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 120}  # a line in a log, each
    with tqdm(unit="epoch", disable=not runs, **seldom) as progress:
        for number, run in enumerate(runs, 1):
            later = sum(run.protocol.epochs for run in runs[number:])

            def on_epoch(left: int, later: int = later) -> None:
                progress.total = progress.n + 1 + left + later
                progress.update()

            progress.total = progress.n + run.protocol.epochs + later
            progress.set_description(run.folder.name)
            try:
                failure = run.execute(on_epoch)
            except Exception as error:  # of whatever kind, the other runs go on
                failure = str(error) if isinstance(error, FAILURES) else f"{type(error).__name__}: {error}"
                if is_full_disk(error, run.folder):
                    return report_full_disk(error)
            finally:
                progress.total = progress.n + later  # it may have ended early, or have been finished by another process
            if failure is not None:
                failed += 1
                tqdm.write(f"{run.folder.name}: {failure}", file=sys.stderr)
    return 1 if failed else 0


def report_full_disk(error: Exception) -> int:
    """Says it, and returns the status."""
    tqdm.write(f"No space left on device: {error}", file=sys.stderr)
    tqdm.write("Make room and start again: finished runs are kept.", file=sys.stderr)
    return 1


def print_jobs(runs: list[Run], arguments: argparse.Namespace) -> None:
    """A command for each run, with the names that the user gave."""
    common = [arguments.protocol] if arguments.protocol else []
    for option, value in (("-d", arguments.d), ("-c", arguments.c), ("-p", arguments.p)):
        common += [option, value] if value else []
    for option in ("scale", "epochs", "iterations"):
        value = getattr(arguments, option)
        common += [f"--{option}", value] if value else []
    script = os.path.relpath(__file__)
    for run in runs:
        this = ["-o", arguments.o, "-tr", run.trainer, "-f", run.fold, "--only", run.repetition, "-device", run.device]
        print(shlex.join(map(str, ["python", script, *common, *this])))


def chosen_protocol(arguments: argparse.Namespace) -> Protocol:
    """The protocol of the command line: a named one, or one made of -d, -c, -p and the length.

    Raises:
        ValueError: neither names nor options make a protocol.
    """
    try:
        dataset = maybe_convert_to_dataset_name(arguments.d) if arguments.d else None
    except RuntimeError as error:
        raise ValueError(f"-d {arguments.d}: {str(error).splitlines()[0]}") from error
    if arguments.protocol:
        protocol = Protocol.load(arguments.protocol, arguments.scale or "cpu")
        return replace(protocol, dataset=dataset, name=f"{protocol.name}-{dataset}") if dataset else protocol
    if not (dataset and arguments.c):
        raise ValueError(f"name a protocol ({', '.join(protocol_names())}), or a data set with -d and -c")
    plans, epochs, iterations = arguments.p or "nnUNetPlans", arguments.epochs or 1000, arguments.iterations or 250
    name = f"{dataset}-{arguments.c}-{plans}-{epochs}x{iterations}"
    return Protocol(name, dataset, plans, arguments.c, epochs, iterations, folds=[0])


def chosen_runs(protocol: Protocol, arguments: argparse.Namespace) -> list[Run]:
    """The runs of the command line, everything prepared for them.

    Raises:
        ValueError: the device or a fold is not there, a protocol with a split of its own shall train on another, or
            the runs that are there were made in another setting.
    """
    device = arguments.device or protocol.device
    if device == "cuda" and not torch.cuda.is_available() and not arguments.jobs:
        raise ValueError("there is no GPU here; -device cpu trains without, or --jobs prints commands for elsewhere")
    folds = protocol.prepare(arguments.o / "preparation.txt")
    if protocol.split and arguments.f and set(arguments.f) != set(folds):
        raise ValueError(f"-f: {protocol.name} has a split of its own, which is fold {folds[0]} here")
    output, folds = arguments.o.resolve(), list(dict.fromkeys(arguments.f or folds))
    for fold in folds:
        check_setting(protocol, fold, output, device)
    return [
        Run(protocol, trainer, fold, repetition, output, device)
        for repetition in ([arguments.only] if arguments.only else range(1, arguments.repetitions + 1))
        for fold in folds
        for trainer in dict.fromkeys(arguments.tr)
    ]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", nargs="?", help=", ".join(protocol_names()))
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="of all runs")
    parser.add_argument("-tr", nargs="+", default=["nnUNetTrainer"], metavar="TRAINER")
    parser.add_argument("-f", type=int, nargs="+", metavar="FOLD", help="default: the protocol's, or 0")
    parser.add_argument("--scale", help="of the protocol: cpu (default), full; some have more")
    parser.add_argument("--repetitions", type=positive, default=1, metavar="N")
    parser.add_argument("--only", type=positive, metavar="R", help="only repetition R, counted from 1")
    parser.add_argument("-device", choices=["cpu", "cuda"], help="default: the scale's, else cuda")
    parser.add_argument("--jobs", action="store_true", help="print a command for each unfinished run")
    free = parser.add_argument_group("without a protocol (-d also replaces a protocol's data set)")
    free.add_argument("-d", metavar="DATASET", help="name or id")
    free.add_argument("-c", metavar="CONFIGURATION")
    free.add_argument("-p", metavar="PLANS", help="default: nnUNetPlans")
    free.add_argument("--epochs", type=positive, metavar="N", help="default: 1000")
    free.add_argument("--iterations", type=positive, metavar="N", help="of an epoch, default: 250")
    arguments = parser.parse_args()
    if arguments.protocol and (arguments.c or arguments.p or arguments.epochs or arguments.iterations):
        parser.error(
            "a protocol has its own configuration, plans and length: -c, -p, --epochs, --iterations are not for it"
        )
    try:
        arguments.o.mkdir(parents=True, exist_ok=True)
        runs = chosen_runs(chosen_protocol(arguments), arguments)
    except FAILURES as error:
        if is_full_disk(error, arguments.o):
            return report_full_disk(error)
        parser.error(str(error))
    unfinished = [run for run in runs if not run.finished]
    if arguments.jobs:
        print_jobs(unfinished, arguments)
        return 0
    print(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished.")
    return execute(unfinished)


if __name__ == "__main__":
    sys.exit(main())
