from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.backbones import KMaxUXNetBackbone
from nnunetv2_selfreg.training.query_consistency import QueryConsistency
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerDualKMaxUXNet(QueryConsistency, KMaxUXNetBackbone, nnUNetTrainer):
    """Semi-supervised: two views must agree on the segmentation and on the queries (Dual KMax UX-Net, ISBI 2024)."""


class nnUNetTrainerSelfRegDualKMaxUXNet(SelfRegularized, nnUNetTrainerDualKMaxUXNet):
    """Dual KMax UX-Net, regularised by its own last decoder block."""
