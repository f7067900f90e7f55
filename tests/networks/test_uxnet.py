import copy
import itertools

import pytest
import torch
from monai_uxnet import Assembled
from network_memory import peak_memory

from nnunetv2_selfreg.networks.features import FeatureTaps
from nnunetv2_selfreg.networks.uxnet import UXBlock, UXNet

ISOTROPIC = [[1, 1, 1], *[[2, 2, 2]] * 4]
PLANS = {
    "3D": ((16, 32, 16), [[1, 1, 1], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 3),
    "3D, anisotropic": ((6, 32, 48), [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]], [[1, 3, 3]] * 2 + [[3, 3, 3]] * 2),
    "2D": ((32, 48), [[1, 1], [2, 2], [2, 2], [2, 2]], [[3, 3]] * 4),
    "2D, one axis halved alone": ((32, 24), [[1, 1], [2, 1], [2, 2], [1, 2]], [[3, 3]] * 4),
    "six stages": ((64, 64), [[1, 1], *[[2, 2]] * 5], [[3, 3]] * 6),
}


def small(plan="3D", **arguments):
    shape, strides, kernels = PLANS[plan]
    torch.manual_seed(0)
    network = UXNet(2, 3, strides, kernels, **{"width": 4, "deepest": 24, "layer_scale": 1.0, **arguments})
    return network, torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(1))


def gradients(network, image):
    torch.manual_seed(2)
    network.zero_grad()
    sum((output**2).mean() for output in network(image)).backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def test_numbers_of_parameters_are_the_published_ones():
    network = UXNet(1, 2, ISOTROPIC, [[3, 3, 3]] * 5)
    trunk = [*network.encoder.stages[1:].parameters(), *network.encoder.norms.parameters()]
    assert sum(p.numel() for p in trunk) == 1_311_936
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(53.0e6, abs=0.5e6)


def test_defaults_are_the_published_ones():
    network = UXNet(1, 2, ISOTROPIC, [[3, 3, 3]] * 5)
    assert network.encoder.output_channels == [48, 96, 192, 384, 768]
    blocks = [module for module in network.modules() if isinstance(module, UXBlock)]
    assert len(blocks) == 8
    assert all((block.layer_scale == 1e-6).all() for block in blocks)
    assert all(isinstance(block.drop_path, torch.nn.Identity) for block in blocks)


