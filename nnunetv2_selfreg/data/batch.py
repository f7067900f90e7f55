"""The batch of a semi-supervised step, split once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnunetv2_selfreg.tensors import as_list, cut


@dataclass(frozen=True)
class Batch:
    """Samples with labels, and both views of samples without; see :class:`TwoStreamLoader` for how they are loaded."""

    labeled: Tensor
    """Images with labels, `(L, C, *patch)`."""
    strong: Tensor
    """Images without labels, geometry and intensities augmented, `(U, C, *patch)`; U may be 0."""
    weak: Tensor
    """The same samples in the same geometry, intensities as they are, `(U, C, *patch)`."""
    target: list[Tensor]
    """nnU-Net's target of the labelled images at every scale, highest resolution first."""
    further: dict[str, Any] = field(default_factory=dict)
    """What else a batch has: `keys` of all samples, and what the labelled stream adds, such as `distance`."""

    @classmethod
    def split(cls, batch: dict) -> Batch:
        """The batch of a loader, on whatever device it is."""
        target = list(as_list(batch["target"]))
        labeled, strong = cut(batch["data"], len(target[0]))
        known = ("data", "data_weak", "target")
        further = {name: value for name, value in batch.items() if name not in known}
        return cls(labeled, strong, batch.get("data_weak", strong), target, further)

    @cached_property
    def images(self) -> Tensor:
        """The labelled ones, then the strong views: what a network sees in one pass, `(L + U, C, *patch)`.

        A copy, made once: small beside a network's feature maps, and right where a part was replaced."""
        return torch.cat((self.labeled, self.strong))

    def cut(self, output: Any) -> tuple[Any, Any]:
        """A network's output for labelled images and then others, cut into the two; see :func:`tensors.cut`."""
        return cut(output, len(self.labeled))
