"""The two self-regularisation terms of SelfReg-UNet and the loss that adds them to a segmentation loss.

    L = L_seg + lambda_scr * L_SCR + lambda_ifd * L_IFD

Semantic consistency (SCR): the last decoder block's feature map supervises every other block. Internal feature
distillation (IFD): inside a block, the well-used channels teach the redundant ones.

Source: Zhu et al., "SelfReg-UNet: Self-Regularized UNet for Medical Image Segmentation", MICCAI 2024, arXiv 2406.14896.
Where the paper and the authors' released program differ, the default follows the program; each docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_selfreg.errors import SettingError
from nnunetv2_selfreg.losses.terms import OwnTerms, Terms
from nnunetv2_selfreg.tensors import at_full_resolution, at_least_single, average_pool, of_image, pooled_to_each_shape

if TYPE_CHECKING:
    from nnunetv2_selfreg.networks.features import FeatureTaps


def semantic_consistency(feature: Tensor, final: Tensor, channels: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Semantic consistency regularisation of one block by the last decoder block.

        L_SCR = mean_{B, n, space} ( feature[:, i] - pool(stopgrad(final))[:, j] )^2

    `pool` averages `final` to the full spatial shape of `feature`, whatever the dimension or anisotropy. The channels
    `i` and `j` are `n = min(C, C_final)` indices each, drawn independently and without replacement at every call, as in
    the released program; the paper draws on `feature` only.

    Args:
        feature: feature map of a block, `(B, C, *spatial)`, 2D or 3D.
        final: feature map of the last decoder block, `(B, C_final, *spatial)`, at least as large along each axis. It
            gets no gradient.
        channels: the index tensors `(i, j)`, of equal length; drawn at random when absent.

    Returns:
        Scalar in at least single precision.

    Raises:
        ValueError: batch or dimension differ, `final` is smaller than `feature` along an axis, or the index tensors
            differ in length.

    >>> feature, final = torch.ones(2, 8, 4, 4), torch.zeros(2, 4, 16, 8)
    >>> semantic_consistency(feature, final)
    tensor(1.)
    """
    _check_pair(feature, final)
    if channels is None:
        channels = _random_channels(feature, final)
    elif len(channels[0]) != len(channels[1]):
        raise ValueError(f"channels has {len(channels[0])} indices for feature and {len(channels[1])} for final")
    pooled = average_pool(final.detach(), feature.shape[2:])
    return F.mse_loss(_select(feature, channels[0]), _select(pooled, channels[1]))


def internal_feature_distillation(feature: Tensor, order: str = "activation", stop_gradient: bool = False) -> Tensor:
    """Internal feature distillation: the first half of a block's channels against the second half.

        L_IFD = mean_{B, C // 2, space} ( feature[:, top] - feature[:, bottom] )^2

    Args:
        feature: feature map of a block, `(B, C, *spatial)`, 2D or 3D. Of an odd number of channels the last one in the
            order is left out (our decision: the published formula is undefined there).
        order: "activation" (the released program) sorts the channels, descending, by the mean over batch and space
            of the activation that was L2-normalised over space; "index" (the paper) keeps their order.
        stop_gradient: True (the paper) makes the first half the teacher, without gradient; False (the released
            program) lets the gradient into both halves.

    Returns:
        Scalar in at least single precision. 0 for a single channel, which has nothing to be compared with.

    Raises:
        ValueError: unknown `order`.

    >>> internal_feature_distillation(torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1))
    tensor(4.)
    """
    half = feature.shape[1] // 2
    ranking = channel_ranking(feature, order)
    if half == 0:
        return torch.zeros((), dtype=torch.promote_types(feature.dtype, torch.float32), device=feature.device)
    top, bottom = _select(feature, ranking[:half]), _select(feature, ranking[half : 2 * half])
    return F.mse_loss(bottom, top.detach() if stop_gradient else top)


def channel_ranking(feature: Tensor, order: str = "activation") -> Tensor:
    """Channel indices of `feature` `(B, C, *spatial)` in the order in which IFD halves them (see there)."""
    check_order(order)
    if order == "index":
        return torch.arange(feature.shape[1], device=feature.device)
    return torch.argsort(_mean_normalised_activation(feature.detach()), descending=True)


def check_order(order: str) -> None:
    """Raises ValueError if IFD knows no such order of channels."""
    if order not in ("activation", "index"):
        raise SettingError(f'the order of channels in IFD is {order!r}, it must be "activation" or "index"')


