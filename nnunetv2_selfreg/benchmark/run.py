"""One training of one trainer in a benchmark: its folder, its command, and what is kept of it."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from tqdm import tqdm

from nnunetv2_selfreg import __version__
from nnunetv2_selfreg.benchmark.commands import ExitStatusError, call
from nnunetv2_selfreg.benchmark.locks import Lock, locked
from nnunetv2_selfreg.benchmark.machine import commit, gpu_memory_in_use, machine
from nnunetv2_selfreg.benchmark.metrics import folder_metrics
from nnunetv2_selfreg.benchmark.protocol import Protocol
from nnunetv2_selfreg.data.datasets import read_json
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import is_full, replacing, says_full_disk

PACKAGES = ("nnunetv2", "torch", "monai")
# What a user may set that changes a training's time or its sequence of random numbers.
ENVIRONMENT = ("nnUNet_n_proc_DA", "nnUNet_compile", "PYTHON_CPU_COUNT", "OMP_NUM_THREADS")


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

    def execute(self, on_epoch: Callable[[int], object]) -> str | None:
        """Trains, validates and measures. Returns why the run failed for good, that is how it diverged, or None.

        Args:
            on_epoch: is given, after each epoch, how many are left. An earlier call may have trained some.

        Raises:
            Exception: it failed otherwise, and can be executed again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock") as lock:
            if self.finished:  # by whoever held the lock
                return None
            remove_broken_checkpoints(self.results)
            try:
                measured = self.train(on_epoch, lock)
                failure = divergence(measured["curves"]["train_losses"])
            except ExitStatusError as error:
                measured, failure = {}, reported_divergence(error.printed)
                if failure is None:
                    raise
            if failure is None:
                self.write_metrics()
            with replacing(self.folder / "result.json") as part:
                save_json({**self.about(), "failure": failure, **measured}, part, sort_keys=False)
            return failure

    def train(self, on_epoch: Callable[[int], object], lock: Lock) -> dict:
        """Runs nnUNetv2_train; returns what its checkpoint and its output tell."""
        environment = {**os.environ, "nnUNet_results": str(self.folder / "nnUNet_results")}
        memory = Memory(self.device)
        epoch = 0

        def start(process: int) -> None:
            lock.works_under_it(process)
            memory.process = process

        def watch(line: str) -> None:
            nonlocal epoch
            epoch = begun_epoch(line, epoch)
            if "Epoch time:" in line:
                memory.look()
                on_epoch(self.protocol.epochs - 1 - epoch)

        log = self.folder / "log.txt"
        printed = call(*self.command, "--c", log=log, environment=environment, on_start=start, on_line=watch)
        return {
            **self.from_checkpoint(),
            "peak_memory_mib": memory.highest / 2**20 or None,  # trained in an earlier call, or nobody told
            "prediction_seconds": prediction_seconds(printed),
        }

    def write_metrics(self) -> None:
        references = self.protocol.folder / "gt_segmentations"
        description = load_json(str(self.protocol.folder / "dataset.json"))
        rows = list(folder_metrics(self.results / "validation", references, description))
        with replacing(self.folder / "metrics.csv") as part:
            pd.DataFrame(rows).to_csv(part, index=False)

    def from_checkpoint(self) -> dict:
        """The size of the network and all learning curves."""
        checkpoint = torch.load(self.results / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        # A decoder holds its encoder, so some tensors have two names; indices and counters are no parameters.
        weights = [tensor for tensor in checkpoint["network_weights"].values() if tensor.is_floating_point()]
        tensors = {tensor.data_ptr(): tensor.numel() for tensor in weights}
        curves = {name: np.round(values, 7).tolist() for name, values in checkpoint["logging"].items()}
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
            "machine": machine(self.device),
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                "nnunetv2-selfreg": __version__,
                **{package: version(package) for package in PACKAGES},
            },
        }


def check_setting(protocol: Protocol, fold: int, output: Path, device: str) -> None:
    """Notes the setting of the first run of a fold, which all others must share.

    Raises:
        UserError: these would be made in another setting, so they could not stand beside the others, or there is no
            such fold.
    """
    file = output / protocol.name / f"setting-fold{fold}.json"
    setting = {**protocol.setting(fold), "device": device}
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_suffix(".lock")):  # the jobs of an array begin at once
        if not file.is_file():
            with replacing(file) as part:
                save_json(setting, part, sort_keys=False)
    before = read_json(file)
    different = [name for name in setting if before.get(name) != setting[name]]
    if different:
        raise UserError(
            f"{file} says that the runs beside it were made with other {', '.join(different)}. Take another -o, or "
            f"remove {file.parent}"
        )


class Memory:
    """The most memory that a training took: its process's on a CPU, on a GPU what is in use beyond what was before."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.process = 0
        self.highest = 0
        self._before = self._in_use() if device == "cuda" else 0

    def look(self) -> None:
        """To be called after an epoch: the system remembers a process's peak, and torch keeps what it once took."""
        now = self._in_use()
        if now is not None and self._before is not None:
            self.highest = max(self.highest, now - self._before)

    def _in_use(self) -> int | None:
        if self.device == "cuda":
            return gpu_memory_in_use()
        status = Path(f"/proc/{self.process}/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None  # Linux only
        return 1024 * int(found[1]) if found else 0


def begun_epoch(line: str, before: int) -> int:
    """The number of the epoch, from 0, that this line of nnU-Net's output begins; the one before if it begins none."""
    found = re.search(r": Epoch (\d+)\s*$", line)
    return int(found[1]) if found else before


def divergence(losses: list[float]) -> str | None:
    """How a training diverged, if it did: stock nnU-Net trains on with a loss that is not a number. An epoch like that
    from which it recovered does not count."""
    if math.isfinite(losses[-1]):
        return None
    return f"it diverged: the training loss of the last epoch is {losses[-1]}"


def reported_divergence(output: str) -> str | None:
    """How one of our trainings, which end at a loss that is not a number, says that it diverged, if it does."""
    found = re.findall(r"Training stopped in epoch \d+: .*", output)
    return f"it diverged: {found[-1]}" if found else None


def is_full_disk(error: Exception, folder: Path) -> bool:
    """Whether `folder` has no room, for this process or for a command that it called and whose output is in there: what
    the command said of it may not have had room either."""
    said = error.printed if isinstance(error, ExitStatusError) else str(error)
    return says_full_disk(said) or is_full(folder, error)


def remove_broken_checkpoints(folder: Path) -> None:
    """Stock nnU-Net writes checkpoints in place, so a kill or a full disk may leave half of one. Without a latest one
    it would go on from the best one, which was chosen on the validation cases, so that is removed too."""
    for file in folder.glob("checkpoint_*.pth"):
        if not zipfile.is_zipfile(file):  # whose directory is at its end
            tqdm.write(f"{file} is broken and removed", file=sys.stderr)
            file.unlink()
    if not any((folder / f"checkpoint_{name}.pth").is_file() for name in ("final", "latest")):
        (folder / "checkpoint_best.pth").unlink(missing_ok=True)


def prediction_seconds(printed: str) -> float | None:
    """Median time from one validation case to the next in nnU-Net's output; None for a single case."""
    stamps = re.findall(r"^(\S+ [\d:.]+): predicting ", printed, re.MULTILINE)
    times = [datetime.fromisoformat(stamp).timestamp() for stamp in stamps]
    return float(np.median(np.diff(times))) if len(times) > 1 else None
