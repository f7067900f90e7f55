"""Variants of mean teacher that docs/results.md reports on: found with `nnUNet_extTrainer=trainers:scripts/trials`."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.mean_teacher import MeanTeacher


class nnUNetTrainerMeanTeacherWeight1(MeanTeacher, nnUNetTrainer):
    """Ten times the published weight."""

    consistency_weight = 1.0


class nnUNetTrainerMeanTeacherWeight10(MeanTeacher, nnUNetTrainer):
    """A hundred times the published weight."""

    consistency_weight = 10.0


class nnUNetTrainerMeanTeacherWeight100(MeanTeacher, nnUNetTrainer):
    """A thousand times the published weight."""

    consistency_weight = 100.0
