"""The images that a fold trains on without labels. Nothing here opens a segmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import blosc2
import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_selfreg.data.datasets import read_json
from nnunetv2_selfreg.data.splits import near_misses, some
from nnunetv2_selfreg.data.storage import open_array
from nnunetv2_selfreg.errors import UserError

RECIPE_FILE = "preprocessing.json"
FORMATS = (".b2nd", ".npy", ".npz")  # nnU-Net's, the unpacked one before the packed one


class UnlabeledPool:
    """Preprocessed images by identifier, read when they are asked for: memory does not grow with the pool."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self.identifiers = sorted(self._files)

    def load_image(self, identifier: str) -> np.ndarray | blosc2.NDArray:
        """The image of a case, `(C, *spatial)` in float32, not read before it is sliced where the format allows."""
        file = self._files[identifier]
        if file.suffix == ".b2nd":
            return open_array(file)
        if file.suffix == ".npy":
            return np.load(file, mmap_mode="r")
        with np.load(file) as packed:
            return packed["data"]  # beside it lies "seg", which is not touched

    def fingerprint(self, identifier: str) -> str:
        """What tells an image from another one, or from itself changed: a hash of its shape and of the cube of 16
        voxels in its middle, which is read without the rest."""
        image = self.load_image(identifier)
        middle = tuple(slice(max(0, length // 2 - 8), length // 2 + 8) for length in image.shape[1:])
        content = np.ascontiguousarray(image[(slice(None), *middle)], np.float32)
        return hashlib.sha256(f"{tuple(image.shape)}".encode() + content.tobytes()).hexdigest()


def recipe(plans: PlansManager, configuration: ConfigurationManager) -> dict:
    """What of the plans decides how an image is preprocessed, as JSON holds it."""
    parts = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm")
    resampling = ("resampling_fn_data", "resampling_fn_data_kwargs")
    return {
        **{name: configuration.configuration[name] for name in (*parts, *resampling)},
        "transpose_forward": plans.transpose_forward,
        "foreground_intensity_properties_per_channel": plans.foreground_intensity_properties_per_channel,
    }


def is_outdated(folder: Path, current: dict) -> bool:
    """Whether there are cases in an `_unlabeled` folder that were made by another recipe."""
    file = folder / RECIPE_FILE
    return any(folder.glob("*.pkl")) and not (file.is_file() and read_json(file) == current)


def find_pool(folder: Path, fold: Mapping[str, Iterable[str]], number: int | str, current: dict) -> UnlabeledPool:
    """The unlabelled pool of a fold: the cases of its `unlabeled` list, and all of `<folder>_unlabeled`.

    Args:
        folder: the preprocessed cases of the configuration, `<data_identifier>`.
        fold: `train`, `val` and `unlabeled` (which may be absent) with identifiers.
        number: of the fold, for the messages.
        current: the :func:`recipe` of the configuration.

    Raises:
        UserError: no unlabelled case at all, one without a preprocessed image, one that is also labelled, or
            `<folder>_unlabeled` was made with other plans.
    """
    listed = list(fold.get("unlabeled", ()))
    own_folder = folder.with_name(f"{folder.name}_unlabeled")
    if is_outdated(own_folder, current):
        raise UserError(
            f"{own_folder} was preprocessed with other plans than these (or its {RECIPE_FILE} is missing). Delete that "
            "folder, and run nnUNetv2_selfreg preprocess_unlabeled again."
        )
    # The .pkl file is written last, so the image beside it is whole.
    finished = [file.stem for file in own_folder.glob("*.pkl") if file.with_suffix(".b2nd").is_file()]
    files = {case: _image(folder, case) for case in listed} | {case: own_folder / f"{case}.b2nd" for case in finished}
    missing = [case for case, file in files.items() if file is None]
    if missing:
        raise UserError(
            f"Fold {number} lists {some(missing)} as unlabeled, but neither {folder} nor {own_folder} has such a "
            f"case.{near_misses(missing, _cases_in(folder))} Correct splits_final.json, or preprocess the case."
        )
    used = {"train": set(fold["train"]), "val": set(fold["val"])}
    for part, cases in used.items():
        if both := cases & set(listed):
            raise UserError(
                f"Fold {number} has {some(sorted(both))} in {part} and among the unlabelled cases. Take it out of one "
                "of the two lists in splits_final.json."
            )
        if both := cases & set(finished):
            raise UserError(
                f"Fold {number} has {some(sorted(both))} in {part} and among the unlabelled cases. If its labels are "
                f"to count, delete its .b2nd and .pkl file in {own_folder}; otherwise take it out of {part} in "
                "splits_final.json."
            )
    if not files:
        raise UserError(
            f"Fold {number} has no unlabelled case: it lists none, and {own_folder} is empty or absent. For further "
            "images run nnUNetv2_selfreg preprocess_unlabeled, for a fold with few labels nnUNetv2_selfreg split; "
            "nnUNetTrainerLabeledCopyPaste needs neither."
        )
    return UnlabeledPool({case: file for case, file in files.items() if file is not None})


def _image(folder: Path, case: str) -> Path | None:
    files = (folder / f"{case}{ending}" for ending in FORMATS)
    return next((file for file in files if file.is_file()), None)


def _cases_in(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.pkl"))
