import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_selfreg.networks.features import FeatureTaps


def u_net(cls=PlainConvUNet, dimension=2, stages=4):
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimension == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    blocks = "n_conv_per_stage" if cls is PlainConvUNet else "n_blocks_per_stage"
    strides = [1] + [2] * (stages - 1)
    features = [4 * 2**i for i in range(stages)]
    return cls(
        input_channels=1,
        n_stages=stages,
        features_per_stage=features,
        conv_op=conv,
        kernel_sizes=3,
        strides=strides,
        num_classes=3,
        n_conv_per_stage_decoder=1,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **{blocks: 1},
    )


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("cls", [PlainConvUNet, ResidualEncoderUNet])
def test_features_are_the_stage_outputs(cls, dimension):
    network = u_net(cls, dimension)
    taps = FeatureTaps(network)
    image = torch.randn(2, 1, *[32] * dimension)
    network(image)
    encoder, decoder, final = taps.take()
    skips = network.encoder(image)
    assert [tuple(f.shape) for f in encoder] == [tuple(f.shape) for f in skips[1:]]
    torch.testing.assert_close(encoder, skips[1:])
    assert [f.shape[2] for f in decoder] == [8, 16]
    assert tuple(final.shape) == (2, 4, *[32] * dimension)
    torch.testing.assert_close(network.decoder.seg_layers[-1](final), network(image)[0])


def test_nothing_is_collected_in_evaluation():
    network = u_net()
    taps = FeatureTaps(network)
    with torch.no_grad():
        network(torch.randn(1, 1, 16, 16))
        assert not taps.active
    network.eval()
    network(torch.randn(1, 1, 16, 16))
    assert not taps.active
    assert taps.empty


def test_features_are_released_when_taken():
    network = u_net()
    taps = FeatureTaps(network)
    network(torch.randn(1, 1, 16, 16))
    assert not taps.empty
    taps.take()
    assert taps.empty
    with pytest.raises(RuntimeError, match="taken already"):
        taps.take()


def test_missing_features_are_an_error():
    with pytest.raises(RuntimeError, match="6 of 6 tapped stages of PlainConvUNet"):
        FeatureTaps(u_net()).take()


def test_hooks_of_a_copied_network_stay_silent():
    network = u_net()
    taps = FeatureTaps(network)
    teacher = copy.deepcopy(network)
    network(torch.ones(1, 1, 16, 16))
    expected = taps.take()
    network(torch.ones(1, 1, 16, 16))
    teacher(torch.randn(1, 1, 16, 16))
    torch.testing.assert_close(taps.take(), expected)


def test_state_dict_is_untouched():
    network = u_net()
    before = list(network.state_dict())
    FeatureTaps(network)
    assert list(network.state_dict()) == before


def test_compiled_network_delivers_the_same_features_and_gradients():
    network = u_net()
    taps = FeatureTaps(network)
    image = torch.randn(2, 1, 16, 16)

    def gradients(callable_network):
        network.zero_grad()
        callable_network(image)
        encoder, decoder, final = taps.take()
        sum((f**2).mean() for f in [*encoder, *decoder, final]).backward()
        return [p.grad.clone() for stage in taps._tapped for p in stage.parameters()]

    eager = gradients(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")  # fullgraph: a graph break is an error
    torch.testing.assert_close(gradients(compiled), eager, rtol=1e-4, atol=1e-5)
    network.eval()
    compiled(image)
    assert taps.empty


def test_taps_after_the_first_compiled_pass_are_noticed():
    network = u_net()
    compiled = torch.compile(network, backend="eager")
    compiled(torch.randn(2, 1, 16, 16))
    taps = FeatureTaps(compiled)
    compiled(torch.randn(2, 1, 16, 16))
    with pytest.raises(RuntimeError, match="compiled and run before the taps"):
        taps.take()


def test_network_without_stages_is_named():
    with pytest.raises(NotImplementedError, match=r"Sequential has no encoder\.stages"):
        FeatureTaps(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_single_decoder_stage_is_an_error():
    with pytest.raises(NotImplementedError, match="2 encoder and 1 decoder stages"):
        FeatureTaps(u_net(stages=2))
