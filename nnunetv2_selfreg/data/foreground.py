"""Foreground masks in nnU-Net's targets, for classes and for regions."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Of foreground classes, or of regions."""
    regions: bool
    ignore_label: int | None

    @classmethod
    def of(cls, manager: LabelManager) -> Foreground:
        count = len(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        return cls(count, manager.has_regions, manager.ignore_label)

    def masks(self, target: Tensor, cases: Sequence[str] = ()) -> Tensor:
        """Boolean masks `(B, K, *spatial)`; ignored voxels are in none.

        Raises:
            ValueError: a label is not the data set's; the message names it, and the `cases` of the batch.
        """
        if self.regions:
            return (target[:, : self.count] > 0) & self.valid(target)
        largest, allowed = int(target.max()), self.count if self.ignore_label is None else self.ignore_label
        if largest > allowed:
            named = f" in a batch of {', '.join(map(str, cases))}" if len(cases) else ""
            raise ValueError(f"label {largest}{named} is not among the data set's labels, 0 to {allowed}")
        labels = torch.arange(1, self.count + 1, device=target.device)
        return target == labels.reshape(1, -1, *[1] * (target.ndim - 2))

    def valid(self, target: Tensor) -> Tensor:
        """Which voxels are not ignored: boolean, `(B, 1, *spatial)`."""
        if self.ignore_label is None:
            return torch.ones_like(target[:, :1], dtype=torch.bool)
        return target[:, -1:] < 1 if self.regions else target != self.ignore_label

    def probabilities(self, logits: Tensor) -> Tensor:
        """A network's probabilities of the foreground `(B, K, *spatial)`, in at least single precision: softmax without
        the background, or a sigmoid for each region."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.sigmoid(logits) if self.regions else torch.softmax(logits, 1)[:, 1:]


class LabeledStream:
    """nnU-Net's labelled stream, whose batches have `foreground` too: the masks `(L, K, *patch)` at full resolution."""

    def __init__(self, loader, foreground: Foreground) -> None:
        """`loader` yields nnU-Net's batches."""
        self.loader = loader
        self.of = foreground

    def set_thread_id(self, thread_id: int) -> None:
        self.loader.set_thread_id(thread_id)

    def __iter__(self) -> LabeledStream:
        return self

    def __next__(self) -> dict:
        batch = next(self.loader)
        return {**batch, "foreground": self.of.masks(at_full_resolution(batch["target"]), batch["keys"])}


def at_full_resolution(target: Tensor | list[Tensor]) -> Tensor:
    """nnU-Net's target, or the first one of deep supervision."""
    return target[0] if isinstance(target, list) else target
