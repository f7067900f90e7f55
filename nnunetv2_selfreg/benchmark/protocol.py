"""What all trainers of a benchmark have in common: data set, folds, plan and length."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_selfreg.benchmark import protocols
from nnunetv2_selfreg.benchmark.commands import add_configuration, call
from nnunetv2_selfreg.benchmark.locks import Lock, locked
from nnunetv2_selfreg.data.datasets import label_files, labeled_cases, read_json
from nnunetv2_selfreg.data.splits import append_fold, folds_of, new_fold
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import replacing

DEFAULT_PLANS = "nnUNetPlans"
REQUIRED = ("dataset", "plans", "configuration", "epochs", "iterations")
OF_CASES = ("folds", "split")  # of which a protocol has one
DEVICES = ("cpu", "cuda")
OF_A_SPLIT = ("labeled", "val", "seed", "in_order")
AS_JSON = {str: "a string", int: "a whole number from 1", list: "a list in brackets", dict: "an object in braces"}


@dataclass(frozen=True)
class Protocol:
    """A data set with folds, and at one scale the plan and the length.

    Without `base` the plans have the configuration already; with it, the configuration is derived from `base` by
    `settings` (of the configuration) and `architecture` (arguments of the network). `split` is a fold as
    `nnUNetv2_selfreg split` makes it, in the place of `folds`. Names and types are those of a protocol's file.
    """

    name: str
    dataset: str
    plans: str
    configuration: str
    epochs: int
    iterations: int
    device: str = "cuda"
    folds: list = field(default_factory=list)
    split: dict = field(default_factory=dict)
    spacing: list = field(default_factory=list)
    base: str = ""
    settings: dict = field(default_factory=dict)
    architecture: dict = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, scale: str) -> Protocol:
        """The protocol of a name that comes with the package.

        Raises:
            UserError: there is none, or not of that scale; the message lists what there is.
        """
        return cls.read(_file_of(name), scale)

    @classmethod
    def read(cls, file: Path, scale: str) -> Protocol:
        """The protocol that a file describes.

        Raises:
            UserError: there is no such file or scale, or the file says what no protocol says.
        """
        content = _content(file)
        scales = content.pop("scales", {})
        if not scales:
            raise UserError(
                f"{file} has no 'scales', an object with one for each size of the trainings. Add it, or name a "
                "protocol that has it with 'inherits_from'."
            )
        merged = {**content, **_of_scale(scales, scale, file)}
        _check(merged, f"{file}, scale {scale}")
        return cls(name=f"{file.stem}-{scale}", **merged)

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
            UserError: neither the raw nor the preprocessed data set is there, the plans have another configuration of
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
            return [self._fold(folds)] if self.split else self.folds or [0]

    def _plan(self, log: Path, lock: Lock) -> None:
        def nnunet(command: str, *options: str) -> None:
            number = str(int(self.dataset[7:10]))  # nnU-Net's commands before the training take no names
            print(f"{command} of {self.dataset}: see {log}", file=sys.stderr)
            call(command, "-d", number, *options, log=log, on_start=lock.works_under_it)

        if not _is_whole(self.folder / "dataset_fingerprint.json"):
            nnunet("nnUNetv2_extract_fingerprint")
        plans = self.folder / f"{self.plans}.json"
        if not _is_whole(plans):
            if self.plans != DEFAULT_PLANS and not self.spacing:  # nobody knows with which planner
                raise UserError(f"{plans} does not exist. Run nnUNetv2_plan_experiment, or take other plans.")
            spacing = ["-overwrite_target_spacing", *map(str, self.spacing)] if self.spacing else []
            nnunet("nnUNetv2_plan_experiment", *spacing, "-overwrite_plans_name", self.plans)
        base = self.base or self.configuration
        if base not in (configurations := read_json(plans)["configurations"]):
            raise UserError(
                f"{plans} has no configuration {base}; it has {', '.join(configurations)}. Name one of these."
            )
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
            raise UserError(
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
                raise UserError(f"the environment variable {name} is not set. Set it to nnU-Net's folder of that name.")
        if not self.raw.is_dir() and not self.folder.is_dir():
            raise UserError(f"{self.raw} does not exist: put the raw data set there, in nnU-Net's format")

    def _raw_labels(self) -> dict[str, Path]:
        """The label files of the raw data set; none where that is not at hand."""
        cases = get_filenames_of_train_images_and_targets(str(self.raw)) if self.raw.is_dir() else {}
        return {case: Path(files["label"]) for case, files in cases.items()}

    def setting(self, fold: int) -> dict:
        """What decides about a run's result besides the trainer, the same for all trainers.

        Raises:
            UserError: there is no such fold.
        """
        planned, folds = self._planned(), folds_of(self.folder)
        if not 0 <= fold < len(folds):
            raise UserError(f"{self.folder / 'splits_final.json'} has no fold {fold}; it has 0 to {len(folds) - 1}")
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


def _file_of(name: str) -> Path:
    if name not in protocols.names():
        names = ", ".join(protocols.names())
        raise UserError(f"there is no protocol {name}; there are {names}. Name one, or give a file with --protocol.")
    return protocols.FOLDER / f"{name}.json"


def _content(file: Path) -> dict:
    """What a protocol's file says; where `inherits_from` names another protocol, what it says itself counts, and its
    scales stand beside the other's."""
    if not file.is_file():
        raise UserError(f"{file} is no file. Give the path of a protocol, a JSON file.")
    content = read_json(file, "Mend it.")
    scales = content.get("scales", {}) if isinstance(content, dict) else None
    if not isinstance(scales, dict) or not all(isinstance(scale, dict) for scale in scales.values()):
        raise UserError(f"{file}: a protocol, its 'scales' and each of these are JSON objects. Write them in braces.")
    if "inherits_from" not in content:
        return content
    try:
        inherited = _content(_file_of(content.pop("inherits_from")))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if content.keys() & OF_CASES:  # in the place of the other's
        inherited = {name: value for name, value in inherited.items() if name not in OF_CASES}
    return {**inherited, **content, "scales": {**inherited.get("scales", {}), **scales}}


