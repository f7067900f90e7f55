"""The k-means mask decoder beside a convolutional decoder: queries are cluster centres of the feature maps' voxels.

Sources: Yu et al., "k-means Mask Transformer", ECCV 2022 (the layer); Wu, Li, Zhang, "Dual KMax UX-Net", ISBI 2024,
arXiv 2311.12364 (3D, query groups, segmentation from the query distribution; the released program never reads the
bottleneck and gives the query segmentation no loss).

    query distribution Q = softmax over the queries of the mask logits           N x voxels
    segmentation       S = sum over the queries of Q * class scores              K x voxels
    merged assignment  A = Q summed over each class's group of queries           K x voxels

Ours: the mean of a cluster's voxels as its centre, followed by LayerNorm, where the original has a sum and batch norm,
since those must work with two samples a step; LayerNorm before each residual branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from dynamic_network_architectures.building_blocks.unet_residual_decoder import UNetResDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_selfreg.networks.blocks import ChannelNorm, resize
from nnunetv2_selfreg.networks.uxnet import UXNet, UXNetEncoder
from nnunetv2_selfreg.tensors import at_least_single

QUERIES = 128


@dataclass(frozen=True)
class MaskDecoderSizes:
    """Sizes of the mask decoder besides the number of queries; the defaults are kMaX-DeepLab's."""

    width: int = 256
    """Channels of a query, and of its values."""
    key_width: int = 128
    """Channels in which voxels and queries are compared; a multiple of `heads`, as `width` is."""
    heads: int = 8
    """Number of heads of the queries' self-attention."""
    feed_forward_width: int = 2048
    """Hidden channels of the block after it."""
    layers_per_level: int = 2
    """k-means layers that read one feature map."""
    levels: int = 3
    """Feature maps that are read, from the bottleneck up; fewer where the decoder has fewer below full resolution."""


PUBLISHED = MaskDecoderSizes()


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

    Without deep supervision the output is the segmentation, and the stage at full resolution is not computed.

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
    """UX-Net's decoder, whose feature maps below full resolution are clustered. Arguments are those of the base."""

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
        below_full = encoder.output_channels[:0:-1]  # from the bottleneck up
        self.mask_decoder = MaskDecoder(encoder.conv_op, below_full, num_classes, queries, sizes)

    def forward(self, skips: list[Tensor]) -> Tensor | KMaxOutput:
        """The segmentation, or with deep supervision all that the loss needs.

        Args:
            skips: of the encoder, from full resolution to the bottleneck.
        """
        features = [skips[-1]]
        stages = list(zip(self.transpconvs, self.stages, skips[-2::-1], strict=True))
        computed = stages if self.deep_supervision else stages[:-1]  # full resolution has a head of the loss alone
        for upsample, stage, skip in computed:
            features.append(stage(torch.cat((upsample(features[-1]), skip), 1)))
        below_full = features[: len(self.stages)]
        segmentation, *log_assignments = self.mask_decoder(*below_full)
        segmentation = resize(segmentation, skips[0].shape[2:])
        if not self.deep_supervision:
            return segmentation
        heads = zip(self.seg_layers, features[1:], strict=True)
        return KMaxOutput(segmentation, [head(feature) for head, feature in heads][::-1], log_assignments)


