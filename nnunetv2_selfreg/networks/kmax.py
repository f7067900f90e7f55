"""UX-Net with a k-means mask decoder beside its convolutional one.

Source: Wu, Li, Zhang, "Dual KMax UX-Net", ISBI 2024, arXiv 2311.12364 (its released programs never read the bottleneck;
the supervised one gives the query segmentation no loss, the semi-supervised one has no convolutional head).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from dynamic_network_architectures.building_blocks.unet_residual_decoder import UNetResDecoder
from torch import Tensor, nn

from nnunetv2_selfreg.networks.mask_decoder import PUBLISHED, QUERIES, MaskDecoder, MaskDecoderSizes
from nnunetv2_selfreg.networks.uxnet import UXNet, UXNetEncoder


class KMaxOutput(NamedTuple):
    """What the network returns with deep supervision, `(B, K, *spatial)` each."""

    segmentation: Tensor
    """Logits from the queries, at full resolution: what serves at inference."""
    convolutional: list[Tensor]
    """Logits of the convolutional heads, from full to low resolution."""
    log_assignments: list[Tensor]
    """Logarithms of the merged assignments of each layer, then of the final one, each at its own resolution."""


class KMaxUXNet(UXNet):
    """UX-Net whose segmentation comes from queries; its convolutional heads serve deep supervision alone.

    Without deep supervision the output is the segmentation.

    Args:
        queries: their number.
        sizes: of the mask decoder.
        others: those of :class:`UXNet`, but `decoder`.

    Raises:
        ValueError: too few queries for the classes; what UX-Net raises.
    """

    needs_deep_supervision = True  # or nothing teaches the layers which voxels are a query's

    def __init__(self, *arguments, queries: int = QUERIES, sizes: MaskDecoderSizes = PUBLISHED, **options) -> None:
        super().__init__(*arguments, **options, decoder=partial(KMaxDecoder, queries=queries, sizes=sizes))

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), self.decoder.mask_decoder]


class KMaxDecoder(UNetResDecoder):
    """UX-Net's decoder, whose feature maps are clustered. Arguments are those of the base, and the mask decoder's."""

    def __init__(
        self,
        encoder: UXNetEncoder,
        num_classes: int,
        n_conv_per_stage: Sequence[int],
        deep_supervision: bool,
        queries: int,
        sizes: MaskDecoderSizes,
    ) -> None:
        super().__init__(encoder, num_classes, list(n_conv_per_stage), deep_supervision)
        channels, kernels = encoder.output_channels[::-1], encoder.kernel_sizes[::-1]  # from the bottleneck up
        self.mask_decoder = MaskDecoder(encoder.conv_op, channels, kernels, num_classes, queries, sizes)

    def forward(self, skips: list[Tensor]) -> Tensor | KMaxOutput:
        """The segmentation, or with deep supervision all that the loss needs.

        Args:
            skips: of the encoder, from full resolution to the bottleneck.
        """
        features = [skips[-1]]
        for upsample, stage, skip in zip(self.transpconvs, self.stages, skips[-2::-1], strict=True):
            features.append(stage(torch.cat((upsample(features[-1]), skip), 1)))
        segmentation, *log_assignments = self.mask_decoder(*features)
        if not self.deep_supervision:
            return segmentation
        heads = zip(self.seg_layers, features[1:], strict=True)
        return KMaxOutput(segmentation, [head(feature) for head, feature in heads][::-1], log_assignments)
