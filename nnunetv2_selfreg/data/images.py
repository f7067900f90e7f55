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


def why_misnamed(
    identifier: str, files: Sequence[Path], ending: str, labeled: set[str], channels: Sequence[str]
) -> str | None:
    """None if the names of a case's files are right, otherwise what is wrong with them.

    Args:
        identifier: of the case, as :func:`list_cases` has found it.
        files: its images.
        ending: of image files.
        labeled: identifiers of the cases with labels.
        channels: names of the data set's channels.
    """
    names = [file.name for file in files]
    if names[0] == identifier:
        return f"the name has no channel number; expected {identifier.removesuffix(ending)}_0000{ending}"
    if len(files) > len(channels):
        return (
            f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} look like {len(names)} channels of one case, and "
            f"the data set has {len(channels)} ({', '.join(channels)}). {_case_of_its_own(names[0], ending)}"
        )
    for channel in range(len(files)):
        expected = f"{identifier}_{channel:04d}{ending}"
        if expected not in names:
            return f"channel {channel} is missing ({expected}). {_case_of_its_own(names[0], ending)}"
    if identifier in labeled:
        return (
            "a labelled case of the data set has this identifier; remove the image or rename it (or, if the case has "
            "no labels any more, its file in gt_segmentations of nnUNet_preprocessed)"
        )
    return None


def _case_of_its_own(name: str, ending: str) -> str:
    return (
        "The last four digits are the channel: if each file is a case of its own, its name is "
        f"{name.removesuffix(ending)}_0000{ending}"
    )


def check_image(data: np.ndarray, channels: Sequence[str], is_2d: bool, axes: Sequence[int] = (0, 1, 2)) -> None:
    """Checks an image as nnU-Net reads it, channels first and a 2D one as a single slice, against its data set.

    Args:
        data: `(C, *spatial)`, of three spatial axes.
        channels: names of the data set's channels.
        is_2d: whether the data set is 2D.
        axes: order in which the plans take the spatial axes (`transpose_forward`): slices lie along the first.

    Raises:
        BadImageError: other channels or another dimension than the data set has, values that are not finite, or
            nothing but one value.
    """
    if len(data) != len(channels):
        raise BadImageError(
            f"it has {len(data)} channels, the data set {len(channels)} ({', '.join(channels)}): each is a file, "
            "and so is each image of a series"
        )
    shape = [data.shape[1 + axis] for axis in axes]
    fits = shape[0] == 1 if is_2d else 1 not in shape
    if not fits:
        raise BadImageError(f"the data set is {2 if is_2d else 3}D, the image is not: its shape is {data.shape[1:]}")
    _check_finite(data)
    if all(channel.min() == channel.max() for channel in data):
        raise BadImageError(f"all of its voxels have the value {data.flat[0]:g}: there is nothing to be seen")


def check_nifti(file: str) -> None:
    """Reads a NIfTI file strictly; other files pass.

    SimpleITK says nothing of a truncated file, whose last voxels it makes up, and reads NaN as 0.

    Raises:
        BadImageError: the file is damaged, or has values that are not finite.
    """
    if not file.endswith((".nii", ".nii.gz")):
        return
    if not Path(file).exists():  # as of links to data that were not fetched
        raise BadImageError(f"{Path(file).name} is a link to a file that is not there")
    try:
        data = nibabel.load(file).dataobj.get_unscaled()
    except Exception as error:  # of nibabel, of the decompression, of the file system
        raise BadImageError(f"{Path(file).name} is damaged: {error}") from error
    _check_finite(data)


def _check_finite(data: np.ndarray) -> None:
    not_finite = data.size - np.count_nonzero(np.isfinite(data))
    if not_finite:
        raise BadImageError(f"{not_finite} values are NaN or infinite")
