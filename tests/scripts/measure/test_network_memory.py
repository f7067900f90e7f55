"""Memory is counted right, for every network in 2D and 3D."""

import sys

import network_memory
import pytest
from torch import nn


@pytest.mark.matrix
@pytest.mark.parametrize("patch", [["32", "32"], ["32", "32", "32"]])
def test_row_of_each_network(patch, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["network_memory.py", "--batch", "1", "--patch", *patch])
    network_memory.main()
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [f"| {name}" for name in network_memory.networks(len(patch))]


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
