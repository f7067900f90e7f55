from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.dual_task import DualTask, DualTaskMutual
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerDualTask(DualTask, nnUNetTrainer):
    """Semi-supervised: segmentation and signed distance from one network must agree (DTC, AAAI 2021)."""


class nnUNetTrainerDualTaskMutual(DualTaskMutual, nnUNetTrainer):
    """Semi-supervised: a network for the segmentation and one for the distance teach each other (DTML, PRCV 2021)."""


class nnUNetTrainerSelfRegDualTask(SelfRegularized, nnUNetTrainerDualTask):
    """Dual-task consistency, the network regularised by its own last decoder block."""


class nnUNetTrainerSelfRegDualTaskMutual(SelfRegularized, nnUNetTrainerDualTaskMutual):
    """Dual-task mutual learning, the segmentation network regularised by its own last decoder block."""
