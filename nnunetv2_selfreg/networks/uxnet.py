"""3D UX-Net as nnU-Net would plan it: any strides, two or three dimensions, nnU-Net's decoder interface.

Source: Lee et al., "3D UX-Net: A Large Kernel Volumetric ConvNet Modernizing Hierarchical Transformer for Medical Image
Segmentation", ICLR 2023. With four isotropic halvings and the default widths this is the released network: trunk
1.31 M, whole 53.0 M parameters. Ours are the strides and kernels of a plan, two dimensions, affine instance norms and
the heads of deep supervision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_instancenorm
from dynamic_network_architectures.building_blocks.regularization import DropPath
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.unet_residual_decoder import UNetResDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_selfreg.networks.blocks import ChannelNorm, check_drop_path, recompute

LARGE_KERNEL = 7
BLOCKS_PER_STAGE = 2
EXPANSION = 4
FEWEST_STAGES = 3


class UXNet(nn.Module):
    """A trunk of large depthwise convolutions, a residual block on each of its resolutions, a residual decoder.

    Args:
        input_channels: of the image.
        num_classes: channels of each output.
        strides: for each resolution stage one number an axis, the first stage's being 1; their number is the number of
            stages, three at least, their length the dimension, 2 or 3.
        kernel_sizes: of the residual blocks, for each stage one odd number an axis. Where it is 1, the depthwise
            convolutions of the trunk have 1 on that axis too, otherwise 7.
        deep_supervision: whether the output is a list, from full to low resolution, without the bottleneck.
        width: channels at full resolution and of the first trunk stage; they double with each stage up to eight times
            that (48, 96, 192, 384, published).
        deepest: channels of the bottleneck's residual block (768, published).
        drop_path: largest probability of stochastic depth, reached in the last block, growing from 0 (0, published).
        layer_scale: initial value of the blocks' layer scale (1e-6, published).
        activation_checkpointing: whether blocks compute their activations anew in the backward pass.
        decoder: builds the decoder; called with the encoder, `num_classes`, the number of residual blocks of each
            stage, and `deep_supervision`.

    Raises:
        NotImplementedError: fewer than three stages.
        ValueError: the first stage has a stride, kernel sizes are even or not as many as strides, or another argument
            is impossible.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        deep_supervision: bool = True,
        width: int = 48,
        deepest: int = 768,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
        activation_checkpointing: bool = False,
        decoder: Callable[..., UNetResDecoder] = UNetResDecoder,
    ) -> None:
        super().__init__()
        _check_plan(strides, kernel_sizes)
        _check_sizes(width=width, deepest=deepest)
        check_drop_path(drop_path)
        if not 0 <= layer_scale < float("inf"):
            raise ValueError(f"layer_scale is {layer_scale}, it must be finite and not negative")
        self.encoder = UXNetEncoder(input_channels, strides, kernel_sizes, width, deepest, drop_path, layer_scale)
        # The released network has a second block at full resolution.
        blocks = [1] * (len(strides) - 2) + [2]
        self.decoder = decoder(self.encoder, num_classes, blocks, deep_supervision)
        if activation_checkpointing:
            recompute(self.blocks())

    def blocks(self) -> list[nn.Module]:
        """The modules that activation checkpointing computes anew, each as a whole."""
        return [module for module in self.modules() if isinstance(module, (UXBlock, BasicBlockD))]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        return self.decoder(self.encoder(image))


