"""MONAI's SwinUNETR with nnU-Net's interface: any patch size, an encoder and a decoder with stages.

Source: Hatamizadeh et al., "Swin UNETR", arXiv 2201.01266, as MONAI has it. It halves every axis five times, whatever
the plan. Ours is the padding. MONAI is an optional dependency, imported when a network is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_selfreg.errors import MissingPackageError
from nnunetv2_selfreg.networks.blocks import check_drop_path, recompute

MULTIPLE = 32
"""MONAI's network takes multiples of it along each axis."""
WIDTH_UNIT = 12
"""MONAI's network takes multiples of it as its width."""
INSTALL = 'pip install "monai>=1.5" einops'  # the extra, also for who has a wheel or a checkout


class SwinUNETR(nn.Module):
    """A Swin transformer, residual blocks on its hidden states, a residual decoder. There is no deep supervision.

    An image is padded with zeros at the end of each axis (see :func:`padded_shape`), and the output is cut back.

    Args:
        input_channels: of the image.
        num_classes: channels of the output.
        dimension: 2 or 3.
        feature_size: channels at full resolution, a multiple of 12.
        drop_path: largest probability of stochastic depth.
        activation_checkpointing: whether blocks compute their activations anew in the backward pass.

    Raises:
        ImportError: MONAI is not installed, or older than 1.5.
        ValueError: impossible `feature_size` or `drop_path`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        dimension: int,
        feature_size: int = 48,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if feature_size < 1 or feature_size % WIDTH_UNIT:
            raise ValueError(f"feature_size is {feature_size}, it must be a positive multiple of {WIDTH_UNIT}")
        check_drop_path(drop_path)
        network = _of_monai(
            in_channels=input_channels,
            out_channels=num_classes,
            spatial_dims=dimension,
            feature_size=feature_size,
            dropout_path_rate=drop_path,
            use_checkpoint=activation_checkpointing,
        )
        self.encoder = SwinEncoder(network)
        self.decoder = SwinDecoder(network)
        if activation_checkpointing:  # MONAI's option is for the transformer's blocks
            recompute([self.encoder.on_image, *self.encoder.on_states, *self.decoder.stages])

    def forward(self, image: Tensor) -> Tensor:
        shape = image.shape[2:]
        missing = [want - have for have, want in zip(shape, padded_shape(shape), strict=True)]
        padding = [length for axis in reversed(missing) for length in (0, axis)]
        output = self.decoder(self.encoder(F.pad(image, padding)))
        return output[(..., *(slice(length) for length in shape))]


class SwinEncoder(nn.Module):
    """The transformer, and a residual block on the image and on each hidden state but the last but one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.transformer = network.swinViT
        self.on_image = network.encoder1
        self.on_states = nn.ModuleList(
            [network.encoder2, network.encoder3, network.encoder4, nn.Identity(), network.encoder10]
        )
        for block in self.stages[1:]:
            block.channels_at_the_end = True

    @property
    def stages(self) -> list[nn.Module]:
        """The patch embedding, whose tokens are at half resolution, and the last block of each of the transformer's
        stages: what SelfReg reads, before the stage merges patches for the next."""
        swin = self.transformer
        stages = (layers[0] for layers in (swin.layers1, swin.layers2, swin.layers3, swin.layers4))
        return [swin.patch_embed, *(stage.blocks[-1] for stage in stages)]

    def forward(self, image: Tensor) -> list[Tensor]:
        """The skips, from full resolution to the bottleneck."""
        states = self.transformer(image)
        return [self.on_image(image), *(block(state) for block, state in zip(self.on_states, states, strict=True))]


class SwinDecoder(nn.Module):
    """Transposed convolution, skip and residual block a stage; one head."""

    deep_supervision = False
    """For nnU-Net, which sets it on the decoder of every network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [network.decoder5, network.decoder4, network.decoder3, network.decoder2, network.decoder1]
        )
        self.seg_layers = nn.ModuleList([network.out])

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        *skips, feature = skips
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            feature = stage(feature, skip)
        return self.seg_layers[-1](feature)


def padded_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The smallest shape that the network takes and that contains `shape`: multiples of 32, and two voxels at least in
    the bottleneck, since instance norm needs more than one.

    >>> padded_shape((20, 160, 96))
    (32, 160, 96)
    >>> padded_shape((24, 24))
    (32, 64)
    """
    lengths = [-(-length // MULTIPLE) * MULTIPLE for length in shape]
    if all(length == MULTIPLE for length in lengths):
        lengths[-1] = 2 * MULTIPLE
    return tuple(lengths)


def _of_monai(**arguments) -> nn.Module:
    try:
        import einops  # noqa: F401 (MONAI imports it late, and says less)
        from monai.networks.nets import SwinUNETR as OfMonai
    except ModuleNotFoundError as error:
        message = f"SwinUNETR needs {error.name}, which is not installed: {INSTALL}"
        raise MissingPackageError(message, name=error.name) from error
    if "img_size" in inspect.signature(OfMonai).parameters:  # which every network before 1.5 was fixed to
        raise MissingPackageError(f"SwinUNETR needs MONAI 1.5 or later: {INSTALL}")
    return OfMonai(**arguments)
