"""Folds with few labels: `train` (the labelled few), `unlabeled` and `val`, beside nnU-Net's own in splits_final.json.

nnU-Net reads `train` and `val` and ignores `unlabeled`, so stock nnU-Net on such a fold is the labelled-only baseline.
"""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_selfreg.data.datasets import labeled_cases, preprocessed_folder, read_json
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import replacing

Fold = dict[str, list[str]]
PARTS = ("train", "unlabeled", "val")
_NNUNETS_FOLDS = 5
_SHOWN = 3  # of many cases in a message
_REMEDY = "It is left as it is: restore it, or move it away, and nnU-Net's five folds are made anew."


def append_fold(
    dataset: str, labeled: int | float, val: int | float = 0.2, seed: int = 0, in_order: bool = False
) -> tuple[int, Fold, bool]:
    """Appends a fold to the data set's splits_final.json; the folds that are there stay as they are.

    Where the file does not exist yet, nnU-Net's own five folds are made first, if there are cases enough for them. The
    file is replaced in one step. A fold that is there already is not appended again.

    Args:
        dataset: as given to nnU-Net's `-d`.
        labeled: how many cases are labelled, as in `new_fold`.
        val: how many cases validate, as in `new_fold`.
        seed: of the shuffle.
        in_order: in the order of their names instead of shuffled.

    Returns:
        Number and content of the fold, and whether it is new.

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
    file = folder / "splits_final.json"
    splits = folds_of(folder) if file.exists() or len(cases) >= _NNUNETS_FOLDS else []
    if fold in splits:
        return splits.index(fold), fold, False
    with replacing(file) as part:
        save_json([*splits, fold], part)
    return len(splits), fold, True


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
        raise UserError(_too_few(file, len(cases)))
    return generate_crossval_split(cases, seed=12345, n_splits=_NNUNETS_FOLDS)


def _too_few(file: Path, cases: int) -> str:
    return (
        f"{file} does not exist, and {cases} cases are too few for nnU-Net's five folds. Make a fold with "
        "nnUNetv2_selfreg split, or train on all of them with fold all."
    )


def read_splits(file: Path) -> list[Fold]:
    """The folds of a splits_final.json.

    Raises:
        UserError: it is not a list of folds with `train` and `val`, a part is not a list of names or has one twice, or
            a fold has a part whose name is nearly `unlabeled`.
    """
    splits = read_json(file, _REMEDY)
    if not isinstance(splits, list):
        raise UserError(f"{file} is not a list of folds. {_REMEDY}")
    for number, fold in enumerate(splits):
        if not (isinstance(fold, dict) and all(isinstance(fold.get(part), list) for part in ("train", "val"))):
            raise UserError(f"{file}: fold {number} has no lists 'train' and 'val'. {_REMEDY}")
        for part in PARTS:
            _check_part(file, number, part, fold.get(part, []))
        for entry in fold.keys() - {*PARTS}:  # others may have entries of their own
            if re.sub(r"[^a-z]", "", entry.lower()).startswith("unlab"):
                raise UserError(f"{file}: fold {number} has '{entry}'. Rename it: 'unlabeled' is what is read.")
    return splits


def _check_part(file: Path, number: int, part: str, cases: object) -> None:
    if not (isinstance(cases, list) and all(isinstance(case, str) for case in cases)):
        raise UserError(f"{file}: '{part}' of fold {number} is not a list of identifiers. {_REMEDY}")
    if twice := sorted(case for case, count in Counter(cases).items() if count > 1):
        raise UserError(f"{file}: '{part}' of fold {number} has {some(twice)} more than once. Correct it there.")


def check_fold(file: Path, number: int, there: Collection[str]) -> None:
    """Checks that a training can use a fold of splits_final.json, or of nnU-Net's own where there is no such file.

    nnU-Net takes a random 80 % of all labels for a fold that does not exist.

    Args:
        file: splits_final.json.
        number: of the fold.
        there: identifiers of the preprocessed cases with labels.

    Raises:
        UserError: there is no such fold, it has nothing to train on or to validate, or lists a case that is not there;
            or there are too few cases for nnU-Net's own.
    """
    splits = read_splits(file) if file.is_file() else None
    if splits is None and len(there) < _NNUNETS_FOLDS:
        raise UserError(_too_few(file, len(there)))
    count = _NNUNETS_FOLDS if splits is None else len(splits)
    if not 0 <= number < count:
        raise UserError(
            f"There is no fold {number}: {file} has {f'0 to {count - 1}' if count else 'none'}. Give one of these, or "
            "make one with nnUNetv2_selfreg split."
        )
    if splits is None:
        return
    for part in ("train", "val"):
        cases = splits[number][part]
        if not cases:
            raise UserError(f"{file}: '{part}' of fold {number} is empty. List cases there, or take another fold.")
        if missing := [case for case in cases if case not in there]:
            raise UserError(
                f"{file}: '{part}' of fold {number} lists {some(missing)}, and no such case is preprocessed."
                f"{near_misses(missing, there)} Correct the file, or preprocess the case."
            )


def near_misses(missing: Sequence[str], there: Collection[str]) -> str:
    """What may have been meant by the first identifiers that are not there, as a sentence; nothing if nothing is like
    them."""
    for case in missing[:_SHOWN]:
        bare = re.sub(r"(_\d{4})?(\.\w+)*$", "", case)  # a file's name without channel and ending
        alike = [bare] if bare in there else difflib.get_close_matches(case, there, 1, 0.8)
        if alike:
            return f" Is {alike[0]} meant by {case}?"
    return ""


def some(cases: Sequence[str]) -> str:
    """The first of many, for a message."""
    return ", ".join(cases[:_SHOWN]) + (f" and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else "")


def _how_many(option: str, amount: int | float, cases: int) -> int:
    if isinstance(amount, float):
        if not 0 < amount < 1:
            raise UserError(f"{option} {amount} is not a fraction between 0 and 1. Give one, or a whole number.")
        return max(1, round(amount * cases))
    if not 1 <= amount <= cases:
        raise UserError(f"{option} {amount} is impossible with {cases} cases. Give a number from 1 to {cases}.")
    return amount
