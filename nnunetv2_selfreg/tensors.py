"""What any room may use on tensors: pooling, precision, outputs of any structure cut into samples. Needs torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

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


def of_image(feature: Tensor, padded: Sequence[int], image: Sequence[int]) -> Tensor:
    """The part of a feature map that sees the image, where the network padded it at the end of each axis.

    A place that covers some of the image and some of the padding stays. Without padding it is the whole map.

    Args:
        feature: `(B, C, *spatial)`, of any resolution.
        padded: spatial shape of what the network sees, at full resolution.
        image: spatial shape of the image in it.

    >>> of_image(torch.zeros(1, 1, 8, 4), padded=(64, 32), image=(40, 32)).shape
    torch.Size([1, 1, 5, 4])
    """
    if tuple(padded) == tuple(image):
        return feature
    covered = (-(-length * have // whole) for have, whole, length in zip(feature.shape[2:], padded, image, strict=True))
    return feature[(..., *(slice(length) for length in covered))]


def map_tensors(function: Callable[[Tensor], Any], structure: Any) -> Any:
    """`structure` with each tensor in it replaced by what `function` makes of it.

    Args:
        function: of a tensor.
        structure: a tensor, or lists, tuples, named tuples and dictionaries of structures; whatever else is in it stays
            as it is.

    >>> map_tensors(lambda tensor: tensor + 1, {"data": [torch.tensor(1)], "keys": "a"})
    {'data': [tensor(2)], 'keys': 'a'}
    """
    if isinstance(structure, Tensor):
        return function(structure)
    if isinstance(structure, dict):
        return {name: map_tensors(function, part) for name, part in structure.items()}
    if not isinstance(structure, (list, tuple)):
        return structure
    parts = [map_tensors(function, part) for part in structure]
    return type(structure)(*parts) if hasattr(structure, "_fields") else type(structure)(parts)


def cut(output: Any, first: int) -> tuple[Any, Any]:
    """The first samples of a network's output, and the others, each in the structure of the whole.

    Args:
        output: a tensor `(B, ...)`, or a structure of such as in :func:`map_tensors`: a list of scales, the k-means
            network's named tuple.
        first: how many samples are the first.

    Raises:
        TypeError: there is something else in the structure, which could not be cut.

    >>> cut([torch.tensor([1, 2, 3])], 2)
    ([tensor([1, 2])], [tensor([3])])
    """
    for leaf in _leaves(output):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"a network's output has a {type(leaf).__name__}; it can only be cut into samples if it is made of "
                "tensors in lists, tuples, named tuples and dictionaries"
            )
    return map_tensors(lambda tensor: tensor[:first], output), map_tensors(lambda tensor: tensor[first:], output)


def _leaves(structure: Any) -> Iterator[Any]:
    """What is in lists, tuples and dictionaries, at whatever depth."""
    if isinstance(structure, (list, tuple, dict)):
        for part in structure.values() if isinstance(structure, dict) else structure:
            yield from _leaves(part)
    else:
        yield structure


def as_list(scales: Tensor | Sequence[Any]) -> Sequence[Any]:
    """What there is at every scale, highest resolution first; without deep supervision that is a tensor alone."""
    return [scales] if isinstance(scales, Tensor) else scales


def at_full_resolution(scales: Tensor | Sequence[Any]) -> Tensor:
    """What there is at full resolution: the first of the scales; of a k-means network's output the segmentation."""
    return as_list(scales)[0]
