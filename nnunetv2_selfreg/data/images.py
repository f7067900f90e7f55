"""Raw images without labels: which files make a case, and whether a case can be used."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from nnunetv2_selfreg.errors import UserError

_CHANNEL = re.compile(r"(?P<identifier>.+)_\d{4}")


class BadImageError(Exception):
    """Why a case cannot be used."""


def list_cases(folder: Path, ending: str) -> dict[str, list[Path]]:
    """The files of each case by identifier; a file without a channel number stands under its whole name.

    Raises:
        UserError: there are none.
    """
    cases = defaultdict(list)
    for file in sorted(folder.iterdir()):
        if file.name.endswith(ending):
            match = _CHANNEL.fullmatch(file.name.removesuffix(ending))
            cases[match["identifier"] if match else file.name].append(file)
    if not cases:
        raise UserError(f"{folder} has no images that end in {ending}, as dataset.json says. Put them there.")
    return dict(cases)


def why_misnamed(identifier: str, files: Sequence[Path], ending: str, labeled: set[str]) -> str | None:
    """None if the names of a case's files are right, otherwise what is wrong with them."""
    if files[0].name == identifier:
        return f"the name has no channel number; expected {identifier.removesuffix(ending)}_0000{ending}"
    names = [file.name for file in files]
    for channel in range(len(files)):
        expected = f"{identifier}_{channel:04d}{ending}"
        if expected not in names:
            return f"channel {channel} is missing ({expected})"
    if identifier in labeled:
        return (
            "a labelled case of the data set has this identifier; remove the image or rename it (or, if the case has "
            "no labels any more, its file in gt_segmentations of nnUNet_preprocessed)"
        )
    return None


def check_image(data: np.ndarray, channels: Sequence[str], is_2d: bool) -> None:
    """Checks an image as nnU-Net reads it, channels first and a 2D one as a single slice, against its data set.

    Raises:
        BadImageError: other channels or another dimension than the data set has, or values that are not finite.
    """
    if len(data) != len(channels):
        raise BadImageError(f"{len(data)} of {len(channels)} channels ({', '.join(channels)}) are there")
    fits = data.shape[1] == 1 if is_2d else 1 not in data.shape[1:]
    if not fits:
        raise BadImageError(f"the data set is {2 if is_2d else 3}D, the image is not: its shape is {data.shape[1:]}")
    _check_finite(data)


def check_nifti(file: str) -> None:
    """Reads a NIfTI file strictly; other files pass.

    SimpleITK says nothing of a truncated file, whose last voxels it makes up, and reads NaN as 0.

    Raises:
        BadImageError: the file is damaged, or has values that are not finite.
    """
    if not file.endswith((".nii", ".nii.gz")):
        return
    try:
        data = nibabel.load(file).dataobj.get_unscaled()
    except Exception as error:  # of nibabel, of the decompression, of the file system
        raise BadImageError(f"{Path(file).name} is damaged: {error}") from error
    _check_finite(data)


def _check_finite(data: np.ndarray) -> None:
    not_finite = data.size - np.count_nonzero(np.isfinite(data))
    if not_finite:
        raise BadImageError(f"{not_finite} values are NaN or infinite")
