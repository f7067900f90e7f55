"""Bidirectional copy-paste: labelled and unlabelled patches in one another; a teacher labels the unlabelled part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch import distributed as dist

from nnunetv2_selfreg.data.foreground import Foreground, as_list
from nnunetv2_selfreg.losses.consistency import gaussian_ramp_up
from nnunetv2_selfreg.mixing import at_size, box_masks, box_sides, largest_components, mix_all
from nnunetv2_selfreg.training.teacher import WithTeacher


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
    """Side of the box to side of the patch."""
    mixture_weight: float = 0.5
    """`v`."""
    unlabeled_weight: float = 0.5
    """`w`, the published value."""
    warm_up: float = 0.1
    """Share of the training in which the mixtures are of labelled samples. If it is `ramp_up_length` or more, there is
    no ramp: the unlabelled part has its full weight right after it."""
    largest_component: bool = False
    """Whether the teacher's labels keep only the largest connected component of each class or region (published; wrong
    for structures of several parts). Computed on the CPU, within the step."""
    ramp_up_length = 0.4
    passes_of_unlabeled = 2
    _needs_unlabeled = False

    def initialize(self) -> None:
        self._require_a_box()
        self._require("mixture_weight", 0 <= self.mixture_weight < math.inf, "finite and 0 at least")
        self._require("unlabeled_weight", 0 <= self.unlabeled_weight < math.inf, "finite and 0 at least")
        self._require("warm_up", 0 <= self.warm_up <= 1, "between 0 and 1")
        super().initialize()
        self.partial_loss = self._build_loss()
        enable_ignoring(self.partial_loss, self.foreground)
        self._look_for_partners()

    def _require_a_box(self) -> None:
        try:
            box_sides(self.configuration_manager.patch_size, self.box_ratio)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}.box_ratio: {error} ({self.configuration_name})") from error

    def _look_for_partners(self) -> None:
        """A single labelled sample is mixed with itself where no unlabelled one is pasted, which brings nothing."""
        whole = self.configuration_manager.batch_size
        fewest = whole // dist.get_world_size() if self.is_ddp else self.batch_size
        if fewest > 1:
            return
        self._require(
            "unlabeled_batch_size",
            self.unlabeled_batch_size != 0,
            "1 at least, or None, where a GPU has one labelled sample a step, which has no other to be mixed with",
        )
        if self.warm_up > 0:
            self.print_to_log_file("One labelled sample a step and GPU: until the warm-up ends it is mixed with itself")

    @property
    def warming_up(self) -> bool:
        """Whether this step's mixtures are of labelled samples: to the end if there are no others."""
        return self.unlabeled_batch_size == 0 or self.progress < self.warm_up

    @property
    def ramp(self) -> float:
        """Weight of the unlabelled part, from the end of the warm-up on, full at `ramp_up_length`."""
        if self.ramp_up_length <= self.warm_up:
            return 1.0
        return gaussian_ramp_up(self.progress - self.warm_up, self.ramp_up_length - self.warm_up)

    def student_batch(self, batch: dict) -> dict:
        """The labelled samples, then for each unlabelled one (without any: for each labelled one) the mixture `x_in`,
        then all `x_out`. Their targets are `mixed_target` at every scale, the unlabelled sample's (in the warm-up the
        second labelled one's) where `other_part` `(2 U, 1, *spatial)` is True.

        Raises:
            ValueError: the batch has no labelled sample.
        """
        target = as_list(batch["target"])
        labeled, strong = batch["data"][: len(target[0])], batch["data"][len(target[0]) :]
        if not len(labeled):
            raise ValueError(f"{type(self).__name__} mixes with labelled samples; this batch has no labelled sample")
        count = len(strong) or len(labeled)
        first, second = self.pairs([labeled, *target], count)
        masks = box_masks(count, labeled.shape[2:], self.box_ratio, labeled.device)
        if self.warming_up:
            inward, outward = mix_all(first, second, masks), mix_all(second, first, masks)
        else:
            other = [strong, *self.pseudo_labels(batch["data_weak"], target)]
            inward, outward = mix_all(first, other, masks), mix_all(other, second, masks)
        mixtures, *mixed_target = map(torch.cat, zip(inward, outward, strict=True))
        return {
            **batch,
            "data": torch.cat((labeled, mixtures)),
            "mixed_target": mixed_target,
            "other_part": torch.cat((~masks, masks)),
        }

    @staticmethod
    def pairs(labeled: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of the labelled samples, given as images and targets at every scale, `count` for `x_l` and `count` for
        `x_l'`, different ones where there are two."""
        index = torch.arange(count, device=labeled[0].device)
        first, second = ([values[(index + shift) % len(values)] for values in labeled] for shift in (0, 1))
        return first, second

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

    def semi_supervised_loss(self, output, target, batch) -> Tensor:
        other = batch["other_part"]
        mixtures = [scale[-len(other) :] for scale in output]
        terms = {
            "segmentation": self.supervised_loss(output, target),
            "labeled_part": self.loss_of_part(mixtures, batch["mixed_target"], ~other),
            "unlabeled_part": self.loss_of_part(mixtures, batch["mixed_target"], other),
        }
        weight = 1.0 if self.warming_up else self.unlabeled_weight * self.ramp
        self.keep_terms({**terms, "unlabeled_part_weight": torch.tensor(weight)})
        mixed = terms["labeled_part"] + weight * terms["unlabeled_part"]
        return terms["segmentation"] + self.mixture_weight * mixed

    def loss_of_part(self, output: Sequence[Tensor], target: Sequence[Tensor], part: Tensor) -> Tensor:
        """Sum over `x_in` and `x_out` of nnU-Net's loss where a part is.

        At a scale so coarse that no voxel of a sample is in the part, its loss is a constant.

        Args:
            output: of all mixtures at every scale, `(2 U, K, *spatial)`.
            target: likewise, `(2 U, 1 or R, *spatial)`.
            part: boolean, `(2 U, 1, *spatial)`, at full resolution.
        """
        kept = [self.foreground.ignore_elsewhere(scale, at_size(part, scale.shape[2:])) for scale in target]
        return sum(
            self.apply_loss(self.partial_loss, [s.chunk(2)[half] for s in output], [s.chunk(2)[half] for s in kept])
            for half in (0, 1)
        )

    def _unlabeled_of_this_rank(self) -> int:
        samples = super()._unlabeled_of_this_rank()
        if self.is_ddp and self.configuration_manager.batch_dice and self.unlabeled_batch_size:
            # The Dice of the mixtures is summed over processes, sample by sample.
            processes = dist.get_world_size()
            self._require(
                "unlabeled_batch_size",
                self.unlabeled_batch_size % processes == 0,
                f"divisible by the number of processes, {processes}, which share the Dice of a batch here",
            )
        return samples


def enable_ignoring(loss: nn.Module, foreground: Foreground) -> None:
    """Changes nnU-Net's loss so that it leaves out what :meth:`Foreground.ignore_elsewhere` marks, also in a data set
    without an ignore label.

    Raises:
        NotImplementedError: it is not Dice with cross-entropy, whose way to ignore voxels is known. (TopK counts
            ignored voxels among those of which it takes the worst.)
    """
    inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    if isinstance(inner, DC_and_CE_loss):
        inner.ignore_label = inner.ce.ignore_index = foreground.ignored_label
    elif not isinstance(inner, DC_and_BCE_loss):
        raise NotImplementedError(
            "copy-paste needs nnU-Net's loss of Dice and cross-entropy, which can be made to ignore voxels; the loss "
            f"here is {type(inner).__name__}"
        )
    elif not inner.use_ignore_label:
        inner.use_ignore_label = True
        inner.ce.reduction = "none"
        inner.weight_ce /= foreground.count  # with an ignore label nnU-Net adds the regions' terms up
