from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.mean_teacher import MeanTeacher, UncertaintyAwareMeanTeacher
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerMeanTeacher(MeanTeacher, nnUNetTrainer):
    """Semi-supervised: a moving average of the network teaches it on unlabelled images (mean teacher)."""


class nnUNetTrainerUAMeanTeacher(UncertaintyAwareMeanTeacher, nnUNetTrainer):
    """Mean teacher that teaches where it is certain (UA-MT, MICCAI 2019)."""


class nnUNetTrainerSelfRegMeanTeacher(SelfRegularized, nnUNetTrainerMeanTeacher):
    """Mean teacher, the student regularised by its own last decoder block."""


class nnUNetTrainerSelfRegUAMeanTeacher(SelfRegularized, nnUNetTrainerUAMeanTeacher):
    """Uncertainty-aware mean teacher, the student regularised by its own last decoder block."""
