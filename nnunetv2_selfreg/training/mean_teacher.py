"""Mean teacher: an exponential moving average of the network teaches it on unlabelled images, and serves in the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.losses.consistency import (
    certain_voxels,
    gaussian_ramp_up,
    probabilities,
    squared_consistency,
)
from nnunetv2_selfreg.losses.terms import Weighted
from nnunetv2_selfreg.networks.dropout import add_dropout
from nnunetv2_selfreg.networks.features import unwrap
from nnunetv2_selfreg.tensors import at_full_resolution
from nnunetv2_selfreg.training.teacher import WithTeacher


class MeanTeacher(WithTeacher):
    """Mean teacher (Tarvainen & Valpola, NeurIPS 2017) in the form of UA-MT's released program.

        L = L_seg(labelled) + w ramp(t) mean || p(student(strong)) - p(teacher(weak + noise)) ||^2

    `p` is the softmax, or a sigmoid for each region. The two views of one patch are our decision (published: one view,
    two noises), as is the earlier end of the ramp. For the teacher see :class:`WithTeacher`.
    """

    consistency_weight: float = 0.1
    """`w`, the weight of the consistency at the end of the ramp; UA-MT's published value."""
    teacher_noise: float = 0.1
    """Standard deviation of the noise on the teacher's images, which is clipped at twice that."""
    ramp_up_length = 0.4

    def initialize(self) -> None:
        self._require("consistency_weight", 0 <= self.consistency_weight < math.inf, "finite and 0 at least")
        self._require("teacher_noise", self.teacher_noise >= 0, "0 at least")
        super().initialize()

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        labeled, strong = batch.cut(self.network(batch.images))
        supervised = self.supervised_loss(labeled, batch.target)
        student = probabilities(at_full_resolution(strong), self.label_manager.has_regions)
        with torch.no_grad():
            teacher, kept = self.teach(batch.weak)
        weight = self.terms["consistency_weight"] = self.consistency_weight * self.ramp
        return {
            "segmentation": (1.0, supervised),
            "consistency": (weight, squared_consistency(student, teacher, kept)),
        }

    def teach(self, weak: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's probabilities `(U, K, *spatial)`, and which voxels count: None for all."""
        return self._noisy_probabilities(weak), None

    def _noisy_probabilities(self, weak: Tensor) -> Tensor:
        noise = torch.randn_like(weak) * self.teacher_noise
        return self.teacher_probabilities(weak + noise.clamp(-2 * self.teacher_noise, 2 * self.teacher_noise))


class UncertaintyAwareMeanTeacher(MeanTeacher):
    """Mean teacher that teaches where it is certain (UA-MT, Yu et al., MICCAI 2019).

    Several passes of the teacher, with noise and dropout, give a mean probability, whose entropy is the uncertainty;
    only voxels below `(0.75 + 0.25 ramp(t)) u_max` count, see :func:`certain_voxels`. That ramp lasts the whole
    training, as released, wherever the weight's ends. What is taught is one further pass, as released.

    Student and teacher have dropout, see :func:`add_dropout`. The published V-Net brings it, nnU-Net's networks have
    none; that it comes through hooks is ours, as is that SelfReg reads what the stages gave before it.
    """

    teacher_passes: int = 8
    """Passes of the teacher whose mean gives the uncertainty; the published number."""
    dropout: float = 0.5
    """Probability that a channel of the bottleneck or of the last decoder stage is dropped, in training mode; the
    published value."""

    def initialize(self) -> None:
        self._require("teacher_passes", self.teacher_passes >= 1, "1 at least")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        super().initialize()
        for network in (unwrap(self.network), self.teacher.module):
            add_dropout(network, self.dropout)

    def teach(self, weak: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = sum(self._noisy_probabilities(weak) for _ in range(self.teacher_passes)) / self.teacher_passes
        kept = certain_voxels(mean, self.label_manager.has_regions, gaussian_ramp_up(self.progress))
        self.terms["kept_voxels"] = kept.float().mean()
        return self._noisy_probabilities(weak), kept
