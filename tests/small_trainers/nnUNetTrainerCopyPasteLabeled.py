"""The trainer of docs/copy-paste.md for who has no unlabelled scans."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.copy_paste import CopyPaste


class nnUNetTrainerCopyPasteLabeled(CopyPaste, nnUNetTrainer):
    """Labelled patches pasted into each other; no unlabelled scans."""

    unlabeled_batch_size = 0
