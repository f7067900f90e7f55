"""Where nnU-Net keeps a preprocessed data set, and which cases of it have labels."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

from nnunetv2_selfreg.errors import UserError

FOLDERS = {"nnUNet_raw": nnUNet_raw, "nnUNet_preprocessed": nnUNet_preprocessed}


def dataset_name(name_or_id: str) -> str:
    """The name of a data set that is in nnUNet_raw or nnUNet_preprocessed.

    Args:
        name_or_id: as given to nnU-Net's `-d`: `2` or `Dataset002_Heart`.

    Raises:
        UserError: there is no such data set, or more than one.
    """
    there = sorted(
        {
            folder.name
            for parent in FOLDERS.values()
            if parent.is_set()
            for folder in Path(parent).glob("Dataset*")
            if folder.is_dir()
        }
    )
    if name_or_id in there:
        return name_or_id
    of_number = [name for name in there if name_or_id.isdecimal() and re.match(rf"Dataset0*{int(name_or_id)}_", name)]
    if len(of_number) == 1:
        return of_number[0]
    names = {text.lower(): name for name in there for text in (name, name.partition("_")[2])}  # and without its number
    alike = of_number or [names[text] for text in difflib.get_close_matches(name_or_id.lower(), names, 1, 0.8)]
    if alike:
        raise UserError(f"There is no data set {name_or_id}. Give the whole name: is it {' or '.join(alike)}?")
    folders = ", ".join(f"{name} ({folder.get() or 'not set'})" for name, folder in FOLDERS.items())
    known = f" There are {', '.join(there)}: give the number or the name of one." if there else ""
    raise UserError(f"There is no data set {name_or_id} in {folders}.{known}")


def preprocessed_folder(name_or_id: str) -> Path:
    """The folder of a data set in nnUNet_preprocessed.

    Args:
        name_or_id: as given to nnU-Net's `-d`: `2` or `Dataset002_Heart`.

    Raises:
        UserError: there is no such data set, nnUNet_preprocessed is not set, or nothing has been preprocessed.
    """
    if not nnUNet_preprocessed.is_set():
        raise UserError("nnUNet_preprocessed is not set. Set it to nnU-Net's folder of that name.")
    folder = Path(nnUNet_preprocessed, dataset_name(name_or_id))
    if not (folder / "dataset.json").is_file():
        raise UserError(
            f"{folder} is no preprocessed data set. Run nnUNetv2_plan_and_preprocess for -d {name_or_id} first."
        )
    if not (folder / "gt_segmentations").is_dir():
        raise UserError(f"{folder} has no gt_segmentations. Run nnUNetv2_preprocess for -d {name_or_id}.")
    return folder


def labeled_cases(folder: Path) -> list[str]:
    """Sorted identifiers of the cases with labels, as they were preprocessed into `folder`.

    Raises:
        UserError: there are none.
    """
    labels = label_files(folder)
    if not labels:
        ending = read_json(folder / "dataset.json")["file_ending"]
        raise UserError(
            f"{folder / 'gt_segmentations'} has no {ending} file. Run nnUNetv2_preprocess for {folder.name} again."
        )
    return sorted(labels)


def label_files(folder: Path) -> dict[str, Path]:
    """The labels that nnU-Net copied into a preprocessed data set, by case; none where it has not preprocessed yet."""
    ending = read_json(folder / "dataset.json")["file_ending"]
    files = (folder / "gt_segmentations").glob(f"*{ending}")
    return {file.name.removesuffix(ending): file for file in files}


def read_json(file: Path, remedy: str = "Restore it, or make it again.") -> object:
    """The content of a JSON file.

    Raises:
        UserError: it is not JSON; `remedy` is the advice given then.
    """
    try:
        return load_json(str(file))
    except ValueError as error:  # also of text that is not UTF-8
        raise UserError(f"{file} is not JSON ({error}). {remedy}") from error
