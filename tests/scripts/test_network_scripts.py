"""The scripts about networks run and count right; how long a step takes is not tested."""

import os
import sys

import depthwise_time
import network_memory
import pytest
import torch
import uxnet_time
from torch import nn


@pytest.mark.parametrize("way", depthwise_time.WAYS)
def test_each_way_computes_the_same_convolution(way):
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 3, 7, padding=3, groups=3)
    image = torch.randn(2, 3, 6, 5, 8)
    function, _ = depthwise_time.WAYS[way]
    torch.testing.assert_close(function(image, conv), conv(image), rtol=1e-4, atol=1e-5)


def test_table_of_the_ways(monkeypatch, capsys):
    arguments = ["--channels", "2", "--size", "8", "--rounds", "2", "-device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["depthwise_time.py", *arguments])
    depthwise_time.main()
    assert capsys.readouterr().out.count("| Conv3d") == 3


def test_table_of_ux_net_and_monais_assembly(data_sets, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "untouched"))
    arguments = [data_sets.name("labels"), "3d_fullres", "-tr", "nnUNetTrainerTinyUXNet", "-device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["uxnet_time.py", *arguments, "--rounds", "2"])
    uxnet_time.main()
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("| assembled", "| nnUNetTrainer"))
    ]
    assert len(rows) == 2
    assert not os.path.exists(tmp_path / "untouched")


def test_memory_is_that_of_weights_gradients_and_activations():
    """Of a convolution without padding, by hand."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1, bias=False)

        def forward(self, image):
            return self.conv(image)

    size, batch = 64, 2
    image, output = (batch * channels * size**2 for channels in (1, 3))
    peak = network_memory.peak_memory(Network, [size, size], batch)
    # At least the image, the logits and their gradient; the loss holds a few more maps of their size.
    assert 4 * (image + 2 * output) <= peak <= 4 * (image + 8 * output)
    twice = network_memory.peak_memory(Network, [size, size], 2 * batch)
    assert twice == pytest.approx(2 * peak, rel=0.01)
