from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.backbones import KMaxUXNetBackbone, UXNetBackbone
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerUXNet(UXNetBackbone, nnUNetTrainer):
    """3D UX-Net in the place of the planned network (ICLR 2023)."""


class nnUNetTrainerKMaxUXNet(KMaxUXNetBackbone, nnUNetTrainer):
    """UX-Net that segments by clusters of voxels, with a k-means mask decoder (kMaX, ECCV 2022)."""


class nnUNetTrainerSelfRegUXNet(SelfRegularized, nnUNetTrainerUXNet):
    """UX-Net, regularised by its own last decoder block."""
