"""Stock nnU-Net as docs/copy-paste.md compares with it: found with `nnUNet_extTrainer=trainers:scripts/trials`."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerTriple(nnUNetTrainer):
    """Three times the plan's samples a step, as many as copy-paste's student sees."""

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        self.batch_size *= 3
