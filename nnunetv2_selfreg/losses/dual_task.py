"""Segmentation and signed distance as two tasks that must agree.

Sources: Luo et al., "Semi-supervised medical image segmentation through dual-task consistency", AAAI 2021 (DTC);
Zhang & Zhang, "Dual-task mutual learning for semi-supervised medical image segmentation", PRCV 2021, arXiv 2103.04708
(DTML).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunetv2_selfreg.errors import SettingError


def predicted_distance(output: Tensor) -> Tensor:
    """The signed distance that a network's output stands for.

        z = tanh(output)

    Args:
        output: any shape.

    Returns:
        In [-1, 1], of the same shape, in at least single precision: `k` of :func:`soft_mask` makes differences count
        that half precision does not have. It also makes gradients steeper than half precision can hold, where a
        structure is small: those are cut to its largest number, or they would cost the whole step (our decision).
    """
    precise = output.to(torch.promote_types(output.dtype, torch.float32))
    if precise.requires_grad and precise.dtype != output.dtype:
        largest = torch.finfo(output.dtype).max
        precise.register_hook(lambda gradient: gradient.clamp(-largest, largest))
    return torch.tanh(precise)


def soft_mask(distance: Tensor, sharpness: float = 1500.0) -> Tensor:
    """The probability of the foreground that a signed distance stands for.

        mask(z) = sigmoid(-k z)

    The published `k` of 1500 makes the step thinner than a voxel, and with it the shell that gets any gradient.

    Args:
        distance: signed distances, negative inside, any shape; half precision is computed in single.
        sharpness: `k`.

    Returns:
        In [0, 1], of the same shape, in at least single precision.

    Raises:
        ValueError: the sharpness is not greater than 0.
    """
    if not sharpness > 0:
        raise SettingError(f"the sharpness is {sharpness}, it must be greater than 0")
    return torch.sigmoid(-sharpness * distance.to(torch.promote_types(distance.dtype, torch.float32)))


def distance_regression(predicted: Tensor, distance: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error of predicted signed distances, over classes that occur and voxels that are not ignored.

    A class that is nowhere in a sample has no surface, so it has no distance either (our decision; DTC's
    released program regresses to 0). With nothing left the result is 0.

    Args:
        predicted: `(B, K, *spatial)`.
        distance: likewise; negative somewhere in each class that occurs.
        valid: boolean, `(B, 1, *spatial)`.

    Returns:
        A scalar in at least single precision.
    """
    kept = (valid & occurring(distance < 0)).to(torch.promote_types(predicted.dtype, torch.float32))
    return ((predicted - distance) ** 2 * kept).sum() / kept.sum().clamp_min(1)


def occurring(masks: Tensor) -> Tensor:
    """Which classes are anywhere in a sample: boolean, `(B, K, 1, ...)`, of boolean masks `(B, K, *spatial)`."""
    return masks.flatten(2).any(2).reshape(*masks.shape[:2], *[1] * (masks.ndim - 2))
