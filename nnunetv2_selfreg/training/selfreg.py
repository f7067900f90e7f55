"""SelfReg as a loss: it wraps the one that nnU-Net has built, and the training step stays as it is."""

from __future__ import annotations

from nnunetv2_selfreg.losses import SelfRegularizedLoss
from nnunetv2_selfreg.networks.features import FeatureTaps
from nnunetv2_selfreg.training.reliable import ReliableTraining


class SelfRegularized(ReliableTraining):
    """Regularises the network by its own last decoder block (SelfReg-UNet, Zhu et al., MICCAI 2024).

    Put it before the trainer it regularises: `class Mine(SelfRegularized, nnUNetTrainer)`. For networks with
    `.encoder.stages` and `.decoder.stages`; others raise NotImplementedError at initialisation. With both lambdas 0 the
    loss is the other trainer's own, untouched.
    """

    lambda_scr: float = 0.015
    """Weight of the semantic consistency; the published value for a U-Net on Synapse."""
    lambda_ifd: float = 0.015
    """Weight of the internal feature distillation; the published value for a U-Net on Synapse."""
    ifd_order: str = "activation"
    """How IFD sorts channels before it halves them: "activation" (released program) or "index" (paper)."""
    ifd_stop_gradient: bool = False
    """Whether IFD's first half is a teacher without gradient: False (released program) or True (paper)."""
    feature_taps: type[FeatureTaps] = FeatureTaps
    """Reads the feature maps; a subclass of it may read other ones."""
    regularized_loss: type[SelfRegularizedLoss] = SelfRegularizedLoss
    """Computes the terms and adds them; a subclass of it may compute them in another way."""

    def initialize(self) -> None:
        # Not in _build_loss: what that makes stays the segmentation loss, of which a trainer may build further ones.
        super().initialize()
        if self.lambda_scr == self.lambda_ifd == 0:
            return
        self.loss = self.regularized_loss(
            self.loss,
            self.feature_taps(self.network),
            self.lambda_scr,
            self.lambda_ifd,
            self.ifd_order,
            self.ifd_stop_gradient,
            self.terms,
        )
