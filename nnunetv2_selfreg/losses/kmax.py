"""The loss of a k-means mask decoder: nnU-Net's on its segmentation and on the convolutional heads, and one on the
queries' assignment (Dual KMax UX-Net, arXiv 2311.12364; the released program has no loss on the query segmentation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nnunetv2_selfreg.losses.selfreg import average_pool

if TYPE_CHECKING:
    from nnunetv2_selfreg.networks.kmax import KMaxOutput


def query_distribution_loss(log_assignment: Tensor, labels: Tensor, ignore_label: int | None = None) -> Tensor:
    """Negative log-likelihood of the merged assignment, the mean over all voxels that have a label.

        L_qd = - sum_{voxels} sum_k y_k log A_k / number of labelled voxels

    At a coarser resolution `y_k` is the share of class k in the voxels that a coarse one covers, so that each label
    counts (our decision, as is the mean: the released program sums, without an epsilon for the logarithm).

    Args:
        log_assignment: logarithm of the merged assignment, `(B, K, *spatial)`.
        labels: label map at full resolution, `(B, 1, *spatial)`, of any dtype.
        ignore_label: of voxels that do not count.

    Returns:
        Scalar; 0 where no voxel has a label.

    >>> query_distribution_loss(torch.tensor([[[0.5], [0.5]]]).log(), torch.tensor([[[1]]]))
    tensor(0.6931)
    """
    shares = class_shares(labels, log_assignment.shape[2:], log_assignment.shape[1], ignore_label)
    shares = shares.to(log_assignment.dtype)
    tiny = torch.finfo(shares.dtype).tiny
    return -(shares * log_assignment).sum() / shares.sum().clamp_min(tiny)


def class_shares(labels: Tensor, shape: Sequence[int], num_classes: int, ignore_label: int | None = None) -> Tensor:
    """Share of each class in what each voxel of a coarser `shape` covers of a label map, `(B, K, *shape)`.

    In single precision. Ignored voxels belong to no class, so shares may sum to less than 1.
    """
    one_hot = [(labels[:, 0] == label) & (label != ignore_label) for label in range(num_classes)]
    return average_pool(torch.stack(one_hot, 1).float(), shape)


class KMaxLoss(nn.Module):
    """Sums nnU-Net's loss of the query segmentation, that of the convolutional heads, and the queries' own.

        L = L_seg(S) + L_seg(heads), with deep supervision, + query_weight * mean over layers of L_qd

    `terms` holds the detached scalars of the last call: `segmentation`, `convolutional`, `query_distribution`, without
    weights.

    Args:
        loss: nnU-Net's loss with deep supervision, whose `.loss` is that of a single scale.
        query_weight: 0.1 by default, finite and not negative.
        ignore_label: of voxels that do not count.

    Raises:
        ValueError: impossible `query_weight`.
    """

    def __init__(self, loss: nn.Module, query_weight: float = 0.1, ignore_label: int | None = None) -> None:
        super().__init__()
        if not 0 <= query_weight < float("inf"):
            raise ValueError(f"query_weight is {query_weight}, it must be finite and not negative")
        self.loss = loss
        self.query_weight = query_weight
        self.ignore_label = ignore_label
        self.terms: dict[str, Tensor] = {}

    def forward(self, output: KMaxOutput, target: Sequence[Tensor]) -> Tensor:
        queries = [query_distribution_loss(a, target[0], self.ignore_label) for a in output.log_assignments]
        terms = {
            "segmentation": self.loss.loss(output.segmentation, target[0]),
            "convolutional": self.loss(output.convolutional, target),
            "query_distribution": torch.stack(queries).mean(),
        }
        self.terms = {name: term.detach() for name, term in terms.items()}
        return terms["segmentation"] + terms["convolutional"] + self.query_weight * terms["query_distribution"]
