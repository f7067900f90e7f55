from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.backbones import SwinUNETRBackbone
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerSwinUNETR(SwinUNETRBackbone, nnUNetTrainer):
    """SwinUNETR in the place of the planned network (needs MONAI: pip install "monai>=1.5" einops)."""


class nnUNetTrainerSelfRegSwinUNETR(SelfRegularized, nnUNetTrainerSwinUNETR):
    """SwinUNETR, regularised by its own last decoder block (needs MONAI as well)."""
