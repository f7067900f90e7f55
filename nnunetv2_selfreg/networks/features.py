"""Feature maps of a network's stages, read through forward hooks while the network trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, is_grad_enabled, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_selfreg.errors import UnsupportedError


class Features(NamedTuple):
    """Feature maps of one forward pass, `(B, C, *spatial)` each."""

    encoder: list[Tensor]
    """Outputs of the encoder stages after the first, from high to low resolution, the last one that of
    the bottleneck."""
    decoder: list[Tensor]
    """Outputs of the decoder stages before the last, from low to high resolution."""
    final: Tensor
    """Output of the last decoder stage, the input of the top segmentation layer."""


class FeatureTaps:
    """Collects the stage outputs of a U-Net-like network in training, and only there.

    The network stays as it is: same modules, same `state_dict`. A hook keeps an output when its stage is in training
    mode and gradients are enabled; in evaluation nothing is collected. :meth:`take` hands the features over and
    releases them, so none outlives its step.

    Register before the first forward pass: `torch.compile` traces these hooks, but silently ignores later ones.

    Args:
        network: has `.encoder.stages` and `.decoder.stages`, as PlainConvUNet and ResidualEncoderUNet; wrapped in
            DistributedDataParallel, compiled, or neither. The outputs of a stage with the attribute
            `channels_at_the_end` are `(B, *spatial, C)`.

    Raises:
        NotImplementedError: the network has no such stages, or fewer than two in the decoder.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = unwrap(network)
        encoder, decoder = self.blocks(self._network)
        self._n_encoder = len(encoder) - 1
        self._tapped = [*encoder[1:], *decoder]
        self._collected: list[Tensor | None] = [None] * len(self._tapped)
        for index, stage in enumerate(self._tapped):
            # Before other hooks, as dropout's: what is read is the stage's own output.
            stage.register_forward_hook(self._hook(stage, index), prepend=True)

    @staticmethod
    def blocks(network: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
        """The modules of encoder and decoder whose outputs are read, all but the first: the stages."""
        encoder, decoder = stages_of(network)
        if len(encoder) < 2 or len(decoder) < 2:
            raise UnsupportedError(
                f"{type(network).__name__} has {len(encoder)} encoder and {len(decoder)} decoder stages; "
                "self-regularisation needs two of each at least. Use a configuration with more resolution stages."
            )
        return encoder, decoder

    @property
    def active(self) -> bool:
        """Whether a forward pass through the network would be collected now."""
        return self._network.training and is_grad_enabled()

    def take(self) -> Features:
        """The features of the last forward pass; they are released here.

        Raises:
            RuntimeError: a stage delivered none.
        """
        missing = [index for index, feature in enumerate(self._collected) if feature is None]
        features = [feature for feature in self._collected if feature is not None]
        self._collected[:] = [None] * len(self._tapped)
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._tapped)} tapped stages of {type(self._network).__name__} delivered no "
                "feature map. Either no forward pass in training mode preceded, or its features were taken already, or "
                "the network had been compiled and run before the taps were registered (torch.compile ignores such "
                "hooks)."
            )
        return Features(features[: self._n_encoder], features[self._n_encoder : -1], features[-1])

    @property
    def empty(self) -> bool:
        """Whether no feature is held."""
        return all(feature is None for feature in self._collected)

    def _hook(self, stage: nn.Module, index: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        collected = self._collected

        def keep(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            # A deep copy of the network (an EMA teacher, say) carries this hook along, where it must be silent.
            if module is stage and module.training and is_grad_enabled():
                # A transformer's block, which says so, has its channels last.
                collected[index] = output.movedim(-1, 1) if getattr(stage, "channels_at_the_end", False) else output

        return keep


class LastStageTap(FeatureTaps):
    """Reads the last decoder stage alone: `final`. In compiled training each feature that is read costs a gradient of
    its size, whether or not it is used."""

    @staticmethod
    def blocks(network: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
        encoder, decoder = stages_of(network)
        return encoder[:1], decoder[-1:]


def stages_of(network: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The stages of encoder and decoder.

    Raises:
        NotImplementedError: the network has none.
    """
    encoder, decoder = (list(getattr(getattr(network, part, None), "stages", ())) for part in ("encoder", "decoder"))
    if not encoder or not decoder:
        raise UnsupportedError(
            f"{type(network).__name__} has no encoder.stages and decoder.stages, whose feature maps are needed. Use a "
            "plan whose network has them, such as PlainConvUNet or ResidualEncoderUNet."
        )
    return encoder, decoder


def heads_of(network: nn.Module) -> list[nn.Module]:
    """The segmentation heads of the decoder, from low to high resolution; none where a network keeps them elsewhere."""
    return list(getattr(getattr(network, "decoder", None), "seg_layers", ()))


def unwrap(network: nn.Module) -> nn.Module:
    """The plain network inside DistributedDataParallel and `torch.compile`."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network
