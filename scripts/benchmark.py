"""Trainers against stock nnU-Net: one plan, the same cases and iterations, every run through nnU-Net's own commands.

    python scripts/benchmark.py left-atrium-8 -o runs -tr nnUNetTrainer nnUNetTrainerMeanTeacher --repetitions 3
    python scripts/benchmark.py -d 4 -c 3d_fullres -f 0 1 -o runs -tr nnUNetTrainer nnUNetTrainerSelfReg
    python scripts/benchmark.py left-atrium-8 -o runs -tr nnUNetTrainer --jobs > jobs.txt

A protocol (`scripts/protocols/*.json`) names data set, folds, plan and length; what is missing of plans, preprocessed
cases and folds is made first. Without one, any preprocessed data set will do. Each run has an `nnUNet_results` of its
own and ends with a `metrics.csv` and a `result.json`; the *last* checkpoint is what is validated. Start the command
again after an interruption: finished runs are skipped, the others continue from their last whole checkpoint or begin
anew. `--jobs` prints a command for each unfinished run instead, for SLURM arrays or GNU parallel.
"""

from __future__ import annotations

import argparse
import csv
import errno
import math
import os
import platform
import re
import shlex
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from commands import ExitStatusError, call
from locks import Lock, locked
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from protocol import Protocol, protocol_names
from segmentation_metrics import METRICS, folder_metrics
from tqdm import tqdm

from nnunetv2_selfreg.data.datasets import read_json
from nnunetv2_selfreg.errors import CommandError
from nnunetv2_selfreg.files import replacing

PACKAGES = ("nnunetv2", "nnunetv2-selfreg", "torch", "monai")
FAILURES = (ExitStatusError, CommandError, OSError, ValueError)
# What nnU-Net and torch, which tells only that a write failed, say of it.
FULL_DISK = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")


