"""Average pooling of feature maps and label shares to given shapes, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def average_pool(feature: Tensor, shape: Sequence[int]) -> Tensor:
    """Average-pools `(B, C, *spatial)`, 2D or 3D, to the spatial `shape`, evenly where that is possible.

    What is pooled comes out in at least single precision.
    """
    if tuple(feature.shape[2:]) == tuple(shape):
        return feature
    if feature.device.type != "cuda":
        feature = at_least_single(feature)  # only CUDA pools half precision in 3D, and it sums in single precision
    if not _divides(shape, feature.shape[2:]):
        pool = F.adaptive_avg_pool2d if len(shape) == 2 else F.adaptive_avg_pool3d
        return at_least_single(pool(feature, tuple(shape)))
    kernel = [have // want for have, want in zip(feature.shape[2:], shape, strict=True)]
    return at_least_single((F.avg_pool2d if len(shape) == 2 else F.avg_pool3d)(feature, kernel))


def pooled_to_each_shape(feature: Tensor, shapes: set[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
    """`feature` pooled to each shape.

    An even average of even averages is the average, so where the division is even each level pools the one above it:
    the full-resolution map is read once, not once for each shape.
    """
    pooled: dict[tuple[int, ...], Tensor] = {}
    source = feature
    for shape in sorted(shapes, reverse=True):
        pooled[shape] = average_pool(source if _divides(shape, source.shape[2:]) else feature, shape)
        if _divides(shape, feature.shape[2:]):
            source = pooled[shape]
    return pooled


def at_least_single(feature: Tensor) -> Tensor:
    """Half precision becomes single; double stays, so that gradients can be checked."""
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def _divides(shape: Sequence[int], larger: Sequence[int]) -> bool:
    return all(have % want == 0 for have, want in zip(larger, shape, strict=True))
