from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.copy_paste import CopyPaste
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerCopyPaste(CopyPaste, nnUNetTrainer):
    """Semi-supervised: labelled and unlabelled patches in one another, a teacher labels the rest (BCP, CVPR 2023)."""


class nnUNetTrainerLabeledCopyPaste(nnUNetTrainerCopyPaste):
    """Labelled patches pasted into each other, an average of the network serves: needs no unlabelled scans."""

    unlabeled_batch_size = 0


class nnUNetTrainerSelfRegCopyPaste(SelfRegularized, nnUNetTrainerCopyPaste):
    """Copy-paste, the student regularised by its own last decoder block."""
