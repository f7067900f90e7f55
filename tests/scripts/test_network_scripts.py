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


@pytest.mark.parametrize(
    ("configuration", "trainer"), [("2d", "nnUNetTrainerTinyUXNet"), ("3d_fullres", "nnUNetTrainerTinyKMaxUXNet")]
)
def test_network_that_monais_blocks_cannot_make_is_an_error(configuration, trainer, data_sets, monkeypatch, capsys):
    arguments = [data_sets.name("labels"), configuration, "-tr", trainer, "-device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["uxnet_time.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        uxnet_time.main()
    assert "take another configuration, or nnUNetTrainerUXNet" in capsys.readouterr().err


@pytest.mark.parametrize("patch", [["100", "128", "128"], ["128"]])
def test_patch_that_the_stages_do_not_divide_is_an_error(patch, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["network_memory.py", "--patch", *patch])
    with pytest.raises(SystemExit, match="2"):
        network_memory.main()
    assert "two or three multiples of 16" in capsys.readouterr().err


def test_memory_of_large_weights_is_theirs_and_their_gradients():
    def build():
        return nn.Sequential(nn.Conv2d(1, 1500, 1), nn.Conv2d(1500, 1500, 1, bias=False), nn.Conv2d(1500, 3, 1))

    weights = 4 * (1500 * 1500 + 5 * 1500 + 3)
    assert network_memory.peak_memory(build, [2, 2], 1) == pytest.approx(2 * weights, rel=0.01)


def test_memory_of_large_feature_maps_is_what_the_backward_pass_needs():
    """Each of thirteen convolutions keeps its input of 32 channels; two gradients at most are beside them."""

    def build():
        return nn.Sequential(nn.Conv2d(1, 32, 1), *(nn.Conv2d(32, 32, 1) for _ in range(12)), nn.Conv2d(32, 3, 1))

    feature_map = 4 * 2 * 32 * 64**2
    peak = network_memory.peak_memory(build, [64, 64], 2)
    assert 13 * feature_map <= peak <= 15.5 * feature_map