@dataclass(frozen=True)
class Run:
    """One training of one trainer."""

    protocol: Protocol
    trainer: str
    fold: int
    repetition: int
    output: Path
    device: str

    @property
    def folder(self) -> Path:
        return self.output / self.protocol.name / f"{self.trainer}-fold{self.fold}-{self.repetition}"

    @property
    def finished(self) -> bool:
        """result.json is the last file of a run."""
        return (self.folder / "result.json").is_file()

    def check_setting(self) -> None:
        """Notes the setting of a new run.

        Raises:
            ValueError: the run was begun in another setting, so it cannot stand beside the others, or there is no such
                fold.
        """
        file, setting = self.folder / "setting.json", {**self.protocol.setting(self.fold), "device": self.device}
        if file.is_file():
            before = read_json(file)
            different = [name for name in setting if before.get(name) != setting[name]]
            if different:
                raise ValueError(
                    f"{file} says that this run was begun with other {', '.join(different)}. Take another -o, or "
                    f"remove {self.folder}"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            save_json(setting, part, sort_keys=False)

    @property
    def model(self) -> list[str]:
        """Trainer and plans as nnUNetv2_train takes them."""
        length = f"{self.protocol.epochs}epochs_{self.protocol.iterations}iters"
        return ["-tr", f"{self.trainer}_{length}", "-p", self.protocol.plans]

    @property
    def results(self) -> Path:
        """nnU-Net's folder of the fold."""
        model = f"{self.model[1]}__{self.protocol.plans}__{self.protocol.configuration}"
        return self.folder / "nnUNet_results" / self.protocol.dataset / model / f"fold_{self.fold}"

    @property
    def command(self) -> list[str]:
        training = [self.protocol.dataset, self.protocol.configuration, str(self.fold), *self.model]
        return ["nnUNetv2_train", *training, "-device", self.device]

    def execute(self, on_epoch: Callable[[], object]) -> str | None:
        """Trains, validates and measures. Returns why the run failed for good, that is how it diverged, or None.

        Raises:
            Exception: it failed otherwise, and can be executed again; an OSError tells of a full disk.
        """
        with locked(self.folder / "lock") as lock:
            if self.finished:  # by whoever held the lock
                return None
            remove_broken_checkpoints(self.results)
            try:
                measured = self.train(on_epoch, lock)
                failure = divergence(measured["curves"]["train_losses"])
            except ExitStatusError as error:
                measured, failure = {}, self.reason_to_give_up(str(error))
                if failure is None:
                    raise
            if failure is None:
                self.write_metrics()
            with replacing(self.folder / "result.json") as part:
                save_json({**self.about(), "failure": failure, **measured}, part, sort_keys=False)
            return failure

    def train(self, on_epoch: Callable[[], object], lock: Lock) -> dict:
        """Runs nnUNetv2_train; returns what its checkpoint and its output tell."""
        environment = {**os.environ, "nnUNet_results": str(self.folder / "nnUNet_results")}
        memory = Memory(self.device)

        def start(process: int) -> None:
            lock.works_under_it(process)
            memory.process = process

        def watch(line: str) -> None:
            if "Epoch time:" in line:
                memory.look()
                on_epoch()

        log = self.folder / "log.txt"
        printed = call(*self.command, "--c", log=log, environment=environment, on_start=start, on_line=watch)
        return {
            **self.from_checkpoint(),
            "peak_memory_mib": memory.highest / 2**20 if memory.highest else None,  # None: trained in an earlier call
            "prediction_seconds": prediction_seconds(printed),
        }

    @staticmethod
    def reason_to_give_up(output: str) -> str | None:
        """How the training diverged, if that is why it ended.

        Raises:
            OSError: the disk was full.
        """
        if any(phrase in output for phrase in FULL_DISK):
            raise OSError(errno.ENOSPC, f"No space left on device; {output}")
        lines = [line for line in output.splitlines() if line.startswith("FloatingPointError")]
        return f"it diverged: {lines[-1]}" if lines else None

    def write_metrics(self) -> None:
        references = self.protocol.folder / "gt_segmentations"
        description = load_json(str(self.protocol.folder / "dataset.json"))
        rows = list(folder_metrics(self.results / "validation", references, description))
        with replacing(self.folder / "metrics.csv") as part, open(part, "w", newline="") as file:
            table = csv.DictWriter(file, ["case", "class", *METRICS])
            table.writeheader()
            table.writerows(rows)

    def from_checkpoint(self) -> dict:
        """The size of the network and the learning curves."""
        checkpoint = torch.load(self.results / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        # A decoder holds its encoder, so some tensors have two names.
        tensors = {tensor.data_ptr(): tensor.numel() for tensor in checkpoint["network_weights"].values()}
        curves = {name: [as_plain(value) for value in values] for name, values in checkpoint["logging"].items()}
        return {"parameters": sum(tensors.values()), "curves": curves}

    def about(self) -> dict:
        """What was run, where, and with which versions."""
        return {
            "protocol": self.protocol.name,
            "dataset": self.protocol.dataset,
            "trainer": self.trainer,
            "fold": self.fold,
            "repetition": self.repetition,
            "epochs": self.protocol.epochs,
            "iterations": self.protocol.iterations,
            "validation": str(self.results.relative_to(self.folder) / "validation"),
            "command": shlex.join(self.command),
            "machine": torch.cuda.get_device_name() if self.device == "cuda" else f"{os.cpu_count()} x {cpu()}",
            "versions": {package: version(package) for package in PACKAGES},
        }


class Memory:
    """The most memory that a training took: its process's on a CPU, on a GPU what is in use beyond what was before."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.process = 0
        self.highest = 0
        self._before = self._in_use() if device == "cuda" else 0

    def look(self) -> None:
        """To be called after an epoch: the system remembers a process's peak, and torch keeps what it once took."""
        self.highest = max(self.highest, self._in_use() - self._before)

    def _in_use(self) -> int:
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        status = Path(f"/proc/{self.process}/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None  # Linux only
        return 1024 * int(found[1]) if found else 0


def divergence(losses: list[float]) -> str | None:
    """How a training diverged, if it did: stock nnU-Net trains on with a loss that is not a number. An epoch like that
    from which it recovered does not count."""
    if math.isfinite(losses[-1]):
        return None
    return f"it diverged: the training loss of the last epoch is {losses[-1]}"


def remove_broken_checkpoints(folder: Path) -> None:
    """Stock nnU-Net writes checkpoints in place, so a kill or a full disk may leave half of one."""
    for file in folder.glob("checkpoint_*.pth"):
        if not zipfile.is_zipfile(file):  # whose directory is at its end
            tqdm.write(f"{file} is broken and removed", file=sys.stderr)
            file.unlink()


def prediction_seconds(printed: str) -> float | None:
    """Median time from one validation case to the next in nnU-Net's output; None for a single case."""
    stamps = re.findall(r"^(\S+ [\d:.]+): predicting ", printed, re.MULTILINE)
    times = [datetime.fromisoformat(stamp).timestamp() for stamp in stamps]
    return float(np.median(np.diff(times))) if len(times) > 1 else None


def as_plain(value):
    """A logged value as JSON has it."""
    return [float(v) for v in value] if isinstance(value, (list, tuple, np.ndarray)) else float(value)


def cpu() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def execute(runs: list[Run]) -> int:
    """Executes the runs, all of them even if some fail; the status is 1 then. A full disk ends it at once."""
    failed = 0
    epochs = sum(run.protocol.epochs for run in runs)
    seldom = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 120}  # a line in a log, each
    with tqdm(total=epochs, unit="epoch", **seldom) as progress:
        for run in runs:
            progress.set_description(run.folder.name)
            expected = progress.n + run.protocol.epochs
            try:
                failure = run.execute(progress.update)
            except Exception as error:  # of whatever kind, the other runs go on
                failure = str(error) if isinstance(error, FAILURES) else f"{type(error).__name__}: {error}"
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    tqdm.write(f"{error}\nMake room and start again: finished runs are kept.", file=sys.stderr)
                    return 1
            if failure is not None:
                failed += 1
                tqdm.write(f"{run.folder.name}: {failure}", file=sys.stderr)
            progress.total -= expected - progress.n  # of epochs that an earlier call trained, or that never will be
    return 1 if failed else 0


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
        ValueError: the device or a fold is not there, or a run was begun in another setting.
    """
    device = arguments.device or protocol.device
    if device == "cuda" and not torch.cuda.is_available() and not arguments.jobs:
        raise ValueError("there is no GPU here; -device cpu trains without, or --jobs prints commands for elsewhere")
    folds = protocol.prepare(arguments.o / "preparation.txt")
    runs = [
        Run(protocol, trainer, fold, repetition, arguments.o.resolve(), device)
        for repetition in ([arguments.only] if arguments.only else range(1, arguments.repetitions + 1))
        for fold in dict.fromkeys(arguments.f or folds)
        for trainer in dict.fromkeys(arguments.tr)
    ]
    for run in runs:
        run.check_setting()
    return runs


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
    parser.add_argument("--scale", help="of the protocol: cpu (default), full, published")
    parser.add_argument("--repetitions", type=positive, default=1, metavar="N")
    parser.add_argument("--only", type=positive, metavar="R", help="only repetition R, counted from 1")
    parser.add_argument("-device", choices=["cpu", "cuda"], help="default: cpu at that scale, cuda otherwise")
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
    arguments.o.mkdir(parents=True, exist_ok=True)
    try:
        runs = chosen_runs(chosen_protocol(arguments), arguments)
    except FAILURES as error:
        parser.error(str(error))
    unfinished = [run for run in runs if not run.finished]
    if arguments.jobs:
        print_jobs(unfinished, arguments)
        return 0
    print(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished.")
    return execute(unfinished)


if __name__ == "__main__":
    sys.exit(main())