class UXNetEncoder(nn.Module):
    """The trunk, and a residual block on the image and on each trunk stage's normalised output: these are the skips.

    `stages[0]` is the residual block on the image, the others are the trunk's stages: what is read of an encoder is the
    path from one resolution to the next, without the blocks that prepare it for the decoder. The attributes are those
    that decoders of dynamic-network-architectures ask for.
    """

    def __init__(
        self,
        input_channels: int,
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        width: int,
        deepest: int,
        drop_path: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.conv_op = convert_dim_to_conv_op(len(strides[0]))
        self.conv_bias = False
        self.norm_op = get_matching_instancenorm(self.conv_op)
        self.norm_op_kwargs = {"eps": 1e-5, "affine": True}
        self.dropout_op = self.dropout_op_kwargs = None
        self.nonlin, self.nonlin_kwargs = nn.LeakyReLU, {"inplace": True}
        self.strides = [tuple(stride) for stride in strides]
        self.kernel_sizes = [tuple(kernel) for kernel in kernel_sizes]
        widths = [width * min(2**stage, 8) for stage in range(len(strides) - 1)]
        self.output_channels = [*widths, deepest]

        probabilities = np.linspace(0, drop_path, BLOCKS_PER_STAGE * len(widths)).reshape(-1, BLOCKS_PER_STAGE)
        large_kernels = [tuple(LARGE_KERNEL if k > 1 else 1 for k in kernel) for kernel in self.kernel_sizes]
        downsampling = [
            stem(self.conv_op, input_channels, width, large_kernels[1], self.strides[1]),
            *(
                nn.Sequential(ChannelNorm(before), self.conv_op(before, after, stride, stride))
                for (before, after), stride in zip(pairwise(widths), self.strides[2:], strict=True)
            ),
        ]
        trunk = (
            nn.Sequential(down, *(UXBlock(self.conv_op, channels, kernel, float(p), layer_scale) for p in of_stage))
            for down, channels, kernel, of_stage in zip(
                downsampling, widths, large_kernels[1:], probabilities, strict=True
            )
        )
        self.stages = nn.ModuleList([self._residual_block(input_channels, 0), *trunk])
        self.norms = nn.ModuleList(ChannelNorm(channels) for channels in widths)
        self.skips = nn.ModuleList(self._residual_block(channels, stage) for stage, channels in enumerate(widths, 1))

    def forward(self, image: Tensor) -> list[Tensor]:
        """The skips, from full resolution to the bottleneck."""
        skips, feature = [self.stages[0](image)], image
        for stage, norm, skip in zip(self.stages[1:], self.norms, self.skips, strict=True):
            feature = stage(feature)
            skips.append(skip(norm(feature)))
        return skips

    def _residual_block(self, input_channels: int, stage: int) -> nn.Module:
        return StackedResidualBlocks(
            1,
            self.conv_op,
            input_channels,
            self.output_channels[stage],
            self.kernel_sizes[stage],
            initial_stride=1,
            conv_bias=self.conv_bias,
            norm_op=self.norm_op,
            norm_op_kwargs=self.norm_op_kwargs,
            nonlin=self.nonlin,
            nonlin_kwargs=self.nonlin_kwargs,
        )


class UXBlock(nn.Module):
    """x + layer_scale * project(GELU(expand(norm(depthwise(x))))), where expand and project work on each channel by
    itself (`groups` = channels), as released."""

    def __init__(
        self, conv_op: type[nn.Module], channels: int, kernel: Sequence[int], drop_path: float, layer_scale: float
    ) -> None:
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        # Plain: on a CPU it is given channels_last_3d, in which it is fastest, by what precedes (docs/networks.md).
        self.depthwise = conv_op(channels, channels, tuple(kernel), padding=padding, groups=channels)
        self.norm = ChannelNorm(channels)
        self.expand = conv_op(channels, EXPANSION * channels, 1, groups=channels)
        self.project = conv_op(EXPANSION * channels, channels, 1, groups=channels)
        self.layer_scale = nn.Parameter(torch.full((channels, *(1 for _ in kernel)), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, feature: Tensor) -> Tensor:
        # Layer scale, and so the trunk, stays in single precision under autocast: half precision has no normal 1e-6.
        hidden = F.gelu(self.expand(self.norm(self.depthwise(feature))))
        return feature + self.drop_path(self.layer_scale * self.project(hidden))


def stem(
    conv_op: type[nn.Module], input_channels: int, width: int, kernel: Sequence[int], stride: Sequence[int]
) -> nn.Sequential:
    """A large convolution with the first stride, and a norm."""
    padding = tuple(k // 2 for k in kernel)
    return nn.Sequential(conv_op(input_channels, width, tuple(kernel), tuple(stride), padding), ChannelNorm(width))


def _check_sizes(**sizes: int) -> None:
    wrong = {name: size for name, size in sizes.items() if size < 1}
    if wrong:
        raise ValueError(f"{', '.join(f'{name} is {size}' for name, size in wrong.items())}, it must be 1 at least")


def _check_plan(strides: Sequence[Sequence[int]], kernel_sizes: Sequence[Sequence[int]]) -> None:
    if len(strides) < FEWEST_STAGES:
        raise NotImplementedError(
            f"UX-Net needs {FEWEST_STAGES} resolution stages at least, here are {len(strides)}. Use a configuration "
            "with more, or plan for a larger patch."
        )
    if [np.size(kernel) for kernel in kernel_sizes] != [np.size(stride) for stride in strides]:
        raise ValueError(
            f"UX-Net needs a kernel size for each stage and axis: there are the strides {list(strides)} and the "
            f"kernel_sizes {list(kernel_sizes)}. Correct kernel_sizes."
        )
    if any(axis != 1 for axis in strides[0]):
        raise ValueError(
            f"the first resolution stage has the stride {list(strides[0])}, UX-Net needs 1 on every axis. Correct "
            "strides."
        )
    even = [list(kernel) for kernel in kernel_sizes if any(axis % 2 == 0 for axis in kernel)]
    if even:
        raise ValueError(f"there is the kernel size {even[0]}, UX-Net needs odd numbers. Correct kernel_sizes.")
