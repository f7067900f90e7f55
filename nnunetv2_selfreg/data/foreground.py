"""Foreground masks in nnU-Net's targets, for classes and for regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor


@dataclass(frozen=True)
class Foreground:
    """What is foreground in a target `(B, 1, *spatial)` of labels, or `(B, R, *spatial)` of regions.

    With an ignore label nnU-Net gives it the next number, or as another channel after the regions.
    """

    count: int
    """Number of foreground classes, or of regions."""
    regions: bool
    """Whether the data set has regions, which may overlap, in the place of classes."""
    ignore_label: int | None
    """Number of the ignore label in the data set, if it has one."""

    @classmethod
    def of(cls, manager: LabelManager) -> Foreground:
        count = len(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        return cls(count, manager.has_regions, manager.ignore_label)

    def masks(self, target: Tensor) -> Tensor:
        """Boolean masks `(B, K, *spatial)`; ignored voxels are in none."""
        if self.regions:
            return (target[:, : self.count] > 0) & self.valid(target)
        labels = torch.arange(1, self.count + 1, device=target.device)
        return target == labels.reshape(1, -1, *[1] * (target.ndim - 2))

    def unknown_labels(self, target: Tensor) -> dict[int, int]:
        """For each sample with labels that are not the data set's, one of them. Regions do not tell: nnU-Net puts a
        voxel of an unknown label into none of them."""
        if self.regions or not len(target):
            return {}
        allowed = self.count if self.ignore_label is None else self.ignore_label
        lowest, highest = target.aminmax()  # of all at once: in a sound batch, that is always, a tenth of the time
        if lowest >= 0 and highest <= allowed:
            return {}
        lowest, highest = target.flatten(1).aminmax(dim=1)
        unknown = torch.where(lowest < 0, lowest, highest)
        return {n: int(label) for n, label in enumerate(unknown) if not 0 <= label <= allowed}

    @property
    def ignored_label(self) -> int:
        """The data set's ignore label, or the first number that is no label."""
        return self.count + 1 if self.ignore_label is None else self.ignore_label

    def ignore_elsewhere(self, target: Tensor, part: Tensor) -> Tensor:
        """`target` with all voxels ignored where `part` `(B, 1, *spatial)` is False: labels get :attr:`ignored_label`,
        regions a last channel of ignored voxels."""
        if not self.regions:
            return torch.where(part, target, self.ignored_label)
        ignored = ~(self.valid(target) & part)
        return torch.cat((target[:, : self.count], ignored.to(target.dtype)), 1)

    def valid(self, target: Tensor) -> Tensor:
        """Which voxels are not ignored: boolean, `(B, 1, *spatial)`."""
        if self.ignore_label is None:
            return torch.ones_like(target[:, :1], dtype=torch.bool)
        return target[:, -1:] < 1 if self.regions else target != self.ignore_label