class SelfRegularizedLoss(nn.Module):
    """Adds SCR and IFD of the tapped features to a segmentation loss while the network trains.

        L = L_seg + lambda_scr * mean_{all blocks} L_SCR + lambda_ifd * (mean_{encoder} L_IFD + mean_{decoder} L_IFD)

    The averaging is the released program's, the two lambdas are the paper's. In evaluation it is the segmentation loss
    alone, so a validation loss stays comparable with stock nnU-Net. A term whose lambda is 0 is not computed. Half
    precision features are compared in single precision (CUDA pools them in half precision, with single-precision sums).
    Of a network that pads its input, only what sees the image is compared.

    One forward pass of the tapped network in training, then one call: the features are handed over once. A training
    step with several segmentation losses calls this one for one of them.

    In training `segmentation`, `scr` and `ifd` are noted in `terms`, without lambda.

    Args:
        loss: the segmentation loss, called with `(output, target)`.
        taps: the source of the features; they are released at each call.
        lambda_scr, lambda_ifd: weights, finite and not negative.
        ifd_order, ifd_stop_gradient: see :func:`internal_feature_distillation`.
        terms: where terms are noted; who owns it empties it before each step. When absent, those of the last call.

    Raises:
        ValueError: a lambda is negative or not finite, or `ifd_order` is unknown.
    """

    def __init__(
        self,
        loss: nn.Module,
        taps: FeatureTaps,
        lambda_scr: float,
        lambda_ifd: float,
        ifd_order: str = "activation",
        ifd_stop_gradient: bool = False,
        terms: Terms | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("lambda_scr", lambda_scr), ("lambda_ifd", lambda_ifd)):
            if not 0 <= value < float("inf"):
                raise SettingError(f"{name} is {value}, it must be finite and not negative")
        check_order(ifd_order)
        self.loss = loss
        self.taps = taps
        self.lambda_scr = lambda_scr
        self.lambda_ifd = lambda_ifd
        self.ifd_order = ifd_order
        self.ifd_stop_gradient = ifd_stop_gradient
        self.terms = OwnTerms() if terms is None else terms

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        segmentation = self.loss(output, target)
        if not self.taps.active:
            return segmentation
        encoder, decoder, final = self.taps.take()
        image = at_full_resolution(output).shape[2:]
        terms = {"segmentation": (1.0, segmentation)}
        if self.lambda_scr > 0:
            terms["scr"] = self.lambda_scr, self._scr([*encoder, *decoder], final, image)
        if self.lambda_ifd > 0:
            encoder, decoder = ([of_image(f, final.shape[2:], image) for f in part] for part in (encoder, decoder))
            terms["ifd"] = self.lambda_ifd, self._ifd(encoder) + self._ifd(decoder)
        return self.terms.total(terms)

    def _scr(self, features: list[Tensor], final: Tensor, image: Sequence[int]) -> Tensor:
        padded = final.shape[2:]
        pooled = pooled_to_each_shape(final.detach(), {tuple(f.shape[2:]) for f in features})
        pairs = ((of_image(g, padded, image) for g in (f, pooled[tuple(f.shape[2:])])) for f in features)
        return torch.stack([semantic_consistency(*pair) for pair in pairs]).mean()

    def _ifd(self, features: list[Tensor]) -> Tensor:
        comparable = [f for f in features if f.shape[1] > 1] or features
        terms = [internal_feature_distillation(f, self.ifd_order, self.ifd_stop_gradient) for f in comparable]
        return torch.stack(terms).mean()


def _select(feature: Tensor, channels: Tensor) -> Tensor:
    """Channels of a feature map in at least single precision. Selecting first keeps the conversion small."""
    return at_least_single(feature.index_select(1, channels))


def _random_channels(feature: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    n = min(feature.shape[1], final.shape[1])
    return (
        torch.randperm(feature.shape[1], device=feature.device)[:n],
        torch.randperm(final.shape[1], device=final.device)[:n],
    )


def _mean_normalised_activation(feature: Tensor) -> Tensor:
    """mean_B( mean_space( F / ||F||_2 ) ) for each channel, up to a constant factor: no normalised map is built."""
    space = tuple(range(2, feature.ndim))
    dtype = torch.promote_types(feature.dtype, torch.float32)
    norm = torch.linalg.vector_norm(feature, dim=space, dtype=dtype).clamp_min(1e-12)  # the epsilon of F.normalize
    return (feature.sum(space, dtype=dtype) / norm).mean(0)


def _check_pair(feature: Tensor, final: Tensor) -> None:
    if feature.ndim != final.ndim or feature.shape[0] != final.shape[0]:
        raise ValueError(
            f"feature {tuple(feature.shape)} and final {tuple(final.shape)} must have the same batch and dimension"
        )
    if any(f > g for f, g in zip(feature.shape[2:], final.shape[2:], strict=True)):
        raise ValueError(f"final {tuple(final.shape)} is smaller than feature {tuple(feature.shape)} along an axis")
