"""Pseudo-labels of a fold's unlabelled pool on disk: what `pseudo_label` writes, and self-training reads.

`<data_identifier>_pseudo_labels/fold_5/` beside the preprocessed cases has, for each case of the pool, the labels
`<case>.b2nd` in the geometry of its preprocessed image, and `<case>.npz` with where each class is and the disagreement.
`pseudo_labels.json` says who made them, of what, and which cases are left out.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_selfreg.data.datasets import read_json
from nnunetv2_selfreg.data.splits import some
from nnunetv2_selfreg.data.storage import open_array, store_array
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import replacing

FILE = "pseudo_labels.json"
OVERVIEW = "overview.png"
REMEDY = "Delete that folder, and run nnUNetv2_selfreg pseudo_label again."
DAMAGED = (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # what NumPy and blosc2 raise
EMPTY = "no foreground"
WORST = "disagreement"


def folder_of(cases: Path, fold: int | str, name: str = "") -> Path:
    """Where the pseudo-labels for a fold are.

    Args:
        cases: the preprocessed cases of the configuration, `<data_identifier>`.
        fold: the student's.
        name: of a further set for this fold.
    """
    return cases.with_name(f"{cases.name}_pseudo_labels") / f"fold_{fold}{name and f'_{name}'}"


@dataclass
class Description:
    """The content of `pseudo_labels.json`."""

    fold: int | str
    """The student's."""
    teachers: list[dict]
    """Each member's `trainer`, `fold`, `checkpoint` and its `sha256`."""
    seen: list[str]
    """The cases whose real labels the teachers have learned from, or their own teachers."""
    recipe: dict
    """How the images were preprocessed, see :func:`recipe`."""
    labels: dict
    """The labels of `dataset.json`."""
    between: str
    """The two opinions of which `disagreement` is the difference."""
    drop: float = 0.0
    """The share of the cases with the largest disagreement that is left out."""
    keep_empty: bool = False
    """Whether cases without foreground are kept."""
    disagreement: dict[str, float | None] = field(default_factory=dict)
    """Of each labelled case: voxels where the opinions differ over voxels of foreground; None if there is only one."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Why a case is left out: EMPTY or WORST."""

    @property
    def made_by(self) -> list[str]:
        """What identifies the teachers."""
        return sorted(teacher["sha256"] for teacher in self.teachers)

    @property
    def teachers_named(self) -> str:
        """For a message."""
        return ", ".join(f"{teacher['trainer']} (fold {teacher['fold']})" for teacher in self.teachers)

    def save(self, folder: Path) -> None:
        """Writes the file in one step."""
        with replacing(folder / FILE) as part:
            save_json(asdict(self), part, sort_keys=False)

    @classmethod
    def read(cls, folder: Path) -> Description | None:
        """What a folder's file says; None without one.

        Raises:
            UserError: it is damaged.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            return cls(**read_json(file, REMEDY))
        except TypeError as error:
            raise UserError(f"{file} is no description of pseudo-labels ({error}). {REMEDY}") from error


def left_out(
    disagreement: Mapping[str, float | None], empty: Sequence[str], drop: float, keep_empty: bool
) -> dict[str, str]:
    """Which cases are left out, and why.

    Those without foreground, unless `keep_empty`; then, of all cases, the share `drop` with the largest disagreement,
    rounded, of equal ones the last by name. A case whose disagreement is unknown is not among these.
    """
    out = {} if keep_empty else dict.fromkeys(sorted(empty), EMPTY)
    known = {case: value for case, value in disagreement.items() if value is not None and case not in out}
    worst = sorted(known, key=lambda case: (known[case], case), reverse=True)[: round(drop * len(disagreement))]
    return {**out, **dict.fromkeys(worst, WORST)}


def store_case(
    folder: Path,
    case: str,
    labels: np.ndarray,
    manager: LabelManager,
    disagreement: float | None,
    made_by: list[str],
    fingerprint: str,
    patch_size: Sequence[int],
) -> None:
    """Writes the labels of a case `(*spatial)`; the .npz file, which vouches for the other one, is the last.

    Args:
        folder: of the pseudo-labels.
        case: its identifier.
        labels: -1 outside the body.
        manager: of the data set's labels.
        disagreement: None if it is unknown.
        made_by: hashes of the teachers.
        fingerprint: of the image, see :meth:`UnlabeledPool.fingerprint`.
        patch_size: of the configuration.
    """
    npz = folder / f"{case}.npz"
    npz.unlink(missing_ok=True)
    store_array(labels[None].astype(np.int16), folder / f"{case}.b2nd", patch_size)
    locations = class_locations(labels[None], manager)
    said = np.nan if disagreement is None else disagreement
    with replacing(npz) as part, open(part, "wb") as file:  # NumPy would add its ending to a name
        np.savez_compressed(
            file,
            made_by=np.array(made_by),
            image=fingerprint,
            disagreement=said,
            empty=not (labels > 0).any(),
            **{str(key): np.asarray(voxels, np.int32).reshape(-1, 4) for key, voxels in locations.items()},
        )


def class_locations(labels: np.ndarray, manager: LabelManager) -> dict[int | tuple[int, ...], np.ndarray]:
    """Voxels of each class or region, of which nnU-Net's loader takes patches: a sample, as its preprocessing makes it.

    Args:
        labels: `(1, *spatial)`, -1 outside the body.
        manager: of the data set.
    """
    return DefaultPreprocessor._sample_foreground_locations(labels, location_keys(manager))


def location_keys(manager: LabelManager) -> list[int | tuple[int, ...]]:
    """The classes or regions, and with an ignore label all that is annotated, as nnU-Net's preprocessing has them."""
    keys = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
    if manager.has_ignore_label:
        keys.append((-1, *manager.all_labels))
    return [tuple(map(int, key)) if isinstance(key, (list, tuple)) else int(key) for key in keys]


