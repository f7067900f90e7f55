"""Folds with few labels: `train` (the labelled few), `unlabeled` and `val`, beside nnU-Net's own in splits_final.json.

nnU-Net reads `train` and `val` and ignores `unlabeled`, so stock nnU-Net on such a fold is the labelled-only baseline.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_selfreg.data.datasets import labeled_cases, preprocessed_folder, read_json
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import replacing

Fold = dict[str, list[str]]
_NNUNETS_FOLDS = 5
_REMEDY = "It is left as it is: restore it, or move it away, and nnU-Net's five folds are made anew."


def append_fold(
    dataset: str, labeled: int | float, val: int | float = 0.2, seed: int = 0, in_order: bool = False
) -> tuple[int, Fold]:
    """Appends a fold to the data set's splits_final.json; the folds that are there stay as they are.

    Where the file does not exist yet, nnU-Net's own five folds are made first. The file is replaced in one step.

    Args:
        dataset: as given to nnU-Net's `-d`.
        labeled: how many cases are labelled, as in `new_fold`.
        val: how many cases validate, as in `new_fold`.
        seed: of the shuffle.
        in_order: in the order of their names instead of shuffled.

    Returns:
        Number and content of the new fold.

    Raises:
        UserError: the data set is not preprocessed, a size is impossible, or the file is corrupt. Nothing is
            written then.
    """
    folder = preprocessed_folder(dataset)
    cases = labeled_cases(folder)
    try:
        fold = new_fold(cases, labeled, val, seed, in_order)
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from error
    splits = folds_of(folder)
    with replacing(folder / "splits_final.json") as part:
        save_json([*splits, fold], part)
    return len(splits), fold


def new_fold(
    cases: Sequence[str], labeled: int | float, val: int | float = 0.2, seed: int = 0, in_order: bool = False
) -> Fold:
    """Divides cases into `train`, `unlabeled` and `val`, each sorted.

    The first are labelled, the last validate, those between are unlabelled. So as `labeled` grows, the validation cases
    stay the same and the labelled ones get company.

    Args:
        cases: identifiers, in any order.
        labeled: how many are labelled; a float is a fraction of the cases, rounded, at least one case.
        val: how many validate, likewise.
        seed: of the shuffle.
        in_order: in the order of their names instead of shuffled.

    Raises:
        UserError: a size that the cases do not allow.
    """
    n_labeled = _how_many("--labeled", labeled, len(cases))
    n_val = _how_many("--val", val, len(cases))
    if n_labeled + n_val > len(cases):
        raise UserError(
            f"--labeled {labeled} and --val {val} are {n_labeled} + {n_val} cases, but there are only {len(cases)}. "
            "Give smaller numbers."
        )
    ordered = sorted(cases)
    if not in_order:
        random.Random(seed).shuffle(ordered)
    first_val = len(ordered) - n_val
    return {
        "train": sorted(ordered[:n_labeled]),
        "unlabeled": sorted(ordered[n_labeled:first_val]),
        "val": sorted(ordered[first_val:]),
    }


def folds_of(folder: Path) -> list[Fold]:
    """The folds in a preprocessed data set's splits_final.json; without one, those that nnU-Net would write there.

    Raises:
        UserError: the file is corrupt, see `read_splits`, or there is none and too few cases for nnU-Net's five.
    """
    file, cases = folder / "splits_final.json", labeled_cases(folder)
    if file.exists():
        return read_splits(file)
    if len(cases) < _NNUNETS_FOLDS:
        raise UserError(
            f"{file} does not exist, and {len(cases)} cases are too few for nnU-Net's five folds. "
            'Write the file yourself; "[]" is enough.'
        )
    return generate_crossval_split(cases, seed=12345, n_splits=_NNUNETS_FOLDS)


def read_splits(file: Path) -> list[Fold]:
    """The folds of a splits_final.json.

    Raises:
        UserError: it is not a list of folds with `train` and `val`, or an `unlabeled` is not a list of names.
    """
    splits = read_json(file, _REMEDY)
    if not isinstance(splits, list):
        raise UserError(f"{file} is not a list of folds. {_REMEDY}")
    for number, fold in enumerate(splits):
        if not (isinstance(fold, dict) and all(isinstance(fold.get(part), list) for part in ("train", "val"))):
            raise UserError(f"{file}: fold {number} has no lists 'train' and 'val'. {_REMEDY}")
        unlabeled = fold.get("unlabeled", [])
        if not (isinstance(unlabeled, list) and all(isinstance(case, str) for case in unlabeled)):
            raise UserError(f"{file}: 'unlabeled' of fold {number} is not a list of identifiers. {_REMEDY}")
    return splits


def _how_many(option: str, amount: int | float, cases: int) -> int:
    if isinstance(amount, float):
        if not 0 < amount < 1:
            raise UserError(f"{option} {amount} is not a fraction between 0 and 1. Give one, or a whole number.")
        return max(1, round(amount * cases))
    if not 1 <= amount <= cases:
        raise UserError(f"{option} {amount} is impossible with {cases} cases. Give a number from 1 to {cases}.")
    return amount
