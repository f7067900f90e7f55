"""Training of a network that segments by queries: its loss, and where it cannot be trained."""

from __future__ import annotations

from torch import nn

from nnunetv2_selfreg.errors import UnsupportedError
from nnunetv2_selfreg.losses.kmax import KMaxLoss
from nnunetv2_selfreg.training.reliable import ReliableTraining


class QuerySegmentation(ReliableTraining):
    """Adds the losses of a k-means mask decoder to nnU-Net's.

        L = L_seg(query segmentation) + L_seg(convolutional heads) + query_weight L_qd

    The two `L_seg` are nnU-Net's, the second one with deep supervision.
    """

    query_weight: float = 0.1
    """Weight of `L_qd`, the loss of the queries' assignment to classes."""

    for_regions: str = "nnUNetTrainerUXNet"
    """The trainer that is recommended for regions, which this one refuses."""

    def initialize(self) -> None:
        if self.label_manager.has_regions:
            raise UnsupportedError(
                f"{type(self).__name__} gives each voxel to one class, and {self.plans_manager.dataset_name} has "
                f"regions, which overlap. Train them with {self.for_regions}, or put labels without regions into "
                "dataset.json."
            )
        if not self.enable_deep_supervision:
            raise UnsupportedError(
                f"{type(self).__name__} trains its queries with deep supervision only. Leave enable_deep_supervision "
                "True, or use nnUNetTrainerUXNet."
            )
        super().initialize()

    def _build_loss(self) -> nn.Module:
        return KMaxLoss(super()._build_loss(), self.query_weight, self.terms)
