"""Dropout through hooks: where it is, what it drops, when, and what stays as it was."""

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_selfreg.networks.dropout import add_dropout
from nnunetv2_selfreg.networks.features import FeatureTaps
from nnunetv2_selfreg.networks.kmax import KMaxUXNet
from nnunetv2_selfreg.networks.uxnet import UXNet

U_NET = {
    "n_stages": 3,
    "features_per_stage": [8, 16, 32],
    "kernel_sizes": 3,
    "strides": [1, 2, 2],
    "n_conv_per_stage_decoder": 1,
    "conv_bias": True,
    "norm_op_kwargs": {"affine": True},
    "nonlin": nn.LeakyReLU,
}


def u_net(kind=PlainConvUNet, dimension=2, deep_supervision=True):
    conv, norm = ((nn.Conv2d, nn.InstanceNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[dimension - 2]
    convs = {"n_blocks_per_stage": 1} if kind is ResidualEncoderUNet else {"n_conv_per_stage": 1}
    return kind(
        1, conv_op=conv, norm_op=norm, num_classes=2, deep_supervision=deep_supervision, **U_NET, **convs
    ).train()


def inputs_of(module):
    """What the module is given from now on."""
    seen = []
    module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_channels_of_bottleneck_and_last_stage_are_dropped(kind, dimension):
    network = u_net(kind, dimension)
    taps = FeatureTaps(network)
    add_dropout(network, 0.5)
    bottleneck, final = inputs_of(network.decoder.transpconvs[0]), inputs_of(network.decoder.seg_layers[-1])
    network(torch.rand(16, 1, *[16] * dimension))
    features = taps.take()
    for dropped, feature in ((bottleneck[0], features.encoder[-1]), (final[0], features.final)):
        flat, own = dropped.flatten(2), feature.flatten(2)
        whole = (flat == 0).all(2)
        assert 0.3 < float(whole.float().mean()) < 0.7
        torch.testing.assert_close(flat[~whole], 2 * own[~whole])
        assert (own[whole] != 0).any(1).all()  # what is read is before the dropout


def test_evaluation_has_none_and_names_stay():
    network = u_net()
    plain = copy.deepcopy(network)
    add_dropout(network, 0.5)
    image = torch.rand(2, 1, 16, 16)
    assert not torch.equal(network(image)[0], network(image)[0])
    torch.testing.assert_close(network.eval()(image), plain.eval()(image), rtol=0, atol=0)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in network.named_modules()] == [name for name, _ in plain.named_modules()]


def test_a_copy_has_it_too_and_probability_0_is_none():
    network, plain = u_net(), u_net()
    add_dropout(network, 0.5)
    add_dropout(plain, 0.0)
    image = torch.rand(2, 1, 16, 16)
    twin = copy.deepcopy(network)
    assert not torch.equal(twin(image)[0], twin(image)[0])
    torch.testing.assert_close(plain(image), plain(image), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [UXNet, KMaxUXNet])
def test_other_networks_disagree_with_themselves(kind):
    sizes = [[1, 1], [2, 2], [2, 2], [2, 2]]
    network = kind(1, 2, sizes, [[3, 3]] * 4, True, width=8, deepest=16).train()
    plain = copy.deepcopy(network)
    add_dropout(network, 0.5)
    image = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(plain(image)[0], plain(image)[0])
    assert not torch.equal(network(image)[0], network(image)[0])


def test_compiled_network_drops_anew_at_each_pass():
    network = u_net(deep_supervision=False)
    add_dropout(network, 0.5)
    compiled = torch.compile(network, backend="aot_eager")
    image = torch.rand(2, 1, 16, 16)
    assert not torch.equal(compiled(image), compiled(image))
    network.eval()
    torch.testing.assert_close(compiled(image), network(image))


def test_network_without_stages_is_named():
    with pytest.raises(NotImplementedError, match=r"Linear has no encoder.stages"):
        add_dropout(nn.Linear(1, 1), 0.5)
