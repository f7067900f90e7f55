"""The runs of a benchmark: chosen, prepared, and executed one after the other or printed as jobs.

Every trainer gets one plan, the same cases and iterations, and every run goes through nnU-Net's own commands, with an
`nnUNet_results` of its own. It ends with a `metrics.csv` and a `result.json`; the *last* checkpoint is what is
validated.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace

import torch
from tqdm import tqdm

from nnunetv2_selfreg import discovery
from nnunetv2_selfreg.benchmark import protocols
from nnunetv2_selfreg.benchmark.commands import ExitStatusError
from nnunetv2_selfreg.benchmark.protocol import DEFAULT_PLANS, Protocol
from nnunetv2_selfreg.benchmark.run import Run, check_setting, is_full_disk
from nnunetv2_selfreg.data.datasets import dataset_name
from nnunetv2_selfreg.errors import UserError

FAILURES = (ExitStatusError, UserError, OSError)


def benchmark(options: argparse.Namespace) -> int:
    """Executes the runs of the command line that are not finished yet, or prints a job for each of them.

    Returns:
        0, or 1 if a run failed or the disk is full.

    Raises:
        UserError: the options do not make runs, or their preparation failed.
    """
    try:
        protocol = chosen_protocol(options)
        discovery.require(options.tr)
        options.o.mkdir(parents=True, exist_ok=True)
        runs = chosen_runs(protocol, options)
    except FAILURES as error:
        if is_full_disk(error, options.o):
            return report_full_disk(error)
        if isinstance(error, ExitStatusError):
            print(error, file=sys.stderr)
            said = f"above and in {options.o / 'preparation.txt'}"
            raise UserError(f"nnU-Net's preparation of the data set failed; what it said is {said}") from error
        raise
    unfinished = [run for run in runs if not run.finished]
    if options.jobs:
        print_jobs(unfinished, options)
        return 0
    print(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished.")
    status = execute(unfinished)
    if any(run.finished for run in runs):
        folder = options.o / protocol.name
        print(f"The results are in {folder}. What they say:")
        print(shlex.join(["nnUNetv2_selfreg", "benchmark", "report", str(folder), "-o", "report"]))
    return status


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


def print_jobs(runs: list[Run], options: argparse.Namespace) -> None:
    """A command for each run, which can be started in any folder."""
    common = [options.protocol] if options.protocol else []
    if options.protocol_file:
        common += ["--protocol", options.protocol_file.resolve()]
    for option, value in (("-d", options.d), ("-c", options.c), ("-p", options.p)):
        common += [option, value] if value else []
    for option in ("scale", "epochs", "iterations"):
        value = getattr(options, option)
        common += [f"--{option}", value] if value else []
    common += ["-o", options.o.resolve()]
    for run in runs:
        this = ["-tr", run.trainer, "-f", run.fold, "--only", run.repetition, "-device", run.device]
        print(shlex.join(map(str, ["nnUNetv2_selfreg", "benchmark", "run", *common, *this])))


def chosen_protocol(options: argparse.Namespace) -> Protocol:
    """The protocol of the command line: a named one, one's own, or one made of -d, -c, -p and the length.

    Raises:
        UserError: the options make none, or more than one.
    """
    named, length = options.protocol or options.protocol_file, options.epochs or options.iterations
    if options.protocol and options.protocol_file:
        raise UserError(f"{options.protocol} and --protocol are two protocols. Give one of them.")
    if named and (options.c or options.p or length):
        raise UserError(
            "a protocol has its own configuration, plans and length: -c, -p, --epochs, --iterations are not for it. "
            "Leave them out, or write a protocol of your own for --protocol."
        )
    dataset = dataset_name(options.d) if options.d else None
    if options.scale and not named:
        raise UserError("--scale is one of a protocol's. Leave it out, or name a protocol.")
    if named:
        protocol = _of_file_or_name(options)
        return replace(protocol, dataset=dataset, name=f"{protocol.name}-{dataset}") if dataset else protocol
    if not (dataset and options.c):
        raise UserError(f"name a protocol ({', '.join(protocols.names())}), or a data set with -d and -c")
    plans, epochs, iterations = options.p or DEFAULT_PLANS, options.epochs or 1000, options.iterations or 250
    name = f"{dataset}-{options.c}-{plans}-{epochs}x{iterations}"
    return Protocol(name, dataset, plans, options.c, epochs, iterations)


def _of_file_or_name(options: argparse.Namespace) -> Protocol:
    scale = options.scale or "cpu"
    if options.protocol_file:
        return Protocol.read(options.protocol_file, scale)
    return Protocol.load(options.protocol, scale)


def chosen_runs(protocol: Protocol, options: argparse.Namespace) -> list[Run]:
    """The runs of the command line, everything prepared for them.

    Raises:
        UserError: the device or a fold is not there, a protocol with a split of its own shall train on another, or the
            runs that are there were made in another setting.
    """
    device = options.device or protocol.device
    if device == "cuda" and not torch.cuda.is_available() and not options.jobs:
        raise UserError("there is no GPU here; -device cpu trains without, or --jobs prints commands for elsewhere")
    folds = protocol.prepare(options.o / "preparation.txt")
    if protocol.split and options.f and set(options.f) != set(folds):
        raise UserError(f"-f: {protocol.name} has a split of its own, which is fold {folds[0]} here")
    output, folds = options.o.resolve(), list(dict.fromkeys(options.f or folds))
    for fold in folds:
        check_setting(protocol, fold, output, device)
    return [
        Run(protocol, trainer, fold, repetition, output, device)
        for repetition in ([options.only] if options.only else range(1, options.repetitions + 1))
        for fold in folds
        for trainer in dict.fromkeys(options.tr)
    ]
