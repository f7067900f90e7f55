"""Dropout for a network that has none: through hooks, so that its modules and its `state_dict` stay what they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunetv2_selfreg.networks.features import stages_of


def add_dropout(network: nn.Module, probability: float) -> None:
    """Drops channels of the bottleneck and of the last decoder stage's output, in training mode only.

    These are the two places of UA-MT's released V-Net, whose `Dropout3d` drops whole channels with probability 0.5.
    Deep copies of the network carry the hooks along.

    Register before the first forward pass: `torch.compile` traces these hooks, but silently ignores later ones.

    Args:
        network: has `.encoder.stages` and `.decoder.stages`; its decoder takes the skips, the bottleneck's last.
        probability: of a channel to be dropped, in [0, 1); the others are divided by `1 - probability`.

    Raises:
        NotImplementedError: the network has no such stages.
    """
    _, decoder = stages_of(network)

    def drop_bottleneck(module: nn.Module, inputs: tuple[list[Tensor]]) -> tuple[list[Tensor]]:
        (skips,) = inputs
        return ([*skips[:-1], torch.feature_dropout(skips[-1], probability, module.training)],)

    def drop_output(module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return torch.feature_dropout(output, probability, module.training)

    network.decoder.register_forward_pre_hook(drop_bottleneck)
    decoder[-1].register_forward_hook(drop_output)
