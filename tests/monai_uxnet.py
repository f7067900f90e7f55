"""3D UX-Net as its authors put it together, of MONAI's UNETR blocks: what ours must compute too."""

from __future__ import annotations

import torch
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

from nnunetv2_selfreg.networks.uxnet import UXNet

NORM = ("instance", {"affine": True})


class PublishedBlock(nn.Module):
    """A block of the trunk, with the permutations of the released program."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Conv3d(channels, 4 * channels, 1, groups=channels)
        self.project = nn.Conv3d(4 * channels, channels, 1, groups=channels)
        self.layer_scale = nn.Parameter(torch.ones(channels))

    def forward(self, feature: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(feature).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        hidden = self.project(nn.functional.gelu(self.expand(hidden))).permute(0, 2, 3, 4, 1)
        return feature + (self.layer_scale * hidden).permute(0, 4, 1, 2, 3)


class PublishedNorm(nn.Module):
    """LayerNorm over channels that come first, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, feature: Tensor) -> Tensor:
        mean = feature.mean(1, keepdim=True)
        variance = (feature - mean).pow(2).mean(1, keepdim=True)
        normalised = (feature - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None, None] * normalised + self.bias[:, None, None, None]


class Assembled(nn.Module):
    """A trunk of large kernels, `UnetrBasicBlock` on its stages, `UnetrUpBlock` as decoder; with the strides, widths,
    weights and heads of deep supervision of one of our networks, which is 3D with kernels of 3 on every axis."""

    def __init__(self, network: UXNet) -> None:
        super().__init__()
        encoder, decoder = network.encoder, network.decoder
        strides, outputs = encoder.strides, encoder.output_channels
        widths = outputs[:-1]
        image_channels = encoder.stages[1][0][0].in_channels
        self.downsampling = nn.ModuleList(
            [nn.Sequential(nn.Conv3d(image_channels, widths[0], 7, strides[1], 3), PublishedNorm(widths[0]))]
            + [
                nn.Sequential(PublishedNorm(before), nn.Conv3d(before, after, stride, stride))
                for before, after, stride in zip(widths, widths[1:], strides[2:], strict=False)
            ]
        )
        self.blocks = nn.ModuleList(nn.Sequential(PublishedBlock(width), PublishedBlock(width)) for width in widths)
        self.norms = nn.ModuleList(PublishedNorm(width) for width in widths)
        inputs = [image_channels, *widths]
        self.skips = nn.ModuleList(
            UnetrBasicBlock(3, before, after, 3, 1, NORM, res_block=True)
            for before, after in zip(inputs, outputs, strict=True)
        )
        self.ups = nn.ModuleList(
            UnetrUpBlock(3, outputs[i], outputs[i - 1], 3, strides[i], NORM, res_block=True)
            for i in range(len(outputs) - 1, 0, -1)
        )
        self.last = UnetrBasicBlock(3, outputs[0], outputs[0], 3, 1, NORM, res_block=True)
        self.heads = nn.ModuleList(nn.Conv3d(head.in_channels, head.out_channels, 1) for head in decoder.seg_layers)
        self._copy(network)

    def forward(self, image: Tensor) -> list[Tensor]:
        skips, feature = [self.skips[0](image)], image
        for down, blocks, norm, skip in zip(self.downsampling, self.blocks, self.norms, self.skips[1:], strict=True):
            feature = blocks(down(feature))
            skips.append(skip(norm(feature)))
        feature, outputs = skips[-1], []
        for number, (up, head, skip) in enumerate(zip(self.ups, self.heads, skips[-2::-1], strict=True), 1):
            feature = up(feature, skip)
            feature = self.last(feature) if number == len(self.ups) else feature
            outputs.append(head(feature))
        return outputs[::-1]

    def _copy(self, network: UXNet) -> None:
        encoder, decoder = network.encoder, network.decoder
        trunk = [encoder.stages[1:], encoder.norms]
        theirs = [parameter for stage in zip(self.downsampling, self.blocks, strict=True) for parameter in _all(stage)]
        _fill([*theirs, *_all(self.norms)], _all(trunk))
        _fill(_all(self.heads), _all(decoder.seg_layers))
        _fill([p for up in self.ups for p in up.transp_conv.parameters()], _all(decoder.transpconvs))
        ours = [encoder.stages[0], *encoder.skips, *decoder.stages]
        blocks = [block for part in ours for block in part.blocks]
        for mine, block in zip([*self.skips, *(up.conv_block for up in self.ups), self.last], blocks, strict=True):
            mine = getattr(mine, "layer", mine)
            parts = [(mine.conv1, block.conv1.conv), (mine.norm1, block.conv1.norm)]
            parts += [(mine.conv2, block.conv2.conv), (mine.norm2, block.conv2.norm)]
            if hasattr(mine, "conv3"):
                parts += [(mine.conv3, block.skip[0].conv), (mine.norm3, block.skip[0].norm)]
            for target, source in parts:
                _fill(_all([target]), _all([source]))


def _all(modules) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


@torch.no_grad()
def _fill(parameters: list[nn.Parameter], values: list[nn.Parameter]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value.reshape(parameter.shape))
