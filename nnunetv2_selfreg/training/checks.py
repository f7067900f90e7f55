"""What a data set and a plan must have before a training starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
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


def check_preprocessed(folder: Path, case: Path, manager: LabelManager) -> None:
    """Checks what preprocessing leaves, which otherwise fails in a worker process, or after the training.

    Args:
        folder: the preprocessed data set.
        case: properties of one of its cases, a .pkl file.
        manager: of the data set's labels as they are now.

    Raises:
        UserError: the labels for the final validation are missing, or the cases were preprocessed before dataset.json
            had an ignore label.
    """
    remedy = f"Run nnUNetv2_preprocess for {folder.name} again."
    if not (folder / "gt_segmentations").is_dir():
        raise UserError(f"{folder} has no gt_segmentations, which the final validation needs. {remedy}")
    # Of cases with an ignore label nnU-Net collects where they are annotated, under this key.
    annotated = (-1, *map(int, manager.all_labels))
    if manager.has_ignore_label and annotated not in load_pickle(str(case))["class_locations"]:
        raise UserError(f"{case.parent} was preprocessed before dataset.json had this ignore label. {remedy}")


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
