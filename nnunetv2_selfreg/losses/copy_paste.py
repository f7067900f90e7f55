"""Bidirectional copy-paste: a box of one sample in another, and targets that follow.

Source: Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation", CVPR 2023, arXiv
2305.00673 (BCP).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import remove_all_but_largest_component
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
        raise ValueError(f"a box of {ratio:.3g} of a patch of {tuple(size)} voxels is empty: take a larger one")
    return sides


def box_masks(count: int, size: Sequence[int], ratio: float, device: torch.device | None = None) -> Tensor:
    """Masks with a box of :func:`box_sides` at a random place each: False in the box, True outside.

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

    The masks are taken at the nearest voxel where they are of another size, as labels of deep supervision are.
    """
    return torch.where(at_size(masks, outside.shape[2:]), outside, inside)


def both_ways(labeled: Tensor, other: Tensor, masks: Tensor) -> Tensor:
    """Both mixtures of `B` samples each: first `other` in the boxes of `labeled`, then the next sample of `labeled` in
    the boxes of `other`, `(2 B, C, *spatial)`. With :func:`mix` for images, and for targets at any scale."""
    return torch.cat((mix(labeled, other, masks), mix(other, labeled.roll(-1, 0), masks)))


def largest_components(labels: Tensor, channels_are_regions: bool) -> Tensor:
    """Labels `(B, 1, *spatial)`, or regions `(B, R, *spatial)`, of which each class or region keeps its largest
    connected component in a sample; the rest becomes background. Neighbours touch, be it at a corner."""
    kept = labels.cpu().numpy()
    for sample in kept:
        if channels_are_regions:
            for region in sample:
                region &= remove_all_but_largest_component(region.astype(bool)).astype(region.dtype)
            continue
        for label in np.unique(sample[sample > 0]):
            mask = sample[0] == label
            sample[0][mask & ~remove_all_but_largest_component(mask)] = 0
    return torch.from_numpy(kept).to(labels.device)


def at_size(values: Tensor, size: Sequence[int]) -> Tensor:
    """Labels or masks `(B, C, *spatial)` at the nearest voxels of another size, as nnU-Net makes them for deep
    supervision."""
    if tuple(values.shape[2:]) == tuple(size):
        return values
    return F.interpolate(values.float(), tuple(size), mode="nearest-exact").to(values.dtype)
