"""Signed distance maps of foreground masks, and the labelled stream that brings them."""

from __future__ import annotations

from collections.abc import Sequence

import edt
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from nnunetv2_selfreg.data.foreground import Foreground, at_full_resolution


def signed_distance_map(mask: np.ndarray, spacing: Sequence[float] | None = None) -> np.ndarray:
    """Signed distance of every voxel to the surface of a mask: negative inside, positive outside.

        outside:  d(v) = distance to the nearest inside voxel / the largest such distance
        inside:   d(v) = -distance to the nearest outside voxel / the largest such distance

    Distances are Euclidean and exact, between voxel centres. So no value is 0, and `map < 0` is the mask again (our
    decision; the released programs of the dual-task methods set inner boundary voxels to 0 and ignore the spacing).

    Computed by `edt`, up to 3D: exact and anisotropic like SciPy's (which MONAI wraps), but 1.5 times as fast on one
    thread, and with wheels for all platforms. cuCIM's needs a GPU, which worker processes must not touch.

    Args:
        mask: boolean, of any dimension.
        spacing: of the voxels along each axis, in mm; default: 1. The division makes the map unitless.

    Returns:
        float32 in [-1, 1], of the mask's shape. An empty mask gives 1 everywhere, a full one -1 (our decision).

    Raises:
        ValueError: the spacing is not a positive number for each axis.
        TypeError: the mask is not boolean.

    >>> signed_distance_map(np.array([False, False, True, True, True]))
    array([ 1.        ,  0.5       , -0.33333334, -0.6666667 , -1.        ],
          dtype=float32)
    """
    if mask.dtype != bool:
        raise TypeError(f"the mask is of {mask.dtype}, it must be boolean")
    spacing = tuple(map(float, spacing if spacing is not None else [1] * mask.ndim))
    if len(spacing) != mask.ndim or not all(0 < s < np.inf for s in spacing):
        raise ValueError(f"the spacing is {spacing}, it must have a positive number for each of {mask.ndim} axes")
    if not mask.any():
        return np.ones(mask.shape, np.float32)
    if mask.all():
        return np.full(mask.shape, -1, np.float32)
    distance = _distance_inside(~mask, spacing)
    box = _box_around(mask)
    distance[box] -= _distance_inside(np.ascontiguousarray(mask[box]), spacing)
    return distance


def _distance_inside(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance to the nearest voxel that is not in the mask, divided by the largest; 0 outside."""
    if mask.ndim > 3:
        distance = distance_transform_edt(mask, spacing).astype(np.float32)
    else:
        distance = edt.edt(mask, anisotropy=spacing if mask.ndim > 1 else spacing[0], parallel=1)
    distance /= distance.max()
    return distance


def _box_around(mask: np.ndarray) -> tuple[slice, ...]:
    """The mask's bounding box and one voxel more: the nearest outside voxel of any inside one lies in there."""
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(occupied[0] - 1, 0), occupied[-1] + 2))
    return tuple(box)


class WithSignedDistances:
    """nnU-Net's labelled stream, whose batches have `distance` too: `(L, K, *patch)`, float32, the signed distance map
    of each foreground class or region.

    Made here, that is in the worker processes and after augmentation, of the target at full resolution.
    """

    def __init__(self, loader, foreground: Foreground, spacing: Sequence[float]) -> None:
        """`loader` yields nnU-Net's batches; `spacing` is the configuration's, in mm."""
        self.loader = loader
        self.foreground = foreground
        self.spacing = tuple(spacing)

    def set_thread_id(self, thread_id: int) -> None:
        self.loader.set_thread_id(thread_id)

    def __iter__(self) -> WithSignedDistances:
        return self

    def __next__(self) -> dict:
        batch = next(self.loader)
        masks = self.foreground.masks(at_full_resolution(batch["target"])).numpy()
        distance = np.empty(masks.shape, np.float32)
        for index in np.ndindex(masks.shape[:2]):
            distance[index] = signed_distance_map(masks[index], self.spacing)
        return {**batch, "distance": torch.from_numpy(distance)}
