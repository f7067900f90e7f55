"""Variants of SelfReg that docs/selfreg.md reports on: found with `nnUNet_extTrainer=trainers:scripts/trials`."""

from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.losses import SelfRegularizedLoss
from nnunetv2_selfreg.losses.consistency import gaussian_ramp_up
from nnunetv2_selfreg.networks.features import FeatureTaps
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerSelfRegScrOnly(SelfRegularized, nnUNetTrainer):
    """Semantic consistency alone."""

    lambda_ifd = 0.0


class nnUNetTrainerSelfRegIfdOnly(SelfRegularized, nnUNetTrainer):
    """Internal feature distillation alone."""

    lambda_scr = 0.0


class nnUNetTrainerSelfRegTenth(SelfRegularized, nnUNetTrainer):
    """A tenth of the published weight."""

    lambda_scr = lambda_ifd = 0.0015


class nnUNetTrainerSelfRegStrong(SelfRegularized, nnUNetTrainer):
    """The weight published for ACDC."""

    lambda_scr = lambda_ifd = 0.1


class nnUNetTrainerSelfRegPaperIFD(SelfRegularized, nnUNetTrainer):
    """The paper's distillation: index order, one way."""

    ifd_order = "index"
    ifd_stop_gradient = True


class nnUNetTrainerSelfRegWarm(SelfRegularized, nnUNetTrainer):
    """The weights grow from almost nothing over the first 40 % of the training."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        ramp = gaussian_ramp_up(self.current_epoch / self.num_epochs, 0.4)
        self.loss.lambda_scr, self.loss.lambda_ifd = self.lambda_scr * ramp, self.lambda_ifd * ramp


class LossOfUnitFeatures(SelfRegularizedLoss):
    """The terms of feature maps that are divided by their root mean square, so that no gradient changes their scale."""

    def _scr(self, features, final, image):
        return super()._scr([_unit(feature) for feature in features], _unit(final), image)

    def _ifd(self, features):
        return super()._ifd([_unit(feature) for feature in features])


class nnUNetTrainerSelfRegUnit(SelfRegularized, nnUNetTrainer):
    """Every feature map on the same scale."""

    regularized_loss = LossOfUnitFeatures


def _unit(feature):
    return feature / feature.square().mean().sqrt()


class BlockTaps(FeatureTaps):
    """Reads every convolution block of PlainConvUNet's stages."""

    @staticmethod
    def blocks(network):
        return tuple(
            [module for stage in part.stages for module in stage.modules() if isinstance(module, ConvDropoutNormReLU)]
            for part in (network.encoder, network.decoder)
        )


class nnUNetTrainerSelfRegAllBlocks(SelfRegularized, nnUNetTrainer):
    """The terms of every convolution block, as in the released program, not of every stage's output."""

    feature_taps = BlockTaps
