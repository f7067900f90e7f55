"""Copy and paste: a box of one sample in another, and targets that follow.

Source: Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation", CVPR 2023, arXiv
2305.00673 (BCP).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F


def box_sides(size: Sequence[int], ratio: float) -> list[int]:
    """Sides of the box in a patch, rounded down.

    Args:
        size: of the patch, in voxels.
        ratio: of the box's side to the patch's.

    Raises:
        ValueError: `ratio` is not in (0, 1), or the patch is so small that the box is empty.

    >>> box_sides((112, 112, 80), 2 / 3)
    [74, 74, 53]
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the box ratio is {ratio}, it must be between 0 and 1")
    sides = [int(ratio * length) for length in size]
    if min(sides) < 1:
        raise ValueError(
            f"a box of {ratio:.3g} of a patch of {tuple(size)} voxels is empty: take a larger ratio or patch"
        )
    return sides


def box_masks(count: int, size: Sequence[int], ratio: float, device: torch.device | None = None) -> Tensor:
    """Masks with a box of :func:`box_sides` at a random place each: False in the box, True outside.

    Args:
        count: of masks.
        size: of the patch, in voxels.
        ratio: as for :func:`box_sides`, whose errors are raised.
        device: of the masks.

    Returns:
        Boolean, `(count, 1, *size)`.
    """
    sides = box_sides(size, ratio)
    masks = torch.ones(count, 1, *size, dtype=torch.bool, device=device)
    for mask in masks:
        starts = [int(torch.randint(length - side + 1, ())) for length, side in zip(size, sides, strict=True)]
        mask[(0, *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))] = False
    return masks


def mix(outside: Tensor, inside: Tensor, masks: Tensor) -> Tensor:
    """`outside` where the mask is True, `inside` elsewhere; `(B, C, *spatial)`, the masks `(B, 1, *spatial)`.

    For images, and for targets at any scale: the masks are taken at the nearest voxel where they are of another size,
    as labels of deep supervision are.
    """
    return torch.where(at_size(masks, outside.shape[2:]), outside, inside)


def mix_all(outside: Sequence[Tensor], inside: Sequence[Tensor], masks: Tensor) -> list[Tensor]:
    """:func:`mix` of images and of their targets at every scale, all with the same masks."""
    return [mix(a, b, masks) for a, b in zip(outside, inside, strict=True)]


def at_size(values: Tensor, size: Sequence[int]) -> Tensor:
    """Labels or masks `(B, C, *spatial)` at the nearest voxels of another size, as nnU-Net makes them for deep
    supervision."""
    if tuple(values.shape[2:]) == tuple(size):
        return values
    return F.interpolate(values.float(), tuple(size), mode="nearest-exact").to(values.dtype)


def largest_components(labels: Tensor) -> Tensor:
    """Labels of which each class or region keeps its largest connected component in a sample.

    The rest becomes background. Largest is what has most voxels; neighbours touch, be it at a corner. Computed on the
    CPU, by SciPy.

    Args:
        labels: `(B, 1, *spatial)`, or boolean regions `(B, R, *spatial)`.

    Returns:
        Of the same shape, dtype and device.
    """
    before = labels.cpu().numpy()
    kept = np.zeros_like(before)
    for sample, channel in np.ndindex(before.shape[:2]):
        values = before[sample, channel].astype(np.int32, copy=False)
        for label, box in enumerate(ndimage.find_objects(values), start=1):
            if box is not None:
                kept[sample, channel][box][_largest_component(values[box] == label)] = label
    return torch.from_numpy(kept).to(labels.device)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    parts, _ = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # the background
    return (parts == sizes.argmax()) & mask
