"""Narrow variants of the architecture trainers: the matrix is about nnU-Net's tool chain, not about 50 M parameters."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.backbones import KMaxUXNetBackbone, SwinUNETRBackbone, UXNetBackbone
from nnunetv2_selfreg.training.query_consistency import QueryConsistency
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerTinyUXNet(UXNetBackbone, nnUNetTrainer):
    width, deepest = 4, 16


class nnUNetTrainerTinyKMaxUXNet(KMaxUXNetBackbone, nnUNetTrainer):
    width, deepest, queries = 4, 16, 24


class nnUNetTrainerTinyDualKMaxUXNet(QueryConsistency, nnUNetTrainerTinyKMaxUXNet):
    pass


class nnUNetTrainerTinyDualKMaxUXNetTwo(nnUNetTrainerTinyDualKMaxUXNet):
    """Two networks."""

    shared_weights = False


class nnUNetTrainerTinySelfRegDualKMaxUXNet(SelfRegularized, nnUNetTrainerTinyDualKMaxUXNet):
    pass


class nnUNetTrainerTinySwinUNETR(SwinUNETRBackbone, nnUNetTrainer):
    feature_size = 12


class nnUNetTrainerTinySelfRegUXNet(SelfRegularized, nnUNetTrainerTinyUXNet):
    pass


class nnUNetTrainerTinySelfRegSwinUNETR(SelfRegularized, nnUNetTrainerTinySwinUNETR):
    pass
