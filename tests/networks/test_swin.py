import copy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.nets import SwinUNETR as OfMonai

from nnunetv2_selfreg.networks.features import FeatureTaps
from nnunetv2_selfreg.networks.swin import SwinUNETR, padded_shape


def network(dimension=2, **arguments):
    torch.manual_seed(0)
    return SwinUNETR(1, 3, dimension, 12, **arguments)


def gradients(net, image):
    net.zero_grad()
    (net(image) ** 2).mean().backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(("dimension", "shape"), [(2, (64, 32)), (3, (32, 32, 64))])
def test_network_is_monais_where_it_takes_the_shape(dimension, shape):
    mine = network(dimension)
    torch.manual_seed(0)
    monais = OfMonai(1, 3, spatial_dims=dimension, feature_size=12)
    image = torch.randn(1, 1, *shape)
    torch.testing.assert_close(mine(image), monais(image))
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in monais.parameters())


def test_default_width_is_the_published_one():
    assert sum(p.numel() for p in SwinUNETR(1, 14, 3).parameters()) == pytest.approx(62.19e6, rel=1e-3)


@pytest.mark.parametrize("shape", [(24, 24), (33, 70)])
def test_other_shapes_are_padded_at_the_end_and_cut_back(shape):
    net, image = network(), torch.randn(2, 1, *shape)
    padded = torch.zeros(2, 1, *padded_shape(shape))
    padded[..., : shape[0], : shape[1]] = image
    output = net(image)
    assert output.shape == (2, 3, *shape)
    torch.testing.assert_close(output, net(padded)[..., : shape[0], : shape[1]])


@given(st.lists(st.integers(1, 300), min_size=2, max_size=3))
def test_padded_shape_is_the_smallest_that_the_network_takes(shape):
    padded = padded_shape(shape)
    assert all(have <= want and want % 32 == 0 for have, want in zip(shape, padded, strict=True))
    assert any(want > 32 for want in padded)
    surplus = [want - have >= 32 for have, want in zip(shape, padded, strict=True)]
    assert sum(surplus) == (max(shape) <= 32)


def test_single_voxel_of_a_bottleneck_is_avoided():
    net = network()
    assert net(torch.randn(1, 1, 20, 20)).shape == (1, 3, 20, 20)  # instance norm would refuse


def test_taps_read_the_transformers_stages_before_they_merge_patches():
    net = network()
    taps = FeatureTaps(net)
    merging = []
    for layers in (net.encoder.transformer.layers1, net.encoder.transformer.layers4):
        layers[0].downsample.register_forward_pre_hook(lambda _module, inputs: merging.append(inputs[0]))
    image = torch.randn(1, 1, 40, 64)
    output = net(image)
    encoder, decoder, final = taps.take()
    assert [f.shape[1:] for f in encoder] == [(12, 32, 32), (24, 16, 16), (48, 8, 8), (96, 4, 4)]
    torch.testing.assert_close([encoder[0], encoder[-1]], [tokens.permute(0, 3, 1, 2) for tokens in merging])
    assert [f.shape[1:] for f in decoder] == [(96, 4, 4), (48, 8, 8), (24, 16, 16), (12, 32, 32)]
    torch.testing.assert_close(net.decoder.seg_layers[-1](final)[..., :40, :], output)


def test_activation_checkpointing_changes_no_gradient_and_no_name():
    image = torch.randn(2, 1, 24, 64)
    plain, saving = network(), network(activation_checkpointing=True)
    assert list(plain.state_dict()) == list(saving.state_dict())
    torch.testing.assert_close(gradients(saving, image), gradients(plain, image))


def test_copy_with_checkpointing_runs_its_own_weights():
    net, image = network(activation_checkpointing=True), torch.randn(1, 1, 24, 64)
    teacher = copy.deepcopy(net)
    before = teacher(image).detach()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert torch.equal(teacher(image), before)


@pytest.mark.parametrize(
    ("argument", "value"), [("feature_size", 0), ("feature_size", -12), ("feature_size", 20), ("drop_path", 1.0)]
)
def test_impossible_argument_is_an_error(argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        SwinUNETR(1, 3, 2, **{argument: value})


def test_older_monai_is_an_error(monkeypatch):
    class FixedToAnImageSize:
        def __init__(self, img_size, in_channels, out_channels):
            raise AssertionError

    monkeypatch.setattr("monai.networks.nets.SwinUNETR", FixedToAnImageSize)
    with pytest.raises(ImportError, match=r'MONAI 1.5 or later: pip install "monai>=1.5" einops'):
        network()


@pytest.mark.parametrize("missing", ["monai", "einops"])
def test_missing_extra_is_named_with_the_install_line(missing, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{missing}.*pip install "monai>=1.5" einops'):
        network()
