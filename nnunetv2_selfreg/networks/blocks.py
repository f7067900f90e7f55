"""Building blocks that the networks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `(B, C, *spatial)`, at each place by itself; eps 1e-6, as ConvNeXt has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, feature: Tensor) -> Tensor:
        return super().forward(feature.movedim(1, -1)).movedim(-1, 1)


def recompute(modules: Iterable[nn.Module]) -> None:
    """Lets modules keep only their inputs for the backward pass, in which they compute their activations once more.

    Costs about a forward pass of time. Weights, their names and the results stay the same.
    """
    for module in modules:
        # A partial of a bound method, since copies of the network (a teacher, say) must run their own weights, which
        # copy.deepcopy sees to here, but not with a closure.
        module.forward = partial(_recomputed, module.forward)


def _recomputed(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


def check_drop_path(probability: float) -> None:
    """Raises ValueError unless stochastic depth can have it as its largest probability."""
    if not 0 <= probability < 1:
        raise ValueError(f"drop_path is {probability}, it must be at least 0 and less than 1")