class MaskDecoder(nn.Module):
    """Updates the queries with the bottleneck and the two deepest decoder levels, two layers each, and reads the masks
    off the feature map of the second stage, in most plans at half resolution: at full resolution 128 queries would take
    a gigabyte a sample. A network of three stages has one decoder level below full resolution, which is all that is
    read then.

    Args:
        channels: of the feature maps below full resolution, from the bottleneck up. The first ones update the queries,
            the masks are read off the last one.
        num_classes: K, with background.
        queries: N.
        sizes: of the rest.

    Raises:
        ValueError: too few queries for the classes.
    """

    def __init__(
        self,
        conv_op: type[nn.Module],
        channels: Sequence[int],
        num_classes: int,
        queries: int,
        sizes: MaskDecoderSizes,
    ) -> None:
        super().__init__()
        self.groups = query_groups(queries, num_classes)
        self.layers_per_level = sizes.layers_per_level
        self.queries = nn.Parameter(torch.randn(queries, sizes.width))
        self.layers = nn.ModuleList(
            KMaxLayer(conv_op, of_level, sizes)
            for of_level in channels[: sizes.levels]
            for _ in range(sizes.layers_per_level)
        )
        self.norm = ChannelNorm(channels[-1])
        self.masks = MaskPredictor(conv_op, channels[-1], sizes)
        self.query_norm = nn.LayerNorm(sizes.width)
        # -pretrained_weights leaves out what has this name, since its shape depends on the number of classes.
        self.seg_layers = nn.Linear(sizes.width, num_classes)

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """The segmentation at the resolution of the last feature map, then the logarithms of all merged assignments.

        Args:
            features: `(B, C, *spatial)` from the bottleneck up to the second stage.
        """
        queries = self.queries.expand(len(features[0]), -1, -1)
        log_assignments = []
        for number, layer in enumerate(self.layers):
            queries, mask_logits = layer(queries, features[number // self.layers_per_level])
            log_assignments.append(merged(log_query_distribution(mask_logits), self.groups))
        log_distribution = log_query_distribution(self.masks(queries, self.norm(features[-1])))
        scores = self.seg_layers(self.query_norm(queries)).to(log_distribution.dtype)
        segmentation = torch.einsum("bn...,bnk->bk...", log_distribution.exp(), scores)
        return segmentation, *log_assignments, merged(log_distribution, self.groups)


class KMaxLayer(nn.Module):
    """k-means cross-attention, self-attention of the queries and a feed-forward block, each on a residual branch.

    The first is a step of k-means: each voxel belongs to the query with its largest mask logit, and each query moves by
    a projection of its voxels' mean. (The original projects to values first; a mean of linear projections is the
    projection of the mean, which needs no map of 256 channels. An empty cluster has the value 0, so its query moves by
    what norm and projection make of that, as in the original.) No gradient passes through the assignment, so the mask
    logits learn from their own loss alone.
    """

    def __init__(self, conv_op: type[nn.Module], channels: int, sizes: MaskDecoderSizes) -> None:
        super().__init__()
        width = sizes.width
        self.norm = ChannelNorm(channels)
        self.masks = MaskPredictor(conv_op, channels, sizes)
        self.value = nn.Linear(channels, width, bias=False)
        self.update = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.attention = nn.Sequential(nn.LayerNorm(width), SelfAttention(sizes))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, sizes.feed_forward_width),
            nn.GELU(),
            nn.Linear(sizes.feed_forward_width, width),
        )

    def forward(self, queries: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The queries `(B, N, width)` after a step, and the mask logits `(B, N, *spatial)` of those before it."""
        feature = self.norm(feature)
        mask_logits = self.masks(queries, feature)
        queries = queries + self.update(self.value(cluster_means(feature, hard_assignment(mask_logits))))
        queries = queries + self.attention(queries)
        return queries + self.feed_forward(queries), mask_logits


class MaskPredictor(nn.Module):
    """Mask logits `(B, N, *spatial)`: the L2-normalised key of each voxel of a feature map `(B, C, *spatial)` times the
    key of each query `(B, N, width)`."""

    def __init__(self, conv_op: type[nn.Module], channels: int, sizes: MaskDecoderSizes) -> None:
        super().__init__()
        self.voxel_key = conv_op(channels, sizes.key_width, 1)
        self.query_key = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.key_width))

    def forward(self, queries: Tensor, feature: Tensor) -> Tensor:
        key = F.normalize(at_least_single(self.voxel_key(feature)), dim=1)  # squares leave half precision's range
        return torch.einsum("bnd,bd...->bn...", self.query_key(queries).to(key.dtype), key)


class SelfAttention(nn.Module):
    """Of the queries; the published one has narrower keys than values, which `nn.MultiheadAttention` has not."""

    def __init__(self, sizes: MaskDecoderSizes) -> None:
        super().__init__()
        width, key_width, self.heads = sizes.width, sizes.key_width, sizes.heads
        self.query, self.key = nn.Linear(width, key_width), nn.Linear(width, key_width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, queries: Tensor) -> Tensor:
        heads = (
            part(queries).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return self.output(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def hard_assignment(mask_logits: Tensor) -> Tensor:
    """One for the query with the largest mask logit of each voxel, `(B, N, *spatial)`; without gradient.

    >>> hard_assignment(torch.tensor([[[0.1, 2.0], [0.3, -1.0]]]))
    tensor([[[0., 1.],
             [1., 0.]]])
    """
    mask_logits = mask_logits.detach()
    return torch.zeros_like(mask_logits).scatter_(1, mask_logits.argmax(1, keepdim=True), 1)


def cluster_means(values: Tensor, assignment: Tensor) -> Tensor:
    """Mean of the values `(B, C, *spatial)` over the voxels of each query's cluster, `(B, N, C)`; 0 of an empty one.

    In single precision at least: a cluster may have more voxels than half precision can count.
    """
    with torch.autocast(values.device.type, enabled=False):
        values = at_least_single(values).flatten(2)
        assignment = assignment.to(values.dtype).flatten(2)
        return (assignment @ values.transpose(1, 2)) / assignment.sum(2, keepdim=True).clamp_min(1)


def log_query_distribution(mask_logits: Tensor) -> Tensor:
    """Logarithm of the softmax over the queries of `(B, N, *spatial)`, in single precision at least."""
    return F.log_softmax(at_least_single(mask_logits), 1)


def merged(log_distribution: Tensor, groups: Sequence[int]) -> Tensor:
    """Logarithm of the query distribution summed over each class's group, `(B, N, *spatial)` to `(B, K, *spatial)`."""
    return torch.stack([part.logsumexp(1) for part in log_distribution.split(list(groups), 1)], 1)


def query_groups(queries: int, num_classes: int) -> list[int]:
    """How many of the queries belong to each class: an eighth to the background, the others share the rest equally, and
    what remains goes to the last (our decision).

    Raises:
        ValueError: a class would have none.

    >>> query_groups(128, 3)
    [16, 56, 56]
    """
    if queries < (enough := fewest_queries(num_classes)):
        raise ValueError(
            f"{queries} queries are too few for {num_classes} classes: background gets an eighth, each other class an "
            f"equal share of the rest, at least one each. Raise `queries` to {enough} or more."
        )
    background = queries // 8
    share = (queries - background) // max(num_classes - 1, 1)
    groups = [background, *[share] * (num_classes - 1)]
    groups[-1] += queries - sum(groups)
    return groups


def fewest_queries(num_classes: int) -> int:
    """With which each class has one.

    >>> fewest_queries(114)
    129
    """
    return next(queries for queries in count(8) if queries - queries // 8 >= num_classes - 1)
