"""Variants of copy-paste that docs/copy-paste.md reports on: found with `nnUNet_extTrainer=trainers:scripts/trials`."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.data.foreground import as_list
from nnunetv2_selfreg.training.copy_paste import CopyPaste


class nnUNetTrainerCopyPasteSmallBox(CopyPaste, nnUNetTrainer):
    """A box of a third of each side."""

    box_ratio = 1 / 3


class nnUNetTrainerCopyPasteHalfBox(CopyPaste, nnUNetTrainer):
    """A box of half of each side."""

    box_ratio = 1 / 2


class nnUNetTrainerCopyPasteLargeBox(CopyPaste, nnUNetTrainer):
    """A box of five sixths of each side."""

    box_ratio = 5 / 6


class nnUNetTrainerCopyPasteUnlabeled0(CopyPaste, nnUNetTrainer):
    """Only the labelled part of mixtures counts: the unlabelled voxels are a background for it."""

    unlabeled_weight = 0.0


class nnUNetTrainerCopyPasteUnlabeled1(CopyPaste, nnUNetTrainer):
    """An unlabelled voxel counts as much as a labelled one."""

    unlabeled_weight = 1.0


class nnUNetTrainerCopyPasteMixture1(CopyPaste, nnUNetTrainer):
    """Mixtures count as much as labelled samples."""

    mixture_weight = 1.0


class nnUNetTrainerCopyPasteNoWarmUp(CopyPaste, nnUNetTrainer):
    """Unlabelled patches from the first step on."""

    warm_up = 0.0


class nnUNetTrainerCopyPasteLongWarmUp(CopyPaste, nnUNetTrainer):
    """Mixtures of labelled samples for 40 % of the training, and a ramp that ends at 70 % (as long after it)."""

    warm_up = 0.4
    ramp_up_length = 0.7


class nnUNetTrainerCopyPasteLabeledOnly(CopyPaste, nnUNetTrainer):
    """Mixtures of labelled samples to the end: an augmentation, without any unlabelled voxel."""

    warm_up = 1.0


class nnUNetTrainerCopyPasteUnmixed(CopyPaste, nnUNetTrainer):
    """Labelled samples again in the place of their mixtures: the same losses and the average, but nothing pasted."""

    warm_up = 1.0

    def student_batch(self, batch):
        mixed, target = super().student_batch(batch), as_list(batch["target"])
        labeled = [batch["data"][: len(target[0])], *target]
        again, *again_target = map(torch.cat, zip(*self.pairs(labeled, len(mixed["other_part"]) // 2), strict=True))
        return {**mixed, "data": torch.cat((labeled[0], again)), "mixed_target": again_target}


class nnUNetTrainerCopyPasteNoRamp(CopyPaste, nnUNetTrainer):
    """Full weight right after the warm-up, as published."""

    ramp_up_length = 1e-6


class nnUNetTrainerCopyPasteNoTeacher(CopyPaste, nnUNetTrainer):
    """The network labels for itself, and is what predicts."""

    ema_decay = 0.0


class nnUNetTrainerCopyPasteOwnLabels(CopyPaste, nnUNetTrainer):
    """The network labels for itself; its average predicts."""

    def pseudo_labels(self, weak, target):
        with self.teacher_weights():  # the weights change places, so the teacher has the network's here
            return super().pseudo_labels(weak, target)


class nnUNetTrainerCopyPasteLargest(CopyPaste, nnUNetTrainer):
    """The largest component of each class in the teacher's labels, as published."""

    largest_component = True


class nnUNetTrainerCopyPasteOneView(CopyPaste, nnUNetTrainer):
    """The teacher reads the strong view too, as published."""

    def student_batch(self, batch):
        return super().student_batch({**batch, "data_weak": batch["data"][-len(batch["data_weak"]) :]})


class nnUNetTrainerCopyPasteWeakViews(CopyPaste, nnUNetTrainer):
    """The unlabelled part of mixtures is of weak views."""

    def student_batch(self, batch):
        weak = batch["data_weak"]
        return super().student_batch({**batch, "data": torch.cat((batch["data"][: -len(weak)], weak))})


class nnUNetTrainerCopyPasteMixturesOnly(CopyPaste, nnUNetTrainer):
    """The published batch: the student sees mixtures alone, with full weight, so two thirds of the samples a step."""

    mixture_weight = 1.0

    def student_batch(self, batch):
        mixed = super().student_batch(batch)
        return {**mixed, "data": mixed["data"][-len(mixed["other_part"]) :]}

    def supervised_loss(self, output, _target):
        return 0 * output[0].sum()
