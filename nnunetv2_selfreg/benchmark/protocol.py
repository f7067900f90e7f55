"""What all trainers of a benchmark have in common: data set, folds, plan and length."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_selfreg.benchmark.commands import add_configuration, call
from nnunetv2_selfreg.benchmark.locks import Lock, locked
from nnunetv2_selfreg.data.datasets import label_files, labeled_cases, read_json
from nnunetv2_selfreg.data.splits import append_fold, folds_of, new_fold
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import replacing

PROTOCOLS = Path(__file__).resolve().parent / "protocols"


@dataclass(frozen=True)
class Protocol:
    """A data set with folds, and at one scale the plan and the length.

    Without `base` the plans have the configuration already; with it, the configuration is derived from `base` by
    `settings` (of the configuration) and `architecture` (arguments of the network). `split` is a fold as
    `nnunetv2_selfreg split` makes it, in the place of `folds`.
    """

    name: str
    dataset: str
    plans: str
    configuration: str
    epochs: int
    iterations: int
    device: str = "cuda"
    folds: list[int] = field(default_factory=list)
    split: dict | None = None
    spacing: list[float] | None = None
    base: str | None = None
    settings: dict = field(default_factory=dict)
    architecture: dict = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, scale: str) -> Protocol:
        """The protocol of a name.

        Raises:
            ValueError: there is none, or not of that scale; the message lists what there is.
        """
        if name not in protocol_names():
            raise ValueError(f"there is no protocol {name}; there are {', '.join(protocol_names())}")
        content = _read(name)
        scales = content.pop("scales")
        if scale not in scales:
            raise ValueError(f"protocol {name} has no scale {scale}; it has {', '.join(scales)}")
        of_scale = scales[scale]
        inherited = scales[of_scale.pop("inherits_from")] if "inherits_from" in of_scale else {}
        return cls(name=f"{name}-{scale}", **content, **{**inherited, **of_scale})

    @property
    def folder(self) -> Path:
        """The preprocessed data set."""
        return Path(os.environ["nnUNet_preprocessed"]) / self.dataset

    @property
    def raw(self) -> Path:
        """The raw data set."""
        return Path(os.environ["nnUNet_raw"]) / self.dataset

    def prepare(self, log: Path) -> list[int]:
        """Makes what is missing of plans, configuration, preprocessed cases and folds; returns the folds.

        Raises:
            ValueError: neither the raw nor the preprocessed data set is there, the plans have another configuration of
                that name, or a preprocessed folder lacks cases that nobody was making.
            ExitStatusError: one of nnU-Net's commands failed.
        """
        self._require_data_set()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.with_name(f"{self.dataset}.lock")) as lock:  # another protocol may need the same files
            self._plan(log, lock)
            folds, file = folds_of(self.folder), self.folder / "splits_final.json"
            if not file.is_file():  # else the first training would write it, and change its own setting
                with replacing(file) as part:
                    save_json(folds, part)
            return self.folds if self.split is None else [self._fold(folds)]

    def _plan(self, log: Path, lock: Lock) -> None:
        def nnunet(command: str, *options: str) -> None:
            number = str(int(self.dataset[7:10]))  # nnU-Net's commands before the training take no names
            print(f"{command} of {self.dataset}: see {log}", file=sys.stderr)
            call(command, "-d", number, *options, log=log, on_start=lock.works_under_it)

        if not _is_whole(self.folder / "dataset_fingerprint.json"):
            nnunet("nnUNetv2_extract_fingerprint")
        plans = self.folder / f"{self.plans}.json"
        if not _is_whole(plans):
            spacing = ["-overwrite_target_spacing", *map(str, self.spacing)] if self.spacing else []
            nnunet("nnUNetv2_plan_experiment", *spacing, "-overwrite_plans_name", self.plans)
        base = self.base or self.configuration
        if base not in (configurations := read_json(plans)["configurations"]):
            raise ValueError(f"{plans} has no configuration {base}; it has {', '.join(configurations)}")
        if self.base:
            add_configuration(plans, self.configuration, self.base, self.settings, self.architecture)
        self._preprocess(base, nnunet)

    def _preprocess(self, configuration: str, nnunet: Callable[..., None]) -> None:
        """Preprocesses unless all cases are there, each with an image and a whole label: an interruption or a full disk
        leaves others."""
        raw, labels = self._raw_labels(), label_files(self.folder)
        half = {case for case in labels.keys() & raw if labels[case].stat().st_size != raw[case].stat().st_size}
        folder = self.folder / self._planned().data_identifier
        there = {file.stem for file in folder.glob("*.pkl")} & labels.keys()
        unfinished = sorted((labels.keys() | raw.keys()) - (there - half))
        begun = self.folder / f"{folder.name}.preprocessing"
        if not unfinished and not begun.is_file():  # of one that was begun, any file may be half
            return
        if folder.is_dir() and not begun.is_file():  # nnU-Net deletes it first, and it may be in use
            raise ValueError(
                f"{folder} or gt_segmentations beside it lacks {', '.join(unfinished[:3])} (of {len(unfinished)}). Run "
                f"nnUNetv2_preprocess, which makes that folder anew, or take them out of {self.raw}"
            )
        begun.touch()
        for case in half:  # nnU-Net would keep the label, since it is newer than the raw one
            labels[case].unlink()
        nnunet("nnUNetv2_preprocess", "-plans_name", self.plans, "-c", configuration)
        begun.unlink()

    def _require_data_set(self) -> None:
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            if name not in os.environ:
                raise ValueError(f"the environment variable {name} is not set")
        if not self.raw.is_dir() and not self.folder.is_dir():
            raise ValueError(f"{self.raw} does not exist: put the raw data set there, in nnU-Net's format")

    def _raw_labels(self) -> dict[str, Path]:
        """The label files of the raw data set; none where that is not at hand."""
        cases = get_filenames_of_train_images_and_targets(str(self.raw)) if self.raw.is_dir() else {}
        return {case: Path(files["label"]) for case, files in cases.items()}

    def setting(self, fold: int) -> dict:
        """What decides about a run's result besides the trainer, the same for all trainers.

        Raises:
            ValueError: there is no such fold.
        """
        planned, folds = self._planned(), folds_of(self.folder)
        if not 0 <= fold < len(folds):
            raise ValueError(f"{self.folder / 'splits_final.json'} has no fold {fold}; it has 0 to {len(folds) - 1}")
        return {
            "dataset": self.dataset,
            "epochs": self.epochs,
            "iterations": self.iterations,
            "configuration": planned.configuration,
            "cases": folds[fold],
            "unlabeled": sorted(file.stem for file in self.folder.glob(f"{planned.data_identifier}_unlabeled/*.pkl")),
        }

    def _planned(self) -> ConfigurationManager:
        """The configuration with what it inherits."""
        return PlansManager(str(self.folder / f"{self.plans}.json")).get_configuration(self.configuration)

    def _fold(self, folds: list[dict]) -> int:
        """The number of the protocol's split in splits_final.json, to which it is appended if it is not there."""
        wanted = new_fold(labeled_cases(self.folder), **self.split)
        return folds.index(wanted) if wanted in folds else append_fold(self.dataset, **self.split)[0]


def _is_whole(file: Path) -> bool:
    """Whether it is there; the half JSON file that an interruption leaves is removed, since nnU-Net would take it."""
    if not file.is_file():
        return False
    try:
        read_json(file)
    except UserError:
        file.unlink()
        return False
    return True


def _read(name: str) -> dict:
    """A protocol's file; where `inherits_from` names another, what it says itself counts."""
    content = load_json(str(PROTOCOLS / f"{name}.json"))
    if "inherits_from" not in content:
        return content
    return {**_read(content.pop("inherits_from")), **content}


def scales_of(name: str) -> list[str]:
    """The scales that a protocol's file has."""
    return list(_read(name)["scales"])


def protocol_names() -> list[str]:
    return sorted(file.stem for file in PROTOCOLS.glob("*.json"))
