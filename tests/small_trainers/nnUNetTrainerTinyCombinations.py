"""Families on other networks than the planned one."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.backbones import KMaxUXNetBackbone, SwinUNETRBackbone
from nnunetv2_selfreg.training.copy_paste import CopyPaste
from nnunetv2_selfreg.training.dual_task import DualTask
from nnunetv2_selfreg.training.mean_teacher import MeanTeacher, UncertaintyAwareMeanTeacher
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class TinyKMaxUXNet(KMaxUXNetBackbone):
    width, deepest, queries = 4, 16, 24


class nnUNetTrainerTinyKMaxMeanTeacher(MeanTeacher, TinyKMaxUXNet, nnUNetTrainer):
    pass


class nnUNetTrainerTinyKMaxUAMeanTeacher(UncertaintyAwareMeanTeacher, TinyKMaxUXNet, nnUNetTrainer):
    pass


class nnUNetTrainerTinyKMaxCopyPaste(CopyPaste, TinyKMaxUXNet, nnUNetTrainer):
    pass


class nnUNetTrainerTinyKMaxDualTask(DualTask, TinyKMaxUXNet, nnUNetTrainer):
    pass


class nnUNetTrainerTinyKMaxSelfRegMeanTeacher(SelfRegularized, nnUNetTrainerTinyKMaxMeanTeacher):
    pass


class nnUNetTrainerTinySwinDualTask(DualTask, SwinUNETRBackbone, nnUNetTrainer):
    feature_size = 12
