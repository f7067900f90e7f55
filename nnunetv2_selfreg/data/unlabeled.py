"""The images that a fold trains on without labels. Nothing here opens a segmentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import blosc2
import numpy as np

from nnunetv2_selfreg.errors import CommandError

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
            return blosc2.open(urlpath=str(file), mode="r", mmap_mode="r")
        if file.suffix == ".npy":
            return np.load(file, mmap_mode="r")
        with np.load(file) as packed:
            return packed["data"]  # beside it lies "seg", which is not touched


def find_pool(folder: Path, fold: Mapping[str, Iterable[str]], number: int | str) -> UnlabeledPool:
    """The unlabelled pool of a fold: the cases of its `unlabeled` list, and all of `<folder>_unlabeled`.

    Args:
        folder: the preprocessed cases of the configuration, `<data_identifier>`.
        fold: `train`, `val` and `unlabeled` (which may be absent) with identifiers.
        number: of the fold, for the messages.

    Raises:
        CommandError: no unlabelled case at all, one without a preprocessed image, or one that is also labelled.
    """
    listed = list(fold.get("unlabeled", ()))
    own_folder = folder.with_name(f"{folder.name}_unlabeled")
    files = {case: _image(folder, case) for case in listed}
    missing = [case for case, file in files.items() if file is None]
    if missing:
        raise CommandError(
            f"Fold {number} lists {_some(missing)} as unlabeled, but {folder} has no such case. "
            "Correct splits_final.json, or preprocess the case."
        )
    # The .pkl file is written last, so the image beside it is whole.
    finished = [file.stem for file in own_folder.glob("*.pkl") if file.with_suffix(".b2nd").is_file()]
    used = {"train": set(fold["train"]), "val": set(fold["val"])}
    for part, cases in used.items():
        if both := cases & {*listed, *finished}:
            raise CommandError(
                f"Fold {number} has {_some(sorted(both))} in {part} and among the unlabelled cases "
                f"(`unlabeled` in splits_final.json, or {own_folder}). A case can be in one of them only."
            )
    files |= {case: own_folder / f"{case}.b2nd" for case in finished}
    if not files:
        raise CommandError(
            f"Fold {number} has no unlabelled case: it lists none, and {own_folder} is empty or absent. For further "
            "images run nnUNetv2_selfreg preprocess_unlabeled, for a fold with few labels nnUNetv2_selfreg split."
        )
    return UnlabeledPool({case: file for case, file in files.items() if file is not None})


def _image(folder: Path, case: str) -> Path | None:
    files = (folder / f"{case}{ending}" for ending in FORMATS)
    return next((file for file in files if file.is_file()), None)


def _some(cases: list[str]) -> str:
    return ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")
