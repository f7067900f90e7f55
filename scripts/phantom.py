"""A deterministic left-atrium-like phantom in nnU-Net's raw format: nothing to download, learnable in minutes.

A bright ellipsoidal atrium with four pulmonary veins lies in tissue of middle brightness beside a ventricle that is as
bright as the atrium, so intensity alone does not solve it. On top: a smooth bias field, blur and Rician noise, as in
late-enhancement MRI. Case `i` of a seed is always the same image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

SPACING = (2.5, 2.0, 2.0)  # mm, in the order of the array's axes (z, y, x)
LABELS = {"background": 0, "atrium": 1, "veins": 2}
VEIN_DIRECTIONS = np.array([[0.5, 0.9, 0.9], [0.5, 0.9, -0.9], [-0.5, 0.9, 0.9], [-0.5, 0.9, -0.9]])


def phantom(case: int, shape: Sequence[int] = (32, 40, 40), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image (float32) and label map (uint8) of one case, both of `shape` (z, y, x)."""
    rng = np.random.default_rng([seed, case])
    position = _positions(shape)
    atrium, veins, ventricle, body = _anatomy(position, rng)
    labels = np.zeros(shape, np.uint8)
    labels[veins] = LABELS["veins"]
    labels[atrium] = LABELS["atrium"]
    tissue = np.full(shape, 0.05)
    tissue[body] = 0.35
    tissue[ventricle] = 0.8
    tissue[labels > 0] = 0.8
    signal = ndimage.gaussian_filter(tissue, 0.6) * _bias_field(shape, rng)
    noise = rng.normal(0, 0.05, (2, *shape))
    return (1000 * np.hypot(signal + noise[0], noise[1])).astype(np.float32), labels


def write_dataset(
    folder: Path,
    train: int,
    test: int = 0,
    shape: Sequence[int] = (32, 40, 40),
    seed: int = 0,
    labels: Mapping[str, object] = LABELS,
    **dataset_json: object,
) -> None:
    """Writes cases 0 to `train - 1` to imagesTr/labelsTr and the `test` next ones to imagesTs/labelsTs of `folder`.

    `labels` and further entries go into dataset.json as they are.
    """
    for case in range(train + test):
        image, label_map = phantom(case, shape, seed)
        part = "Tr" if case < train else "Ts"
        _write(folder / f"images{part}" / f"phantom_{case:03d}_0000.nii.gz", image)
        _write(folder / f"labels{part}" / f"phantom_{case:03d}.nii.gz", label_map)
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": train, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, **dataset_json}, indent=4), encoding="utf-8")


def _positions(shape: Sequence[int]) -> np.ndarray:
    """Coordinates of the voxel centres, (3, *shape), from -1 to 1 along each axis."""
    return np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))


def _anatomy(position: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    centre = rng.uniform(-0.15, 0.15, 3)
    axes = np.array([0.42, 0.34, 0.42]) * rng.uniform(0.85, 1.15, 3)
    rotation, _ = np.linalg.qr(np.eye(3) + rng.normal(0, 0.15, (3, 3)))
    local = np.tensordot(rotation, position - centre[:, None, None, None], 1)
    atrium = _ellipsoid(local, np.zeros(3), axes)
    veins = np.zeros_like(atrium)
    for direction in VEIN_DIRECTIONS + rng.normal(0, 0.1, (4, 3)):
        veins |= _tube(local, direction / np.linalg.norm(direction), rng.uniform(0.10, 0.14), rng.uniform(0.6, 0.8))
    ventricle = _ellipsoid(local, np.array([0.0, -0.85, 0.1]), np.array([0.45, 0.35, 0.4]) * rng.uniform(0.9, 1.1, 3))
    body = _ellipsoid(position, np.zeros(3), np.array([1.3, 0.95, 0.95]))
    return atrium, veins & ~atrium, ventricle & ~atrium & ~veins, body


def _ellipsoid(position: np.ndarray, centre: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return (((position - centre[:, None, None, None]) / axes[:, None, None, None]) ** 2).sum(0) <= 1


def _tube(position: np.ndarray, direction: np.ndarray, radius: float, length: float) -> np.ndarray:
    along = np.tensordot(direction, position, 1)
    across = np.sqrt(np.maximum((position**2).sum(0) - along**2, 0))
    return (across <= radius) & (along >= 0) & (along <= length)


def _bias_field(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    coarse = rng.uniform(0.75, 1.25, (3, 3, 3))
    return ndimage.zoom(coarse, [n / 3 for n in shape], order=3, mode="nearest", grid_mode=True)


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path), useCompression=True)
