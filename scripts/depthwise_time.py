"""Time of UX-Net's depthwise 7x7x7 convolution against other ways to compute the same.

    python scripts/depthwise_time.py --channels 48 --size 32 -device cpu

`Conv3d` is torch's, on a contiguous tensor or in `channels_last_3d`; "planes" sums seven 2D depthwise convolutions,
one for each plane of the kernel, and "with layout changes" starts and ends with a contiguous tensor, as the rest of the
network has it. Forward and backward pass, median and quartiles, all ways in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


def contiguous(image: Tensor, conv: nn.Conv3d) -> Tensor:
    return conv(image)


def channels_last(image: Tensor, conv: nn.Conv3d) -> Tensor:
    weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(image, weight, conv.bias, padding=conv.padding, groups=conv.groups)


def channels_last_with_changes(image: Tensor, conv: nn.Conv3d) -> Tensor:
    return channels_last(image.contiguous(memory_format=torch.channels_last_3d), conv).contiguous()


def planes(image: Tensor, conv: nn.Conv3d) -> Tensor:
    """Sum over the kernel's first axis of 2D convolutions, the image's first axis being part of the batch."""
    batch, channels, depth, *plane = image.shape
    around = conv.padding[0]
    padded = F.pad(image, (0, 0, 0, 0, around, around)).transpose(1, 2)  # (B, D, C, H, W)
    total = None
    for offset in range(conv.kernel_size[0]):
        stack = padded[:, offset : offset + depth].reshape(batch * depth, channels, *plane)
        part = F.conv2d(stack, conv.weight[:, :, offset], padding=conv.padding[1:], groups=conv.groups)
        total = part if total is None else total + part
    total = total.reshape(batch, depth, channels, *plane).transpose(1, 2)
    return total + conv.bias.reshape(-1, 1, 1, 1)


WAYS: dict[str, tuple[Callable[[Tensor, nn.Conv3d], Tensor], torch.memory_format]] = {
    "Conv3d": (contiguous, torch.contiguous_format),
    "Conv3d, channels_last_3d": (channels_last, torch.channels_last_3d),
    "Conv3d, channels_last_3d with layout changes": (channels_last_with_changes, torch.contiguous_format),
    "planes": (planes, torch.contiguous_format),
}


def seconds_of(way: str, image: Tensor, conv: nn.Conv3d) -> float:
    function, memory_format = WAYS[way]
    image = image.detach().clone(memory_format=memory_format).requires_grad_()
    conv.zero_grad()
    _wait(image)
    start = time.perf_counter()
    output = function(image, conv)
    output.backward(torch.ones_like(output))
    _wait(image)
    return time.perf_counter() - start


def _wait(image: Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--size", type=int, default=32, help="of the image, on each axis")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="after two that are not counted")
    parser.add_argument("-device", default="cuda", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train does
    channels = arguments.channels
    conv = nn.Conv3d(channels, channels, 7, padding=3, groups=channels).to(arguments.device)
    image = torch.randn(arguments.batch, channels, *[arguments.size] * 3, device=arguments.device)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for count in tqdm(range(arguments.rounds + 2), disable=None):
        for way, times in seconds.items():
            time_of_step = seconds_of(way, image, conv)
            if count >= 2:
                times.append(time_of_step)
    print("| way | forward and backward, ms (quartiles) |\n| --- | --- |")
    for way, times in seconds.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(times, n=4))
        print(f"| {way} | {middle:.1f} ({low:.1f}–{high:.1f}) |")


if __name__ == "__main__":
    main()