def _of_scale(scales: dict[str, dict], name: str, file: Path) -> dict:
    """What a scale says, and what it inherits from another one."""
    if not isinstance(name, str) or name not in scales:
        raise UserError(f"{file} has no scale {name}; it has {', '.join(scales)}. Name one of these.")
    others = {**scales}
    own = {**others.pop(name)}
    if "inherits_from" not in own:
        return own
    return {**_of_scale(others, own.pop("inherits_from"), file), **own}


def _check(content: dict, where: str) -> None:
    """Refuses, with a UserError, what is missing, unknown, of another type or without a meaning in a protocol."""
    types = get_type_hints(Protocol)
    del types["name"]
    _check_names(content, types, REQUIRED, where)
    for name, value in content.items():
        if not isinstance(value, types[name]) or isinstance(value, bool) or (types[name] is int and value < 1):
            raise UserError(f"{where}: {name} is {value!r}. Give {AS_JSON[types[name]]}.")
    if not re.fullmatch(r"Dataset\d{3}_.+", content["dataset"]):
        raise UserError(f"{where}: dataset is {content['dataset']!r}. Write its whole name, as Dataset004_Hippocampus.")
    if content.get("device", "cpu") not in DEVICES:
        raise UserError(f"{where}: device is {content['device']!r}. Give {' or '.join(DEVICES)}.")
    useless = [name for name in ("settings", "architecture") if content.get(name) and not content.get("base")]
    if useless:
        raise UserError(f"{where}: {' and '.join(useless)} would change nothing. Name a configuration as 'base'.")
    _check_cases(content.get("folds", []), content.get("split", {}), where)


def _check_cases(folds: list, split: dict, where: str) -> None:
    if folds and split:
        raise UserError(f"{where}: folds and split exclude each other. Leave one of them out.")
    if split:
        _check_names(split, OF_A_SPLIT, OF_A_SPLIT[:1], f"{where}, split")
    for number in folds:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UserError(f"{where}: {number!r} in folds is no number of a fold. Give whole ones from 0.")
    for number in split.values():
        if not isinstance(number, int | float):
            raise UserError(f"{where}: {number!r} in split is no number. Give one.")


def _check_names(content: Iterable[str], known: Iterable[str], required: Iterable[str], where: str) -> None:
    if unknown := [name for name in content if name not in known]:
        raise UserError(f"{where}: unknown are {', '.join(unknown)}. Known are {', '.join(known)}.")
    if lacking := [name for name in required if name not in content]:
        raise UserError(f"{where} lacks {', '.join(lacking)}. Add what is missing.")