def test_output_and_gradient_are_those_of_monais_blocks():
    network, _ = small(deepest=24)
    assembled = Assembled(network)
    image = torch.randn(2, 2, 16, 32, 16)
    for mine, theirs in zip(network(image), assembled(image), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    gradients(network, image)
    gradients(assembled, image)
    for mine, theirs in (
        (network.encoder.stages[1][1].depthwise, assembled.blocks[0][0].depthwise),
        (network.encoder.stages[1][0][0], assembled.downsampling[0][0]),
        (network.decoder.transpconvs[0], assembled.ups[0].transp_conv.conv),
    ):
        torch.testing.assert_close(mine.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_scales_are_those_of_nnunets_deep_supervision(plan):
    network, image = small(plan)
    shape, strides, _ = PLANS[plan]
    totals = list(itertools.accumulate(strides, lambda a, b: [x * y for x, y in zip(a, b, strict=True)]))
    expected = [(2, 3, *(n // s for n, s in zip(shape, total, strict=True))) for total in totals[:-1]]
    assert [tuple(output.shape) for output in network(image)] == expected
    full, *_ = network(image)
    network.decoder.deep_supervision = False
    assert torch.equal(network(image), full)


def test_kernel_is_large_where_the_plan_convolves():
    network, _ = small("3D, anisotropic")
    kernels = [stage[1].depthwise.kernel_size for stage in network.encoder.stages[1:]]
    assert kernels == [(1, 7, 7), (7, 7, 7), (7, 7, 7)]


def test_depthwise_convolutions_are_given_the_fastest_layout():
    network, image = small(width=16, deepest=32)
    given = []
    for block in (module for module in network.modules() if isinstance(module, UXBlock)):
        block.depthwise.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    network(image)
    assert len(given) == 4
    assert all(feature.is_contiguous(memory_format=torch.channels_last_3d) for feature in given)
    assert not any(feature.is_contiguous() for feature in given)


def test_taps_read_the_trunk_and_the_decoder():
    network, image = small("2D")
    taps = FeatureTaps(network)
    network(image)
    encoder, decoder, final = taps.take()
    assert [f.shape[1:] for f in encoder] == [(4, 16, 24), (8, 8, 12), (16, 4, 6)]
    assert [f.shape[1:] for f in decoder] == [(16, 8, 12), (8, 16, 24)]
    torch.testing.assert_close(network.decoder.seg_layers[-1](final), network(image)[0])


def test_stochastic_depth_grows_to_its_largest_in_the_last_block():
    network, image = small(drop_path=0.6)
    probabilities = [getattr(m.drop_path, "drop_prob", 0) for m in network.modules() if isinstance(m, UXBlock)]
    assert probabilities == pytest.approx([0, 0.2, 0.4, 0.6])
    assert not torch.equal(network(image)[0], network(image)[0])
    network.eval()
    assert torch.equal(network(image)[0], network(image)[0])


def test_layer_scale_weighs_the_blocks():
    network, _ = small(layer_scale=0.0)
    feature = torch.randn(1, 4, 8, 8, 8)
    assert torch.equal(network.encoder.stages[1][1](feature), feature)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_activation_checkpointing_changes_no_gradient_and_no_name(drop_path):
    (plain, image), (saving, _) = small(drop_path=drop_path), small(drop_path=drop_path, activation_checkpointing=True)
    assert list(plain.state_dict()) == list(saving.state_dict())
    torch.testing.assert_close(gradients(saving, image), gradients(plain, image))


def test_activation_checkpointing_saves_more_than_half_the_memory():
    plain, saving = (
        peak_memory(lambda on=on: UXNet(1, 2, ISOTROPIC[:3], [[3, 3, 3]] * 3, activation_checkpointing=on), [96] * 3, 1)
        for on in (False, True)
    )
    assert saving < plain / 2


def test_copy_with_checkpointing_runs_its_own_weights():
    network, image = small(activation_checkpointing=True)
    teacher = copy.deepcopy(network)
    before = teacher(image)[0].detach()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert torch.equal(teacher(image)[0], before)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("drop_path", 1.5), ("drop_path", -0.5), ("layer_scale", float("nan")), ("width", 0), ("deepest", -1)],
)
def test_impossible_argument_is_an_error(argument, value):
    with pytest.raises(ValueError, match=f"{argument} (is )?{value}"):
        small(**{argument: value})


def test_two_stages_are_an_error():
    with pytest.raises(NotImplementedError, match="3 resolution stages at least, here are 2"):
        UXNet(1, 2, [[1, 1], [2, 2]], [[3, 3]] * 2)


def test_stride_of_the_first_stage_is_an_error():
    with pytest.raises(ValueError, match=r"the stride \[2, 2\].*Correct strides"):
        UXNet(1, 2, [[2, 2]] * 3, [[3, 3]] * 3)


@pytest.mark.parametrize("kernels", [[[3, 3]] * 2, [[3, 3]] * 2 + [[3]], [3, 3, 3]])
def test_kernels_that_do_not_fit_the_strides_are_an_error(kernels):
    with pytest.raises(ValueError, match=r"a kernel size for each stage and axis.*Correct kernel_sizes"):
        UXNet(1, 2, [[1, 1], [2, 2], [2, 2]], kernels)


def test_even_kernel_is_an_error():
    with pytest.raises(ValueError, match=r"kernel size \[3, 4\].*Correct kernel_sizes"):
        UXNet(1, 2, [[1, 1], [2, 2], [2, 2]], [[3, 3], [3, 4], [3, 3]])
