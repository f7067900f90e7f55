from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.self_training import PseudoLabeledCopyPaste, SelfTraining
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerSelfTraining(SelfTraining, nnUNetTrainer):
    """Semi-supervised: a student of the labels that `nnUNetv2_selfreg pseudo_label` made, beside the labelled cases."""


class nnUNetTrainerSelfTrainingCopyPaste(PseudoLabeledCopyPaste, nnUNetTrainer):
    """Self-training whose labelled and pseudo-labelled patches are pasted into each other."""


class nnUNetTrainerSelfRegSelfTraining(SelfRegularized, nnUNetTrainerSelfTraining):
    """Self-training, the student regularised by its own last decoder block."""
