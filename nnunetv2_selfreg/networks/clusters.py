"""What queries say of voxels: they are cluster centres, and each class has a group of them.

Sources: Yu et al., "k-means Mask Transformer", ECCV 2022; Wu, Li, Zhang, "Dual KMax UX-Net", ISBI 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_selfreg.tensors import at_least_single


def hard_assignment(mask_logits: Tensor) -> Tensor:
    """One for the query with the largest mask logit of each voxel, `(B, N, *spatial)`; without gradient.

    >>> hard_assignment(torch.tensor([[[0.1, 2.0], [0.3, -1.0]]]))
    tensor([[[0., 1.],
             [1., 0.]]])
    """
    mask_logits = mask_logits.detach()
    return torch.zeros_like(mask_logits).scatter_(1, mask_logits.argmax(1, keepdim=True), 1)


def cluster_means(values: Tensor, assignment: Tensor) -> Tensor:
    """Mean of the values `(B, C, *spatial)` over the voxels of each query's cluster, `(B, C, N)`; 0 of an empty one.

    In single precision at least: a cluster may have more voxels than half precision can count.
    """
    with torch.autocast(values.device.type, enabled=False):
        values = at_least_single(values).flatten(2)
        assignment = assignment.to(values.dtype).flatten(2)
        return (values @ assignment.transpose(1, 2)) / assignment.sum(2)[:, None].clamp_min(1)


def log_query_distribution(mask_logits: Tensor) -> Tensor:
    """Logarithm of the softmax over the queries of `(B, N, *spatial)`, in single precision at least."""
    return F.log_softmax(at_least_single(mask_logits), 1)


def merged(log_distribution: Tensor, groups: Sequence[int]) -> Tensor:
    """Logarithm of the query distribution summed over each class's group, `(B, N, *spatial)` to `(B, K, *spatial)`."""
    return torch.stack([part.logsumexp(1) for part in log_distribution.split(list(groups), 1)], 1)


def group_members(groups: Sequence[int]) -> Tensor:
    """One where a query belongs to a class, `(K, N)`.

    >>> group_members([1, 2])
    tensor([[1., 0., 0.],
            [0., 1., 1.]])
    """
    return torch.block_diag(*(torch.ones(1, size) for size in groups))


def query_groups(queries: int, num_classes: int) -> list[int]:
    """How many of the queries belong to each class: an eighth to the background, the others share the rest equally, and
    what remains goes to the last (our decision).

    Raises:
        ValueError: a class would have none.

    >>> query_groups(128, 3)
    [16, 56, 56]
    """
    if queries < (enough := fewest_queries(num_classes)):
        raise ValueError(
            f"{queries} queries are too few for {num_classes} classes: background gets an eighth, each other class an "
            f"equal share of the rest, at least one each. Raise `queries` to {enough} or more."
        )
    background = queries // 8
    share = (queries - background) // max(num_classes - 1, 1)
    groups = [background, *[share] * (num_classes - 1)]
    groups[-1] += queries - sum(groups)
    return groups


def fewest_queries(num_classes: int) -> int:
    """With which each class has one.

    >>> fewest_queries(114)
    129
    """
    return next(queries for queries in count(8) if queries - queries // 8 >= num_classes - 1)
