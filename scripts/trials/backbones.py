"""Narrow networks for the benchmark's CPU scale, and optimisers to compare: found with
`nnUNet_extTrainer=trainers:scripts/trials`. 16 channels at full resolution, as that scale's stock network has."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.backbones import KMaxUXNetBackbone, SwinUNETRBackbone, UXNetBackbone
from nnunetv2_selfreg.training.optimizers import WarmUpAdamW
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class StockOptimizer:
    """nnU-Net's SGD with momentum 0.99 and its learning rate of 0.01, without a warm-up."""

    configure_optimizers = nnUNetTrainer.configure_optimizers


class nnUNetTrainerAdamW(WarmUpAdamW, nnUNetTrainer):
    """The planned network with the optimiser of the others: what they gain may be its doing."""


class nnUNetTrainerUXNetNarrow(UXNetBackbone, nnUNetTrainer):
    """UX-Net, 16 to 128 channels."""

    width, deepest = 16, 128


class nnUNetTrainerUXNetNarrowSGD(StockOptimizer, nnUNetTrainerUXNetNarrow):
    """With nnU-Net's optimiser."""


class nnUNetTrainerUXNetNarrowSlow(nnUNetTrainerUXNetNarrow):
    """With the published learning rate."""

    learning_rate = 1e-4


class nnUNetTrainerUXNetNarrowFast(nnUNetTrainerUXNetNarrow):
    """With four times the default learning rate."""

    learning_rate = 2e-3


class nnUNetTrainerSelfRegUXNetNarrow(SelfRegularized, nnUNetTrainerUXNetNarrow):
    """Regularised by its own last decoder block."""


class nnUNetTrainerKMaxUXNetNarrow(KMaxUXNetBackbone, nnUNetTrainer):
    """UX-Net of 16 to 128 channels with the k-means mask decoder in its full width."""

    width, deepest = 16, 128


class nnUNetTrainerKMaxUXNetNarrowSGD(StockOptimizer, nnUNetTrainerKMaxUXNetNarrow):
    """With nnU-Net's optimiser."""


class nnUNetTrainerSwinUNETRNarrow(SwinUNETRBackbone, nnUNetTrainer):
    """SwinUNETR of 12 to 192 channels."""

    feature_size = 12


class nnUNetTrainerSwinUNETRNarrowSGD(StockOptimizer, nnUNetTrainerSwinUNETRNarrow):
    """With nnU-Net's optimiser."""


class nnUNetTrainerSelfRegSwinUNETRNarrow(SelfRegularized, nnUNetTrainerSwinUNETRNarrow):
    """Regularised by its own last decoder block."""
