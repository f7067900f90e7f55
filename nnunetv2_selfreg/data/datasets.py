"""Where nnU-Net keeps a preprocessed data set, and which cases of it have labels."""

from __future__ import annotations

from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_selfreg.errors import UserError


def preprocessed_folder(name_or_id: str) -> Path:
    """The folder of a data set in nnUNet_preprocessed.

    Args:
        name_or_id: as given to nnU-Net's `-d`: `2` or `Dataset002_Heart`.

    Raises:
        UserError: there is no such data set, nnUNet_preprocessed is not set, or nothing has been preprocessed.
    """
    try:
        folder = Path(nnUNet_preprocessed, maybe_convert_to_dataset_name(name_or_id))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"-d {name_or_id}: {error}") from error
    if not (folder / "dataset.json").is_file() or not (folder / "gt_segmentations").is_dir():
        raise UserError(
            f"{folder} is no preprocessed data set. Run nnUNetv2_plan_and_preprocess for -d {name_or_id} first."
        )
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
