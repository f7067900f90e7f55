"""Bidirectional copy-paste: a box of one sample in another, and targets that follow.

Source: Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation", CVPR 2023, arXiv
2305.00673 (BCP).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def box_masks(count: int, size: Sequence[int], ratio: float, device: torch.device | None = None) -> Tensor:
    """Masks with a box at a random place each: False in the box, True outside.

    Args:
        count: number of masks.
        size: of the patch.
        ratio: of the box's side to the patch's, in (0, 1); sides are rounded down.

    Returns:
        Boolean, `(count, 1, *size)`.

    Raises:
        ValueError: `ratio` is not in (0, 1), or the patch is so small that the box is empty.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the box ratio is {ratio}, it must be between 0 and 1")
    sides = [int(ratio * length) for length in size]
    if min(sides) < 1:
        raise ValueError(f"a box of {ratio} of a patch of {tuple(size)} voxels is empty: take a larger patch or ratio")
    masks = torch.ones(count, 1, *size, dtype=torch.bool, device=device)
    for mask in masks:
        starts = [int(torch.randint(length - side + 1, ())) for length, side in zip(size, sides, strict=True)]
        mask[(0, *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))] = False
    return masks


def mix(outside: Tensor, inside: Tensor, masks: Tensor) -> Tensor:
    """`outside` where the mask is True, `inside` elsewhere; `(B, C, *spatial)`, the masks `(B, 1, *spatial)`.

    The masks are taken at the nearest voxel where they are of another size, as labels of deep supervision are.
    """
    return torch.where(at_size(masks, outside.shape[2:]), outside, inside)


def at_size(values: Tensor, size: Sequence[int]) -> Tensor:
    """Labels or masks `(B, C, *spatial)` at the nearest voxels of another size, as nnU-Net makes them for deep
    supervision."""
    if tuple(values.shape[2:]) == tuple(size):
        return values
    return F.interpolate(values.float(), tuple(size), mode="nearest-exact").to(values.dtype)
