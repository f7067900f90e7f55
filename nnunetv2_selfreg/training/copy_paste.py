"""Bidirectional copy-paste: labelled and unlabelled patches in one another; a teacher labels the unlabelled part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from nnunetv2_selfreg.losses.copy_paste import at_size, both_ways, box_masks, box_sides, largest_components
from nnunetv2_selfreg.training.teacher import WithTeacher


class CopyPaste(WithTeacher):
    """Bidirectional copy-paste (BCP, Bai et al., CVPR 2023) in one training, beside nnU-Net's own samples.

        x_in = x_l M + x_u (1 - M),    x_out = x_u M + x_l' (1 - M),    y likewise, the teacher's where x is unlabelled
        L = L_seg(labelled) + v [ L_seg(mixtures, labelled part) + ramp(t) w L_seg(mixtures, unlabelled part) ]

    `M` is 0 in a box of 2/3 of each side at a random place. `L_seg` of a part is nnU-Net's loss, all other voxels being
    ignored. The teacher labels the weak view, mixtures are made of strong views.

    Published: a training with labelled patches in one another, then another one with these mixtures alone, without a
    ramp. Our decisions: one training, whose first tenth mixes labelled samples; then the ramp; the plain labelled
    samples stay in the batch; an unlabelled sample is in both mixtures, published are two different ones.
    """

    box_ratio: float = 2 / 3
    """Side of the box to side of the patch."""
    mixture_weight: float = 0.5
    """`v`."""
    unlabeled_weight: float = 0.5
    """`w`, the published value."""
    warm_up: float = 0.1
    """Share of the training in which the mixtures are of labelled samples."""
    largest_component: bool = False
    """Whether the teacher's labels keep only the largest connected component of each class or region (published; wrong
    for structures of several parts). Computed on the CPU."""
    ramp_up_length = 0.4

    def initialize(self) -> None:
        self._require("box_ratio", 0 < self.box_ratio < 1, "between 0 and 1")
        self._require("mixture_weight", 0 <= self.mixture_weight < math.inf, "finite and 0 at least")
        self._require("unlabeled_weight", 0 <= self.unlabeled_weight < math.inf, "finite and 0 at least")
        self._require("warm_up", 0 <= self.warm_up < 1, "in [0, 1)")
        box_sides(self.configuration_manager.patch_size, self.box_ratio)  # raises if the box is empty
        super().initialize()
        self._terms: dict[str, Tensor] = {}

    def _build_loss(self) -> nn.Module:
        # Of the parts of mixtures, with voxels to ignore whether or not the data set has such.
        self._partial_loss = that_ignores(super()._build_loss(), self.label_manager)
        return super()._build_loss()

    def student_batch(self, batch: dict) -> dict:
        """The labelled samples, then for each unlabelled one both mixtures, whose targets are `mixed_target` at every
        scale, labelled where `labeled_part` `(2 U, 1, *spatial)` is True."""
        target = _as_list(batch["target"])
        labeled, strong = batch["data"][: len(target[0])], batch["data"][len(target[0]) :]
        if not len(labeled):
            raise ValueError(
                f"{type(self).__name__} needs labelled samples to mix with: this batch has no labelled sample"
            )
        partner = torch.arange(len(strong), device=strong.device) % len(labeled)
        mine = [labeled[partner], *(scale[partner] for scale in target)]
        if self.progress < self.warm_up:
            theirs = [values.roll(1, 0) for values in mine]
        else:
            theirs = [strong, *self.pseudo_labels(batch["data_weak"], target)]
        masks = box_masks(len(strong), strong.shape[2:], self.box_ratio, strong.device)
        mixtures, *mixed_target = [both_ways(a, b, masks) for a, b in zip(mine, theirs, strict=True)]
        return {
            **batch,
            "data": torch.cat((labeled, mixtures)),
            "mixed_target": mixed_target,
            "labeled_part": torch.cat((masks, ~masks)),
        }

    @torch.no_grad()
    def pseudo_labels(self, weak: Tensor, target: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's labels of the weak views, in the form and at the scales of `target`."""
        probabilities = self.teacher_probabilities(weak)
        if self.label_manager.has_regions:
            labels = probabilities > 0.5
            extra = target[0].shape[1] - labels.shape[1]  # the channel of ignored voxels, of which there are none
            labels = torch.cat((labels, torch.zeros_like(labels[:, :extra])), 1)
        else:
            labels = probabilities.argmax(1, keepdim=True)
        if self.largest_component:
            labels = largest_components(labels, self.label_manager.has_regions)
        return [at_size(labels, scale.shape[2:]).to(scale.dtype) for scale in target]

    def semi_supervised_loss(self, output, target, batch) -> Tensor:
        supervised = self.supervised_loss(output, target)
        mixtures = [scale[-len(batch["labeled_part"]) :] for scale in output]
        labeled = self._loss_of_part(mixtures, batch["mixed_target"], batch["labeled_part"])
        unlabeled = self._loss_of_part(mixtures, batch["mixed_target"], ~batch["labeled_part"])
        weight = 1.0 if self.progress < self.warm_up else self.unlabeled_weight * self.ramp
        self._terms = {
            "segmentation": supervised.detach(),
            "labeled_part": labeled.detach(),
            "unlabeled_part": unlabeled.detach(),
            "unlabeled_weight": torch.tensor(weight),
        }
        return supervised + self.mixture_weight * (labeled + weight * unlabeled)

    def _loss_of_part(self, output: Sequence[Tensor], target: Sequence[Tensor], part: Tensor) -> Tensor:
        """nnU-Net's loss where `part` is True, at every scale."""
        kept = [ignore_elsewhere(scale, at_size(part, scale.shape[2:]), self.label_manager) for scale in target]
        return self._partial_loss(list(output), kept) if len(kept) > 1 else self._partial_loss(output[0], kept[0])

    def loss_terms(self) -> dict[str, Tensor]:
        return {**self._terms, **super().loss_terms()}


def that_ignores(loss: nn.Module, manager: LabelManager) -> nn.Module:
    """nnU-Net's loss, changed so that it leaves out voxels of :func:`ignored_label` (labels), or of a last channel
    (regions), also in a data set without an ignore label."""
    inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    if not manager.has_regions:
        inner.ignore_label = inner.ce.ignore_index = ignored_label(manager)
    elif not inner.use_ignore_label:
        inner.use_ignore_label = True
        inner.ce.reduction = "none"
        inner.weight_ce /= len(manager.foreground_regions)  # with an ignore label nnU-Net adds the regions' terms up
    return loss


def ignored_label(manager: LabelManager) -> int:
    """The data set's ignore label, or the first number that is no label."""
    return manager.ignore_label if manager.has_ignore_label else max(manager.all_labels) + 1


def ignore_elsewhere(target: Tensor, part: Tensor, manager: LabelManager) -> Tensor:
    """`target` with all voxels ignored where `part` `(B, 1, *spatial)` is False."""
    if not manager.has_regions:
        return torch.where(part, target, ignored_label(manager))
    regions = len(manager.foreground_regions)
    ignored = target[:, regions:].bool() | ~part if manager.has_ignore_label else ~part
    return torch.cat((target[:, :regions], ignored.to(target.dtype)), 1)


def _as_list(target) -> list[Tensor]:
    return target if isinstance(target, list) else [target]
