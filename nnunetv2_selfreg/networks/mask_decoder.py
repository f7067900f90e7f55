"""The k-means mask decoder: queries are cluster centres of the voxels of several feature maps.

Sources: Yu et al., "k-means Mask Transformer" (kMaX-DeepLab), ECCV 2022, and its released program (the layer); Wu, Li,
Zhang, "Dual KMax UX-Net", ISBI 2024 (3D, query groups, segmentation from the query distribution).

    query distribution Q = softmax over the queries of the mask logits           N x voxels
    segmentation       S = sum over the queries of Q * class scores              K x voxels
    merged assignment  A = Q summed over each class's group of queries           K x voxels

As released: activations after projections and residuals, residual branches whose norm starts at 0, mask logits with a
learned scale that starts at 0.1, a depthwise mask head, self-attention that reads the queries before they are updated.

Ours, none of them measured by itself:

* instance norms, of queries over the queries, in the place of batch norms: two samples a step have no statistics
* the mean of a cluster's voxels as its centre, not their sum, so a small cluster counts as much as a large one; and no
  norm of the values before it, which would need a map of 256 channels of them
* similarities of queries are divided by the root of their length and not normed
* mask logits are not normed before their scale, so their deviation may grow with the keys; nor have they a shift, which
  no softmax would see
* the depthwise convolution has 1 in the place of 5 on axes on which the plan has no kernel, as UX-Net's trunk
* the masks at full resolution have no such head, and as many key channels as the feature map (published: 128): both
  would take gigabytes, and the decoder's block has convolved that map just before
* class scores start as torch starts a linear layer, without the bias towards "nothing" of panoptic segmentation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_instancenorm
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_selfreg.networks.clusters import (
    cluster_means,
    group_members,
    hard_assignment,
    log_query_distribution,
    merged,
    query_groups,
)
from nnunetv2_selfreg.tensors import at_least_single

QUERIES = 128
MASK_SCALE = 0.1
MASK_KERNEL = 5
LEAST_ASSIGNMENT = 1e-20  # its logarithm has a gradient that a loss scale cannot make infinite


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

    def __post_init__(self) -> None:
        """Raises ValueError if a size is less than 1, or the heads do not divide the widths."""
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} of the mask decoder is {size}, it must be 1 at least")
        for name in ("width", "key_width"):
            if getattr(self, name) % self.heads:
                raise ValueError(
                    f"{name} of the mask decoder is {getattr(self, name)}, no multiple of heads, {self.heads}"
                )


PUBLISHED = MaskDecoderSizes()


class MaskDecoder(nn.Module):
    """Updates the queries with the bottleneck and the two deepest decoder levels, two layers each, and reads the masks
    off the feature map at full resolution. A network of three stages has one decoder level below that.

    128 mask logits a voxel would take a gigabyte a sample there. They are never stored: segmentation and assignments
    are what attention of the voxels to the queries gives, see :func:`attended`.

    Args:
        channels: of the feature maps, from the bottleneck up to full resolution. The first ones update the queries, the
            masks are read off the last one.
        kernel_sizes: the plan's, of their stages.
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
        kernel_sizes: Sequence[Sequence[int]],
        num_classes: int,
        queries: int,
        sizes: MaskDecoderSizes,
    ) -> None:
        super().__init__()
        self.groups = query_groups(queries, num_classes)
        self.register_buffer("members", group_members(self.groups), persistent=False)
        self.layers_per_level = sizes.layers_per_level
        self.queries = nn.Parameter(torch.randn(sizes.width, queries))
        below_full = list(zip(channels, kernel_sizes, strict=True))[:-1]
        self.layers = nn.ModuleList(
            KMaxLayer(conv_op, of_level, kernel, sizes)
            for of_level, kernel in below_full[: sizes.levels]
            for _ in range(sizes.layers_per_level)
        )
        self.mask_query = projection(nn.Conv1d, sizes.width, sizes.width)
        # As many key channels as the feature map has: 128 of them at full resolution would take gigabytes.
        self.masks = MaskPredictor(conv_op, channels[-1], sizes.width, channels[-1])
        self.class_query = projection(nn.Conv1d, sizes.width, sizes.width)
        # -pretrained_weights leaves out what has this name, since its shape depends on the number of classes.
        self.seg_layers = nn.Conv1d(sizes.width, num_classes, 1)

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """The segmentation, then the logarithms of all merged assignments: of each layer, and at full resolution.

        Args:
            features: `(B, C, *spatial)` from the bottleneck up to full resolution.
        """
        queries = self.queries.expand(len(features[0]), -1, -1)
        log_assignments = []
        for number, layer in enumerate(self.layers):
            queries, mask_logits = layer(queries, features[number // self.layers_per_level])
            log_assignments.append(merged(log_query_distribution(mask_logits), self.groups))
        voxel_keys, query_keys = self.masks.keys(self.mask_query(queries), features[-1])
        scores = self.seg_layers(self.class_query(queries)).to(query_keys.dtype)
        values = torch.cat((scores, self.members.to(scores.dtype).expand(len(scores), -1, -1)), 1)
        segmentation, assignment = attended(voxel_keys, query_keys, values).chunk(2, 1)
        return segmentation, *log_assignments, assignment.clamp_min(LEAST_ASSIGNMENT).log()


class KMaxLayer(nn.Module):
    """A step of k-means and self-attention, then a feed-forward block; a fresh layer changes nothing but by GELU.

        q <- GELU( q + update(centres) + attention(q) ),   q <- GELU( q + feed_forward(q) )

    Each voxel belongs to the query with its largest mask logit; a query's centre is the mean of its voxels' values. (A
    mean of linear projections is the projection of the mean, which needs no map of values. An empty cluster has the
    centre 0.) No gradient passes through the assignment, so the mask logits learn from their own loss alone.
    """

    def __init__(self, conv_op: type[nn.Module], channels: int, kernel: Sequence[int], sizes: MaskDecoderSizes) -> None:
        super().__init__()
        width = sizes.width
        self.voxels = nn.Sequential(nn.GELU(), *projection(conv_op, channels, width))
        self.space = projection(nn.Conv1d, width, width)
        self.mask_head = mask_head(conv_op, width, kernel)
        self.masks = MaskPredictor(conv_op, width, width, sizes.key_width)
        self.value = nn.Conv1d(width, width, 1, bias=False)
        self.update = nn.Sequential(instance_norm(nn.Conv1d, width), *residual_branch(width, width))
        self.attention = nn.Sequential(SelfAttention(sizes), nn.GELU(), *residual_branch(width, width))
        self.feed_forward = nn.Sequential(
            *projection(nn.Conv1d, width, sizes.feed_forward_width), *residual_branch(sizes.feed_forward_width, width)
        )
        self.activation = nn.GELU()

    def forward(self, queries: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The queries `(B, width, N)` after a step, and the mask logits `(B, N, *spatial)` of those before it."""
        voxels, space = self.voxels(feature), self.space(queries)
        mask_logits = self.masks(space, self.mask_head(voxels))
        centres = self.value(cluster_means(voxels, hard_assignment(mask_logits)))
        queries = self.activation(queries + self.update(centres) + self.attention(space))
        return self.activation(queries + self.feed_forward(queries)), mask_logits


class MaskPredictor(nn.Module):
    """Mask logits `(B, N, *spatial)`: the L2-normalised key of each voxel times the key of each query, times a learned
    scale that starts at 0.1, so that no query owns a voxel at first.

    Args:
        channels: of the feature map.
        query_width: of the queries.
        key_width: channels in which voxels and queries are compared.
    """

    def __init__(self, conv_op: type[nn.Module], channels: int, query_width: int, key_width: int) -> None:
        super().__init__()
        self.voxel_key = nn.Sequential(conv_op(channels, key_width, 1, bias=False), instance_norm(conv_op, key_width))
        self.query_key = nn.Sequential(
            nn.Conv1d(query_width, key_width, 1, bias=False), instance_norm(nn.Conv1d, key_width)
        )
        self.scale = nn.Parameter(torch.tensor(MASK_SCALE))

    def keys(self, queries: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Of a feature map `(B, C, *spatial)` and of queries `(B, width, N)`, whose products are the mask logits;
        `(B, key_width, ...)`, in single precision at least."""
        key = F.normalize(at_least_single(self.voxel_key(feature)), dim=1)  # squares leave half precision's range
        return key, self.scale * self.query_key(queries).to(key.dtype)

    def forward(self, queries: Tensor, feature: Tensor) -> Tensor:
        voxel_keys, query_keys = self.keys(queries, feature)
        with torch.autocast(feature.device.type, enabled=False):
            return torch.einsum("bdn,bd...->bn...", query_keys, voxel_keys)


def attended(voxel_keys: Tensor, query_keys: Tensor, values: Tensor) -> Tensor:
    """What the queries' values are for each voxel: their mean, weighted by the query distribution.

        sum over n of softmax_n( voxel_key . query_key_n ) value_n

    That is attention of the voxels to the queries, so no map of N channels is stored where torch has a kernel for it.

    Args:
        voxel_keys: `(B, D, *spatial)`.
        query_keys: `(B, D, N)`.
        values: `(B, M, N)`.

    Returns:
        `(B, M, *spatial)`.
    """
    channels, slices = len(query_keys[0]), voxel_keys.shape[2]
    padded = -(-max(channels, values.shape[1]) // 8) * 8  # the kernels want equal widths, which 8 divides
    # Slices are heads: the kernels' backward pass goes through the voxels of a head one block after the other.
    voxels = F.pad(voxel_keys.flatten(3).permute(0, 2, 3, 1), (0, padded - channels))
    keys, of_queries = (
        F.pad(part.transpose(1, 2), (0, padded - part.shape[1]))[:, None].expand(-1, slices, -1, -1)
        for part in (query_keys, values)
    )
    with torch.autocast(voxel_keys.device.type, enabled=False):
        found = F.scaled_dot_product_attention(voxels, keys, of_queries, scale=1.0)
    return found[..., : values.shape[1]].permute(0, 3, 1, 2).unflatten(3, voxel_keys.shape[3:])


class SelfAttention(nn.Module):
    """Of the queries; the published one has narrower keys than values, which `nn.MultiheadAttention` has not."""

    def __init__(self, sizes: MaskDecoderSizes) -> None:
        super().__init__()
        self.heads, self.parts = sizes.heads, [sizes.key_width, sizes.key_width, sizes.width]
        self.query_key_value = nn.Sequential(
            nn.Conv1d(sizes.width, sum(self.parts), 1, bias=False), instance_norm(nn.Conv1d, sum(self.parts))
        )
        self.norm = instance_norm(nn.Conv1d, sizes.width)

    def forward(self, queries: Tensor) -> Tensor:
        heads = (
            part.unflatten(1, (self.heads, -1)).transpose(2, 3)
            for part in self.query_key_value(queries).split(self.parts, 1)
        )
        return self.norm(F.scaled_dot_product_attention(*heads).transpose(2, 3).flatten(1, 2))


def mask_head(conv_op: type[nn.Module], width: int, kernel: Sequence[int]) -> nn.Sequential:
    """What a layer makes of its voxels before it compares them: a depthwise and a pointwise convolution.

    Where the plan's `kernel` is 1 on an axis, the depthwise one is, too.
    """
    depthwise = tuple(MASK_KERNEL if k > 1 else 1 for k in kernel)
    padding = tuple(k // 2 for k in depthwise)
    return nn.Sequential(
        conv_op(width, width, depthwise, padding=padding, groups=width, bias=False),
        instance_norm(conv_op, width),
        nn.GELU(),
        *projection(conv_op, width, width),
    )


def projection(conv_op: type[nn.Module], channels: int, width: int) -> nn.Sequential:
    """Of voxels, or of queries with `nn.Conv1d`: each place by itself to other channels, with norm and activation."""
    return nn.Sequential(conv_op(channels, width, 1, bias=False), instance_norm(conv_op, width), nn.GELU())


def residual_branch(channels: int, width: int) -> nn.Sequential:
    """The end of a branch of queries: its norm starts at 0, so the branch does."""
    norm = instance_norm(nn.Conv1d, width)
    nn.init.zeros_(norm.weight)
    return nn.Sequential(nn.Conv1d(channels, width, 1, bias=False), norm)


def instance_norm(conv_op: type[nn.Module], channels: int) -> nn.Module:
    """Over the voxels, or over the queries, of a sample."""
    return get_matching_instancenorm(conv_op)(channels, affine=True)
