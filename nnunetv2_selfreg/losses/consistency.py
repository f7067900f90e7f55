"""Consistency between a student and its teacher, for softmax classes and for sigmoid regions.

Sources: Tarvainen & Valpola, "Mean teachers are better role models", NeurIPS 2017; Yu et al., "Uncertainty-aware
self-ensembling model for semi-supervised 3D left atrium segmentation", MICCAI 2019 (UA-MT).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_ramp_up(progress: float, length: float = 1.0) -> float:
    """Weight of a consistency term at training progress `t` in [0, 1].

        ramp(t) = exp(-5 (1 - min(t / T, 1))^2)

    Args:
        progress: `t`, the share of the training that is done.
        length: `T`, the progress at which full weight is reached, greater than 0.

    >>> gaussian_ramp_up(1.0)
    1.0
    >>> round(gaussian_ramp_up(0.0), 4)
    0.0067
    """
    return math.exp(-5 * (1 - min(progress / length, 1)) ** 2)


def probabilities(logits: Tensor, regions: bool) -> Tensor:
    """Softmax over classes, or a sigmoid for each region, of `(B, K, *spatial)` in at least single precision."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.sigmoid(logits) if regions else torch.softmax(logits, 1)


def squared_consistency(student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean squared difference of two probability maps.

        mean_{B, K, space} ( student - teacher )^2, over the kept voxels

    Args:
        student: probabilities `(B, K, *spatial)`.
        teacher: likewise; gets no gradient.
        kept: `(B, 1 or K, *spatial)`, 1 where a voxel counts; all count when absent. With none kept the result is 0.
    """
    difference = (student - teacher.detach()) ** 2
    if kept is None:
        return difference.mean()
    kept = kept.expand_as(difference).to(difference.dtype)
    return (difference * kept).sum() / kept.sum().clamp_min(1)


def uncertainty(mean_probability: Tensor, regions: bool) -> Tensor:
    """Predictive entropy in nats.

        u = -sum_c p ln(p + 1e-6)                        classes, `(B, 1, *spatial)`, at most ln K
        u = -p ln(p + 1e-6) - (1-p) ln(1-p + 1e-6)       each region, `(B, K, *spatial)`, at most ln 2 [our decision]

    Args:
        mean_probability: `(B, K, *spatial)`, the mean over several noisy passes.
        regions: whether the channels are regions, each against its complement, and not classes.
    """
    entropy = -mean_probability * torch.log(mean_probability + 1e-6)
    if not regions:
        return entropy.sum(1, keepdim=True)
    rest = 1 - mean_probability
    return entropy - rest * torch.log(rest + 1e-6)


def certain_voxels(mean_probability: Tensor, regions: bool, ramp: float) -> Tensor:
    """Where the teacher is certain enough to teach: `u < (0.75 + 0.25 ramp) u_max`, boolean, shaped as `u`.

    `u_max` is ln K for K classes and ln 2 for a region. The released UA-MT program has ln 2 always, which is right
    for two classes only.
    """
    largest = math.log(2 if regions else mean_probability.shape[1])
    return uncertainty(mean_probability, regions) < (0.75 + 0.25 * ramp) * largest