def read_case(folder: Path, case: str, made_by: list[str], fingerprint: str) -> dict | None:
    """What a case's .npz file says beside the voxels, `disagreement` and `empty`; None if these teachers have not made
    it of this image, or a file of it cannot be opened."""
    file = folder / f"{case}.npz"
    if not file.is_file() or not file.with_suffix(".b2nd").is_file():
        return None
    try:
        open_array(file.with_suffix(".b2nd"))
        with np.load(file) as content:
            if content["made_by"].tolist() != made_by or str(content["image"]) != fingerprint:
                return None
            disagreement = float(content["disagreement"])
            return {
                "disagreement": None if np.isnan(disagreement) else disagreement,
                "empty": bool(content["empty"]),
            }
    except DAMAGED:
        return None


class PseudoLabeledCases:
    """The pool's images with their pseudo-labels, in the place of one of nnU-Net's data sets for its loader.

    Nothing of the real labels is opened: not the segmentation, nor nnU-Net's properties, which say where classes are.
    """

    def __init__(
        self, pool: UnlabeledPool, folder: Path, cases: Sequence[str], manager: LabelManager, made_by: list[str]
    ) -> None:
        """`folder` has labels of all `cases`, which are the pool's, by these teachers."""
        self.identifiers = sorted(cases)
        self._pool = pool
        self._folder = folder
        self._keys = location_keys(manager)
        self._made_by = made_by

    def load_case(self, case: str) -> tuple[np.ndarray | blosc2.NDArray, blosc2.NDArray, None, dict]:
        """Image `(C, *spatial)`, labels `(1, *spatial)`, no previous stage, and the properties `class_locations`.

        Raises:
            UserError: another teacher has labelled it since the training began.
        """
        with np.load(self._folder / f"{case}.npz") as content:
            if content["made_by"].tolist() != self._made_by:
                raise UserError(f"{self._folder} was labelled anew while a student learned from it. Train it again.")
            locations = {key: content[str(key)] for key in self._keys}
        labels = open_array(self._folder / f"{case}.b2nd")
        return self._pool.load_image(case), labels, None, {"class_locations": locations}


def read_pseudo_labels(
    folder: Path,
    pool: UnlabeledPool,
    manager: LabelManager,
    labels: dict,
    current: dict,
    fold: int | str,
    val: Sequence[str],
) -> tuple[Description, PseudoLabeledCases]:
    """The pseudo-labels of a pool, those that are not left out.

    Args:
        folder: see :func:`folder_of`.
        pool: of the fold.
        manager: of the data set's labels.
        labels: as `dataset.json` has them.
        current: the :func:`recipe` of the configuration.
        fold: the student's.
        val: the cases that it is validated on; of fold `all`, none.

    Raises:
        UserError: there are none, not of all of the pool's cases as they are now, of other labels, plans or fold, by a
            teacher that saw labels of `val`; or all are left out.
    """
    make = "Run nnUNetv2_selfreg pseudo_label"
    description = Description.read(folder)
    if description is None:
        raise UserError(f"There are no pseudo-labels in {folder}. {make} with a trained model first.")
    for what, then, now in (("labels", description.labels, labels), ("plans", description.recipe, current)):
        if then != now:
            raise UserError(f"{folder} was labelled when the data set had other {what}. {REMEDY}")
    if description.fold != fold:
        raise UserError(f"{folder} has labels for fold {description.fold}, not for {fold}. {make} -f {fold}.")
    if seen := sorted({*description.seen} & {*val}):
        raise UserError(
            f"{folder}: its teacher, or the teacher's own, was trained with labels of {some(seen)}, on which fold "
            f"{fold} is validated. Train a teacher on fold {fold} as it is now, and label again with it."
        )
    missing = [
        case
        for case in pool.identifiers
        if case not in description.disagreement
        or read_case(folder, case, description.made_by, pool.fingerprint(case)) is None
    ]
    if missing:
        raise UserError(
            f"{folder} has no pseudo-labels of {some(missing)}, of {len(pool.identifiers)} unlabelled cases: the pool "
            f"has changed, or labelling was interrupted. {make} again as before, it labels what is missing."
        )
    cases = [case for case in pool.identifiers if case not in description.dropped]
    if not cases:
        raise UserError(
            f"{folder / FILE} leaves all {len(pool.identifiers)} cases out. {make} again with a smaller --drop or with "
            "--keep_empty, or train the teacher better."
        )
    return description, PseudoLabeledCases(pool, folder, cases, manager, description.made_by)
