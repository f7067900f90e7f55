"""Preprocessed arrays on disk, compressed in the blocks that nnU-Net reads patches of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from nnunetv2_selfreg.files import replacing


def store_array(array: np.ndarray, file: Path, patch_size: Sequence[int]) -> None:
    """Writes `(C, *spatial)` to a .b2nd file as nnU-Net does, in one step."""
    array = np.ascontiguousarray(array)
    blocks, chunks = comp_blosc2_params(array.shape, tuple(patch_size), array.itemsize)
    compression = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    with replacing(file) as part:
        blosc2.asarray(array, urlpath=part, mode="w", chunks=chunks, blocks=blocks, cparams=compression)


def open_array(file: Path) -> blosc2.NDArray:
    """The array of a .b2nd file, not read before it is sliced.

    As nnU-Net opens it: one thread in each worker; its library cannot map files on Windows.
    """
    mapped = {"mmap_mode": "r"} if os.name != "nt" else {}
    return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, **mapped)
