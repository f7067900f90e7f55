"""What a data set and a plan must have before a training starts."""

from __future__ import annotations

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_selfreg.errors import SettingError, UserError


def check_labels(manager: LabelManager, dataset: str) -> None:
    """Raises UserError if labels have a gap. nnU-Net's losses take them for indices; of regions it makes its own."""
    labels = sorted(manager.all_labels)
    if manager.has_regions or labels == list(range(len(labels))):
        return
    raise UserError(
        f"dataset.json of {dataset} has the labels {', '.join(map(str, labels))}. They must be consecutive: 0 to "
        f"{len(labels) - 1}. Renumber them there and in the files in labelsTr, and preprocess again."
    )


def check_patch(patch_size: list[int], strides: list[list[int]]) -> None:
    """Raises SettingError if a network of these strides cannot take the patch: a side is not divisible, or the
    bottleneck would be a single voxel, of which instance norm can make nothing."""
    total = np.prod(strides, axis=0)
    sizes = np.asarray(patch_size)
    if (sizes % total).any():
        raise SettingError(
            f"the patch size {sizes.tolist()} is not divisible by the product of the strides, {total.tolist()}. Plan "
            "anew, or correct patch_size in the plans file."
        )
    if (sizes == total).all():
        raise SettingError(
            f"the patch size {sizes.tolist()} leaves a single voxel in the bottleneck. Take a larger patch or fewer "
            "stages."
        )
