"""Bidirectional copy-paste: labelled and unlabelled patches in one another; a teacher labels the unlabelled part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from torch import Tensor, nn
from torch import distributed as dist

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.data.foreground import Foreground
from nnunetv2_selfreg.data.mixing import at_size, box_masks, box_sides, largest_components, mix_all
from nnunetv2_selfreg.errors import SettingError, UnsupportedError
from nnunetv2_selfreg.losses.consistency import gaussian_ramp_up
from nnunetv2_selfreg.losses.terms import Weighted
from nnunetv2_selfreg.tensors import cut
from nnunetv2_selfreg.training.teacher import WithTeacher


class Mixtures(NamedTuple):
    """What copy-paste makes of a batch: all `x_in`, then all `x_out`."""

    images: Tensor
    """Images, `(2 U, C, *patch)`."""
    target: list[Tensor]
    """Their targets at every scale, `(2 U, 1 or R, *spatial)`."""
    other: Tensor
    """Where the unlabelled sample (in the warm-up the second labelled one) is: boolean, `(2 U, 1, *patch)`."""


class CopyPaste(WithTeacher):
    """Bidirectional copy-paste (BCP, Bai et al., CVPR 2023) in one training, beside nnU-Net's own samples.

        x_in = x_l M + x_u (1 - M),    x_out = x_u M + x_l' (1 - M),    y likewise, the teacher's where x is unlabelled
        L = L_seg(labelled) + v [ L_mix(x_in) + L_mix(x_out) ]
        L_mix = L_seg(labelled part) + ramp(t) w L_seg(unlabelled part)

    `M` is 0 in a box of 2/3 of each side at a random place. `L_seg` of a part is nnU-Net's loss, all other voxels being
    ignored. The teacher labels the weak view, mixtures are made of strong views.

    Published: a training with labelled patches in one another, then another one with these mixtures alone, without a
    ramp. Our decisions: one training, in whose first tenth `x_in = x_l M + x_l' (1 - M)`, and `x_out` is the other way
    round, with full weight; the ramp begins after it; the plain labelled samples stay in the batch; an unlabelled
    sample is in both mixtures, published are two different ones; with `unlabeled_batch_size = 0` no unlabelled sample
    is needed: the mixtures are of labelled ones to the end.
    """

    box_ratio: float = 2 / 3
    """Ratio of the box's side to the patch's; the published value."""
    mixture_weight: float = 0.5
    """`v`, the weight of both mixtures' loss beside that of the plain labelled samples."""
    unlabeled_weight: float = 0.5
    """`w`, the weight of a mixture's unlabelled part at the end of the ramp; the published value."""
    mixture_warm_up: float = 0.1
    """Share of the training in which the mixtures are of labelled samples. If it is `ramp_up_length` or more, there is
    no ramp: the unlabelled part has its full weight right after it."""
    largest_component: bool = False
    """Whether the teacher's labels keep only the largest connected component of each class or region (published; wrong
    for structures of several parts). Computed on the CPU, within the step."""
    ramp_up_length = 0.4
    passes_of_unlabeled = 2
    _needs_unlabeled = False
    _dice_of_unlabeled = True

    def initialize(self) -> None:
        self._require_a_box()
        self._require("mixture_weight", 0 <= self.mixture_weight < math.inf, "finite and 0 at least")
        self._require("unlabeled_weight", 0 <= self.unlabeled_weight < math.inf, "finite and 0 at least")
        self._require("mixture_warm_up", 0 <= self.mixture_warm_up <= 1, "between 0 and 1")
        super().initialize()
        self.partial_loss = self._build_loss()
        enable_ignoring(self.partial_loss, self.foreground)
        self._look_for_a_second_sample()

    def _require_a_box(self) -> None:
        try:
            box_sides(self.configuration_manager.patch_size, self.box_ratio)
        except ValueError as error:
            raise SettingError(f"{type(self).__name__}.box_ratio: {error} ({self.configuration_name})") from error

    def _look_for_a_second_sample(self) -> None:
        """A single labelled sample is mixed with itself where no unlabelled one is pasted, which brings nothing."""
        whole = self.configuration_manager.batch_size
        fewest = whole // dist.get_world_size() if self.is_ddp else self.batch_size
        if fewest > 1:
            return
        self._require(
            "unlabeled_batch_size",
            self.unlabeled_batch_size != 0,
            "1 at least, or None, where a GPU has one labelled sample a step, which has no other to be mixed with. Or "
            "raise the plan's batch_size",
        )
        if self.mixture_warm_up > 0:
            self.print_to_log_file("One labelled sample a step and GPU: until the warm-up ends it is mixed with itself")

    @property
    def warming_up(self) -> bool:
        """Whether this step's mixtures are of labelled samples: to the end if there are no others."""
        return self.unlabeled_batch_size == 0 or self.progress < self.mixture_warm_up

    @property
    def ramp(self) -> float:
        """Weight of the unlabelled part, from the end of the warm-up on, full at `ramp_up_length`."""
        if self.ramp_up_length <= self.mixture_warm_up:
            return 1.0
        return gaussian_ramp_up(self.progress - self.mixture_warm_up, self.ramp_up_length - self.mixture_warm_up)

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        mixtures = self.mixtures(batch)
        labeled, mixed = batch.cut(self.network(torch.cat((batch.labeled, mixtures.images))))
        supervised = self.supervised_loss(labeled, batch.target)
        # In this order its sum is, to the bit, s + v (l + w u), as it was when results in the docs were made.
        return {**self.mixture_terms(mixed, mixtures), "segmentation": (1.0, supervised)}

    def mixture_terms(self, output: Any, mixtures: Mixtures) -> dict[str, Weighted]:
        """The terms of both parts of the mixtures, of which `output` is the network's."""
        weight = 1.0 if self.warming_up else self.unlabeled_weight * self.ramp
        self.terms["unlabeled_part_weight"] = weight
        labeled = self.loss_of_part(output, mixtures.target, ~mixtures.other)
        unlabeled = self.loss_of_part(output, mixtures.target, mixtures.other)
        return {
            "labeled_part": (self.mixture_weight, labeled),
            "unlabeled_part": (self.mixture_weight * weight, unlabeled),
        }

    def mixtures(self, batch: Batch) -> Mixtures:
        """For each unlabelled sample (without any: for each labelled one) the mixture `x_in`, then all `x_out`.

        Raises:
            ValueError: the batch has no labelled sample.
        """
        if not len(batch.labeled):
            raise SettingError(f"{type(self).__name__} mixes with labelled samples; this batch has no labelled sample")
        count = len(batch.strong) or len(batch.labeled)
        first, second = self.pairs([batch.labeled, *batch.target], count)
        masks = box_masks(count, batch.labeled.shape[2:], self.box_ratio, batch.labeled.device)
        if self.warming_up:
            inward, outward = mix_all(first, second, masks), mix_all(second, first, masks)
        else:
            other = [batch.strong, *self.labels_of_unlabeled(batch)]
            inward, outward = mix_all(first, other, masks), mix_all(other, second, masks)
        images, *target = map(torch.cat, zip(inward, outward, strict=True))
        return Mixtures(images, target, torch.cat((~masks, masks)))

    @staticmethod
    def pairs(labeled: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of the labelled samples, given as images and targets at every scale, `count` for `x_l` and `count` for
        `x_l'`, different ones where there are two."""
        index = torch.arange(count, device=labeled[0].device)
        first, second = ([values[(index + shift) % len(values)] for values in labeled] for shift in (0, 1))
        return first, second

    def labels_of_unlabeled(self, batch: Batch) -> list[Tensor]:
        """Labels of the batch's unlabelled samples, in the form and at the scales of its target: the teacher's."""
        return self.pseudo_labels(batch.weak, batch.target)

    def pseudo_labels(self, weak: Tensor, target: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's labels of the weak views `(U, C, *spatial)`, in the form and at the scales of `target`: labels
        `(U, 1, *spatial)`, or regions and, with an ignore label, a last channel of ignored voxels."""
        probabilities = self.teacher_probabilities(weak)
        regions = self.foreground.regions
        labels = probabilities > 0.5 if regions else probabilities.argmax(1, keepdim=True)
        if self.largest_component:
            labels = largest_components(labels)
        ignored = torch.zeros_like(labels[:, : target[0].shape[1] - labels.shape[1]])  # of regions, a further channel
        labels = torch.cat((labels, ignored), 1)
        return [at_size(labels, scale.shape[2:]).to(scale.dtype) for scale in target]

    def loss_of_part(self, output: Any, target: Sequence[Tensor], part: Tensor) -> Tensor:
        """Sum over `x_in` and `x_out` of nnU-Net's loss where a part is.

        At a scale so coarse that no voxel of a sample is in the part, its loss is a constant.

        Args:
            output: the network's, of all `2 U` mixtures.
            target: at every scale, `(2 U, 1 or R, *spatial)`.
            part: boolean, `(2 U, 1, *spatial)`, at full resolution.
        """
        kept = [self.foreground.ignore_elsewhere(scale, at_size(part, scale.shape[2:])) for scale in target]
        inward, outward = zip(*(cut(values, len(part) // 2) for values in (output, kept)), strict=True)
        return self.apply_loss(self.partial_loss, *inward) + self.apply_loss(self.partial_loss, *outward)


def enable_ignoring(loss: nn.Module, foreground: Foreground) -> None:
    """Changes nnU-Net's loss so that it leaves out what :meth:`Foreground.ignore_elsewhere` marks, also in a data set
    without an ignore label. (The k-means network's further loss leaves it out anyway.)

    Raises:
        NotImplementedError: it is not Dice with cross-entropy, whose way to ignore voxels is known. (TopK counts
            ignored voxels among those of which it takes the worst.)
    """
    inner = loss
    while hasattr(inner, "loss"):  # deep supervision, the k-means network's further terms
        inner = inner.loss
    if isinstance(inner, DC_and_CE_loss):
        inner.ignore_label = inner.ce.ignore_index = foreground.ignored_label
    elif not isinstance(inner, DC_and_BCE_loss):
        raise UnsupportedError(
            "copy-paste needs nnU-Net's loss of Dice and cross-entropy, which can be made to ignore voxels; the loss "
            f"here is {type(inner).__name__}"
        )
    elif not inner.use_ignore_label:
        inner.use_ignore_label = True
        inner.ce.reduction = "none"
        inner.weight_ce /= foreground.count  # with an ignore label nnU-Net adds the regions' terms up
