"""The loss of a k-means mask decoder: nnU-Net's on its segmentation and on the convolutional heads, and one on the
queries' assignment (Dual KMax UX-Net, arXiv 2311.12364)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nnunetv2_selfreg.errors import SettingError
from nnunetv2_selfreg.losses.terms import OwnTerms, Terms
from nnunetv2_selfreg.tensors import average_pool, pooled_to_each_shape

if TYPE_CHECKING:
    from nnunetv2_selfreg.networks.kmax import KMaxOutput


def query_distribution_loss(log_assignment: Tensor, shares: Tensor) -> Tensor:
    """Negative log-likelihood of the merged assignment, the mean over all voxels that have a label.

        L_qd = - sum_{voxels} sum_k y_k log A_k / sum_{voxels} sum_k y_k

    Ours: the mean over labelled voxels (of the released programs one sums and one takes the mean over voxels and
    classes, both without an epsilon for the logarithm), and at coarser resolutions the share `y_k` of class k in what a
    voxel covers, so that each label counts.

    Args:
        log_assignment: logarithm of the merged assignment, `(B, K, *spatial)`.
        shares: `y`, see :func:`class_shares`, of the same shape.

    Returns:
        Scalar; 0 where no voxel has a label.

    >>> query_distribution_loss(torch.tensor([[[0.5], [0.5]]]).log(), torch.tensor([[[0.0], [1.0]]]))
    tensor(0.6931)
    """
    shares = shares.to(log_assignment.dtype)
    return -(shares * log_assignment).sum() / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)


def class_shares(labels: Tensor, shape: Sequence[int], num_classes: int) -> Tensor:
    """Share of each class in what each voxel of a coarser `shape` covers of a label map.

    Args:
        labels: label map, `(B, 1, *spatial)`, of any dtype. Other labels than 0 to K - 1, as the ignore label, are no
            class's, so shares may sum to less than 1.
        shape: spatial shape of the result.
        num_classes: K.

    Returns:
        `(B, K, *shape)` in single precision.
    """
    # One class after the other: all of them at full resolution may be a gigabyte.
    return torch.cat([average_pool((labels == label).float(), shape) for label in range(num_classes)], 1)


class KMaxLoss(nn.Module):
    """Sums nnU-Net's loss of the query segmentation, that of the convolutional heads, and the queries' own.

        L = L_seg(S) + L_seg(heads), with deep supervision, + query_weight * mean over layers of L_qd

    In validation too, so its validation loss is not comparable with stock nnU-Net's. Ours: the mean over the layers, so
    that the weight does not depend on their number (kMaX-DeepLab sums), and the weight.

    `query_segmentation`, `convolutional` and `query_distribution` are noted in `terms`, without weights. nnU-Net gives
    the lowest head no weight, so with three resolution stages `convolutional` is the full resolution's.

    Args:
        loss: nnU-Net's loss with deep supervision, whose `.loss` is that of a single scale.
        query_weight: finite and not negative.
        terms: where terms are noted; who owns it empties it before each step. When absent, those of the last call.

    Raises:
        ValueError: impossible `query_weight`.
    """

    def __init__(self, loss: nn.Module, query_weight: float = 0.1, terms: Terms | None = None) -> None:
        super().__init__()
        if not 0 <= query_weight < float("inf"):
            raise SettingError(f"query_weight is {query_weight}, it must be finite and not negative")
        self.loss = loss
        self.query_weight = query_weight
        self.terms = OwnTerms() if terms is None else terms

    def forward(self, output: KMaxOutput, target: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar.

        Args:
            output: of the network.
            target: label maps `(B, 1, *spatial)`, one for each convolutional head, from full to low resolution.
        """
        return self.terms.total(
            {
                "query_segmentation": (1.0, self.loss.loss(output.segmentation, target[0])),
                "convolutional": (1.0, self.loss(output.convolutional, target)),
                "query_distribution": (
                    self.query_weight,
                    self._query_distribution(output.log_assignments, target[0]),
                ),
            }
        )

    @staticmethod
    def _query_distribution(log_assignments: list[Tensor], labels: Tensor) -> Tensor:
        *_, finest = log_assignments  # of the masks
        shares = class_shares(labels, finest.shape[2:], finest.shape[1])
        pooled = pooled_to_each_shape(shares, {tuple(a.shape[2:]) for a in log_assignments})
        return torch.stack([query_distribution_loss(a, pooled[tuple(a.shape[2:])]) for a in log_assignments]).mean()
