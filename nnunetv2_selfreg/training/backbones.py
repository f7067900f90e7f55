"""Trainers about an architecture: another network in the place of the planned one."""

from __future__ import annotations

from typing import ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_selfreg.errors import SettingError, UnsupportedError, show_alone
from nnunetv2_selfreg.networks.kmax import KMaxUXNet
from nnunetv2_selfreg.networks.mask_decoder import PUBLISHED, QUERIES, MaskDecoderSizes
from nnunetv2_selfreg.networks.swin import SwinUNETR
from nnunetv2_selfreg.networks.uxnet import UXNet
from nnunetv2_selfreg.training.checks import check_patch
from nnunetv2_selfreg.training.optimizers import WarmUpAdamW
from nnunetv2_selfreg.training.queries import QuerySegmentation


class Backbone(WarmUpAdamW):
    """Builds its own network, for training and for prediction, out of its attributes.

    nnU-Net asks the class for the network when it predicts, so whatever changes the weights' shapes must be an
    attribute of the class.
    """

    activation_checkpointing: bool = False
    """Whether blocks compute their activations anew in the backward pass: less memory, more time, the same results."""
    drop_path: float = 0.0
    """Largest probability of stochastic depth, reached in the deepest block."""

    @classmethod
    def network_of_plan(
        cls, configuration: ConfigurationManager, input_channels: int, num_classes: int, deep_supervision: bool
    ) -> nn.Module:
        """The network.

        Args:
            configuration: of the plan: its patch size, strides and kernel sizes.
            input_channels: of the image, and in a cascade of the previous stage.
            num_classes: channels of its outputs.
            deep_supervision: whether it has several.

        Raises:
            ValueError, NotImplementedError: the plan is none for it.
        """
        raise NotImplementedError

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        show_alone()  # also when nnU-Net predicts
        try:
            return cls.network_of_plan(
                configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )
        except (ValueError, NotImplementedError) as error:
            kind = SettingError if isinstance(error, ValueError) else UnsupportedError
            raise kind(f"{cls.__name__} with {plans_manager.plans_name}: {error}") from error


class UXNetBackbone(Backbone):
    """3D UX-Net (Lee et al., ICLR 2023) with the plan's strides and dimension; its widths are not the plan's."""

    width: int = 48
    """Channels at full resolution; they double up to eight times that."""
    deepest: int = 768
    """Channels of the bottleneck's residual block."""
    layer_scale: float = 1e-6
    """Initial value of the factor of each block's residual branch (layer scale), the published value."""

    network_class: ClassVar[type[UXNet]] = UXNet

    @classmethod
    def network_of_plan(
        cls, configuration: ConfigurationManager, input_channels: int, num_classes: int, deep_supervision: bool
    ) -> nn.Module:
        check_patch(configuration.patch_size, configuration.pool_op_kernel_sizes)
        return cls.network_class(
            input_channels,
            num_classes,
            configuration.pool_op_kernel_sizes,
            configuration.network_arch_init_kwargs["kernel_sizes"],
            deep_supervision,
            **cls.network_arguments(),
        )

    @classmethod
    def network_arguments(cls) -> dict:
        """Those of the network that are attributes."""
        return {
            "width": cls.width,
            "deepest": cls.deepest,
            "drop_path": cls.drop_path,
            "layer_scale": cls.layer_scale,
            "activation_checkpointing": cls.activation_checkpointing,
        }


class KMaxUXNetBackbone(QuerySegmentation, UXNetBackbone):
    """UX-Net with the k-means mask decoder, which :class:`QuerySegmentation` trains; what serves at inference is the
    segmentation by queries."""

    queries: int = QUERIES
    """Number of cluster centres: an eighth for the background, equal shares of the rest for the other classes."""

    mask_decoder_sizes: MaskDecoderSizes = PUBLISHED
    """Widths and layers of the mask decoder; the defaults are kMaX-DeepLab's."""

    network_class = KMaxUXNet

    @classmethod
    def network_arguments(cls) -> dict:
        return {**super().network_arguments(), "queries": cls.queries, "sizes": cls.mask_decoder_sizes}


class SwinUNETRBackbone(Backbone):
    """SwinUNETR (Hatamizadeh et al., 2022), MONAI's, for 2D and 3D and any patch size; without deep supervision.

    It halves every axis five times, whatever the plan's strides, and has no heads at lower resolutions, as published.
    """

    feature_size: int = 48
    """Channels at full resolution, a multiple of 12."""

    @classmethod
    def network_of_plan(
        cls, configuration: ConfigurationManager, input_channels: int, num_classes: int, _deep_supervision: bool
    ) -> nn.Module:
        return SwinUNETR(
            input_channels,
            num_classes,
            len(configuration.patch_size),
            cls.feature_size,
            cls.drop_path,
            cls.activation_checkpointing,
        )

    def initialize(self) -> None:
        self.enable_deep_supervision = False
        super().initialize()
