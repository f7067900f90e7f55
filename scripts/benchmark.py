"""Trainers against stock nnU-Net: one plan, the same cases and iterations, every run through nnU-Net's own commands.

    python scripts/benchmark.py left-atrium-8 -o runs -tr nnUNetTrainer nnUNetTrainerMeanTeacher --repetitions 3
    python scripts/benchmark.py left-atrium-8 -o runs -tr nnUNetTrainer --jobs > jobs.txt

A protocol (`scripts/protocols/*.json`) names data set, folds, plan and length. What is missing of plans, preprocessed
cases and folds is made first. Each run has an `nnUNet_results` of its own and ends with a `result.json` and a
`metrics.csv` beside it; the *last* checkpoint is what is validated. Start it again after an interruption: finished runs
are skipped, the others continue from their last checkpoint or begin anew. `--jobs` prints a command for each unfinished
run instead, for SLURM arrays or GNU parallel.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shlex
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from segmentation_metrics import METRICS, folder_metrics
from tqdm import tqdm

from nnunetv2_selfreg.data.datasets import labeled_cases
from nnunetv2_selfreg.data.splits import append_fold, new_fold, read_splits
from nnunetv2_selfreg.files import replacing

PROTOCOLS = Path(__file__).resolve().parent / "protocols"
PACKAGES = ("nnunetv2", "nnunetv2-selfreg", "torch", "monai")


@dataclass(frozen=True)
class Protocol:
    """What all trainers have in common, at one scale."""

    name: str
    dataset: str
    plans: str
    configuration: str
    epochs: int
    iterations: int
    inherits_from: str
    batch_size: int
    features_per_stage: list[int]
    spacing: list[float] | None = None
    folds: list[int] | None = None
    split: dict | None = None

    @classmethod
    def load(cls, name: str, scale: str) -> Protocol:
        """The protocol of a name.

        Raises:
            ValueError: there is none, or not of that scale; the message lists what there is.
        """
        file = PROTOCOLS / f"{name}.json"
        if not file.is_file():
            raise ValueError(f"there is no protocol {name}; there are {', '.join(sorted(protocol_names()))}")
        content = load_json(str(file))
        scales = content.pop("scales")
        if scale not in scales:
            raise ValueError(f"protocol {name} has no scale {scale}; it has {', '.join(scales)}")
        return cls(name=f"{name}-{scale}", **content, **scales[scale])

    @property
    def folder(self) -> Path:
        """The preprocessed data set."""
        return Path(os.environ["nnUNet_preprocessed"]) / self.dataset

    def prepare(self) -> list[int]:
        """Makes what is missing of plans, configuration, preprocessed cases and folds; returns the folds."""
        if not (self.folder / "dataset_fingerprint.json").is_file():
            call("nnUNetv2_extract_fingerprint", "-d", self.dataset)
        plans = self.folder / f"{self.plans}.json"
        if not plans.is_file():
            spacing = ["-overwrite_target_spacing", *map(str, self.spacing)] if self.spacing else []
            call("nnUNetv2_plan_experiment", "-d", self.dataset, *spacing, "-overwrite_plans_name", self.plans)
        content = load_json(str(plans))
        if self.configuration not in content["configurations"]:
            content["configurations"][self.configuration] = self.small(content["configurations"])
            with replacing(plans) as part:
                save_json(content, part, sort_keys=False)
        if not (self.folder / content["configurations"][self.inherits_from]["data_identifier"]).is_dir():
            call("nnUNetv2_preprocess", "-d", self.dataset, "-plans_name", self.plans, "-c", self.inherits_from)
        return self.folds if self.split is None else [self.fold()]

    def small(self, configurations: dict) -> dict:
        """The planned network with other widths, in batches of another size."""
        architecture = deepcopy(configurations[self.inherits_from]["architecture"])
        architecture["arch_kwargs"]["features_per_stage"] = self.features_per_stage
        return {"inherits_from": self.inherits_from, "batch_size": self.batch_size, "architecture": architecture}

    def fold(self) -> int:
        """The number of the protocol's split in splits_final.json, to which it is appended if it is not there."""
        wanted = new_fold(labeled_cases(self.folder), **self.split)
        file = self.folder / "splits_final.json"
        splits = read_splits(file) if file.is_file() else []
        return splits.index(wanted) if wanted in splits else append_fold(self.dataset, **self.split)[0]


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

    def execute(self) -> None:
        """Trains, validates and measures."""
        training = [self.protocol.dataset, self.protocol.configuration, str(self.fold), *self.model]
        command = ["nnUNetv2_train", *training, "-device", self.device]
        self.folder.mkdir(parents=True, exist_ok=True)
        call(*command, "--c", log=self.folder / "log.txt", nnUNet_results=str(self.folder / "nnUNet_results"))
        rows = list(
            folder_metrics(
                self.results / "validation",
                self.protocol.folder / "gt_segmentations",
                load_json(str(self.protocol.folder / "dataset.json")),
            )
        )
        with replacing(self.folder / "metrics.csv") as part, open(part, "w", newline="") as file:
            table = csv.DictWriter(file, ["case", "class", *METRICS])
            table.writeheader()
            table.writerows(rows)
        with replacing(self.folder / "result.json") as part:
            save_json({**self.about(), "command": shlex.join(command)}, part, sort_keys=False)

    def about(self) -> dict:
        """What else the report needs: the learning curves, the size of the network, the machine, the versions."""
        checkpoint = torch.load(self.results / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        tensors = {tensor.data_ptr(): tensor.numel() for tensor in checkpoint["network_weights"].values()}
        return {
            "protocol": self.protocol.name,
            "trainer": self.trainer,
            "fold": self.fold,
            "repetition": self.repetition,
            "parameters": sum(tensors.values()),
            "curves": {name: list(map(_plain, values)) for name, values in checkpoint["logging"].items()},
            "machine": torch.cuda.get_device_name() if self.device == "cuda" else f"{os.cpu_count()} cores, {cpu()}",
            "versions": {package: version(package) for package in PACKAGES},
        }


def _plain(value):
    """A logged value as JSON has it."""
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else float(value)


def cpu() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def call(*command: str, log: Path | None = None, **environment: str) -> None:
    """Runs a command of this environment.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    program = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{shlex.join(command)} failed with status {done.returncode}:\n{end}")


def protocol_names() -> list[str]:
    return [file.stem for file in PROTOCOLS.glob("*.json")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", help=", ".join(sorted(protocol_names())))
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="of all runs")
    parser.add_argument("-tr", nargs="+", default=["nnUNetTrainer"], metavar="TRAINER")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("-f", type=int, nargs="+", metavar="FOLD", help="only these; default: the protocol's")
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--repetitions", type=int, default=1, metavar="N")
    parser.add_argument("--only", type=int, metavar="R", help="only repetition R, counted from 1")
    parser.add_argument("--jobs", action="store_true", help="print a command for each unfinished run")
    arguments = parser.parse_args()
    try:
        protocol = Protocol.load(arguments.protocol, arguments.scale)
    except ValueError as error:
        parser.error(str(error))
    folds = protocol.prepare()
    repetitions = [arguments.only] if arguments.only else range(1, arguments.repetitions + 1)
    runs = [
        Run(protocol, trainer, fold, repetition, arguments.o.resolve(), arguments.device)
        for fold in arguments.f or folds
        for repetition in repetitions
        for trainer in arguments.tr
    ]
    unfinished = [run for run in runs if not run.finished]
    if not arguments.jobs:
        print(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished.")
        return execute(unfinished)
    for run in unfinished:
        this = ["-tr", run.trainer, "-f", run.fold, "--only", run.repetition, "--scale", arguments.scale]
        command = [
            "python",
            "scripts/benchmark.py",
            arguments.protocol,
            "-o",
            arguments.o,
            "-device",
            run.device,
            *this,
        ]
        print(shlex.join(map(str, command)))
    return 0


def execute(runs: list[Run]) -> int:
    """Executes the runs, all of them even if some fail; status 1 then."""
    failed = 0
    for run in tqdm(runs, unit="run", disable=None):
        try:
            run.execute()
        except RuntimeError as error:
            failed += 1
            tqdm.write(f"{run.folder.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
