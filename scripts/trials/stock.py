"""Stock nnU-Net as docs/copy-paste.md compares with it: found with `nnUNet_extTrainer=trainers:scripts/trials`."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerTriple(nnUNetTrainer):
    """Three times the plan's samples a step, as many as copy-paste's student sees, of which nnU-Net places the same
    share on foreground as of the plan's batch."""

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        placed = self.batch_size - round(self.batch_size * (1 - self.oversample_foreground_percent))
        self.oversample_foreground_percent = placed / self.batch_size
        self.batch_size *= 3
