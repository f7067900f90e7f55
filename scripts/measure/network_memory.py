"""Peak memory of a training step of each network at any patch size, without a machine that could train it.

    python scripts/measure/network_memory.py --patch 128 128 128 --batch 2

The step (forward pass, nnU-Net's Dice and cross-entropy or the k-means decoder's loss, backward pass, in single
precision) runs on tensors that have shapes and no values; counted are weights, gradients and activations, each
allocation and release of them. What kernels take for themselves and the optimiser's state are not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from tqdm import tqdm

from nnunetv2_selfreg.losses.kmax import KMaxLoss
from nnunetv2_selfreg.networks.kmax import KMaxOutput, KMaxUXNet
from nnunetv2_selfreg.networks.swin import SwinUNETR
from nnunetv2_selfreg.networks.uxnet import UXNet

STAGES = 5
CLASSES = 3


def networks(dimension: int) -> dict[str, Callable[[], nn.Module]]:
    """What builds each, with five stages, or as many as it has."""
    strides = [[1] * dimension] + [[2] * dimension] * (STAGES - 1)
    kernels = [[3] * dimension] * STAGES
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimension == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    stock = partial(
        PlainConvUNet, 1, STAGES, [32, 64, 128, 256, 320], conv, kernels, strides, 2, CLASSES, 2, False, norm,
        {"affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, True,
    )  # fmt: skip
    ux_net = {"UX-Net": partial(UXNet, 1, CLASSES, strides, kernels)}
    k_means = {"k-means UX-Net": partial(KMaxUXNet, 1, CLASSES, strides, kernels)}
    swin = {"SwinUNETR": partial(SwinUNETR, 1, CLASSES, dimension)}
    ours = {**ux_net, **k_means, **swin}
    checkpointing = {
        f"{name}, activation checkpointing": partial(build, activation_checkpointing=True)
        for name, build in ours.items()
    }
    return {"nnU-Net": stock, **ours, **checkpointing}


def step(network: nn.Module, image: Tensor) -> None:
    output = network(image)
    loss: nn.Module = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )
    if isinstance(output, Tensor):
        target = target_of(output)
    else:
        scales = output if isinstance(output, list) else output.convolutional
        target = [target_of(scale) for scale in scales]
        loss = DeepSupervisionWrapper(loss, [1 / 2**number for number in range(len(scales))])
    if isinstance(output, KMaxOutput):
        loss = KMaxLoss(loss)
    loss(output, target).backward()


def target_of(output: Tensor) -> Tensor:
    return torch.zeros(len(output), 1, *output.shape[2:])


def peak_memory(build: Callable[[], nn.Module], patch: list[int], batch: int) -> int:
    """Bytes of a step of a network that `build` makes."""
    network = build()
    with FakeTensorMode() as without_values:
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                values = {name: without_values.from_tensor(t) for name, t in tensors.items() if t is not None}
                tensors.update(values)
        image = torch.zeros(batch, 1, *patch)
        tracker = MemTracker()
        tracker.track_external(network, image)
        with tracker:
            step(network, image)
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs="+", default=[128, 128, 128])
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    dimension, multiple = len(arguments.patch), 2 ** (STAGES - 1)
    if dimension not in (2, 3) or any(side < 1 or side % multiple for side in arguments.patch):
        parser.error(f"--patch takes two or three multiples of {multiple}, which {STAGES} stages divide")
    peaks = {
        name: peak_memory(build, arguments.patch, arguments.batch)
        for name, build in tqdm(networks(dimension).items(), disable=None)
    }
    print("| network | peak memory, GiB | to UX-Net's |\n| --- | --- | --- |")
    for name, peak in peaks.items():
        print(f"| {name} | {peak / 2**30:.2f} | {peak / peaks['UX-Net']:.2f} |")


if __name__ == "__main__":
    main()
