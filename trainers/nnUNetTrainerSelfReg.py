from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerSelfReg(SelfRegularized, nnUNetTrainer):
    """nnU-Net regularised by its own last decoder block (SelfReg-UNet, MICCAI 2024)."""

    lambda_scr = 0.015
    lambda_ifd = 0.015
