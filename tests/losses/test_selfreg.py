"""SCR and IFD against a NumPy evaluation of the formulas, written with loops and without the library's shortcuts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_selfreg.losses import SelfRegularizedLoss, internal_feature_distillation, semantic_consistency
from nnunetv2_selfreg.losses.selfreg import channel_ranking
from nnunetv2_selfreg.tensors import average_pool

SHAPES = [  # feature, final
    ((2, 6, 4, 4), (2, 4, 8, 8)),  # 2D
    ((2, 3, 4, 6), (2, 5, 12, 6)),  # 2D, anisotropic, more final channels
    ((1, 8, 2, 4, 4), (1, 4, 4, 16, 8)),  # 3D, anisotropic
    ((2, 4, 5, 6, 7), (2, 4, 5, 12, 14)),  # 3D, one axis not pooled
    ((2, 4, 3, 5), (2, 4, 8, 12)),  # not an even division
]


def numpy_pool(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Adaptive average pooling, one output voxel after the other."""
    pooled = np.zeros((*array.shape[:2], *shape))
    for index in np.ndindex(*shape):
        window = tuple(
            slice(math.floor(i * have / want), math.ceil((i + 1) * have / want))
            for i, have, want in zip(index, array.shape[2:], shape, strict=True)
        )
        cut = array[(slice(None), slice(None), *window)]
        pooled[(slice(None), slice(None), *index)] = cut.mean(axis=tuple(range(2, array.ndim)))
    return pooled


def numpy_scr(feature: np.ndarray, final: np.ndarray, i: np.ndarray, j: np.ndarray) -> float:
    return float(((feature[:, i] - numpy_pool(final, feature.shape[2:])[:, j]) ** 2).mean())


def numpy_ranking(feature: np.ndarray) -> np.ndarray:
    keys = np.zeros(feature.shape[1])
    for channel in range(feature.shape[1]):
        for sample in feature[:, channel]:
            keys[channel] += (sample / np.sqrt((sample**2).sum())).mean() / len(feature)
    return np.argsort(-keys)


def numpy_ifd(feature: np.ndarray, ranking: np.ndarray) -> float:
    half = feature.shape[1] // 2
    return float(((feature[:, ranking[:half]] - feature[:, ranking[half : 2 * half]]) ** 2).mean())


def random(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("feature_shape", "final_shape"), SHAPES)
def test_scr_equals_the_formula(feature_shape, final_shape, dtype):
    feature, final = random(feature_shape), random(final_shape, 1)
    n = min(feature_shape[1], final_shape[1])
    i, j = torch.randperm(feature_shape[1])[:n], torch.randperm(final_shape[1])[:n]
    result = semantic_consistency(feature.to(dtype), final.to(dtype), (i, j))
    assert result.dtype == dtype
    assert float(result) == pytest.approx(numpy_scr(feature.numpy(), final.numpy(), i.numpy(), j.numpy()), abs=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 7, 4, 6), (3, 8, 2, 4, 4), (1, 2, 3, 3, 3)])
def test_ifd_equals_the_formula(shape):
    feature = random(shape)
    expected = numpy_ifd(feature.numpy(), numpy_ranking(feature.numpy()))
    assert float(internal_feature_distillation(feature.float())) == pytest.approx(expected, abs=1e-5)
    paper = numpy_ifd(feature.numpy(), np.arange(shape[1]))
    assert float(internal_feature_distillation(feature, order="index")) == pytest.approx(paper, abs=1e-5)


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=30)
def test_ranking_is_the_order_of_the_normalised_activation(channels, batch, seed):
    feature = random((batch, channels, 3, 4), seed)
    assert channel_ranking(feature).tolist() == numpy_ranking(feature.numpy()).tolist()


def test_gradients():
    feature, final = random((2, 5, 2, 4, 2)).requires_grad_(), random((2, 4, 4, 4, 4), 1).requires_grad_()
    channels = (torch.tensor([4, 1, 0]), torch.tensor([2, 0, 3]))
    assert torch.autograd.gradcheck(lambda x: semantic_consistency(x, final.detach(), channels), feature)
    assert torch.autograd.gradcheck(internal_feature_distillation, feature)
    # One way: finite differences see the teacher, too, so only the student's half is checked, teacher held fixed.
    teacher = feature.detach()[:, :2]

    def student_half(bottom):
        return internal_feature_distillation(torch.cat([teacher, bottom], 1), order="index", stop_gradient=True)

    assert torch.autograd.gradcheck(student_half, feature.detach()[:, 2:4].requires_grad_())


def test_final_feature_map_gets_no_gradient():
    feature, final = random((1, 4, 2, 2)).requires_grad_(), random((1, 4, 4, 4)).requires_grad_()
    semantic_consistency(feature, final).backward()
    assert final.grad is None
    assert feature.grad.abs().sum() > 0


def test_one_way_distillation_leaves_the_teacher_alone():
    feature = random((1, 4, 3, 3)).requires_grad_()
    internal_feature_distillation(feature, order="index", stop_gradient=True).backward()
    assert feature.grad[:, :2].abs().sum() == 0
    assert feature.grad[:, 2:].abs().sum() > 0


def test_channels_are_drawn_from_both_maps_without_replacement_at_every_call():
    """With one-hot channels the loss tells which channels met: 0 where equal, so over draws it varies."""
    feature = torch.arange(8.0).reshape(1, 8, 1, 1)
    final = 100 * torch.arange(4.0).reshape(1, 4, 1, 1)
    draws = {float(semantic_consistency(feature, final)) for _ in range(200)}
    assert len(draws) > 50
    # All four channels of `final` take part in each draw: their mean square alone is 35000.
    assert min(draws) > 100**2 * 14 / 4 - 2 * 7 * 300


def test_last_channel_of_an_odd_number_is_left_out():
    feature = random((1, 5, 3, 3))
    ranking = channel_ranking(feature)
    louder = feature.clone()
    louder[:, ranking[-1]] -= 100  # stays last
    assert internal_feature_distillation(louder) == internal_feature_distillation(feature)


def test_single_channel_has_nothing_to_distil():
    assert internal_feature_distillation(torch.ones(2, 1, 4, 4)) == 0


def test_index_tensors_must_be_of_one_length():
    with pytest.raises(ValueError, match="2 indices for feature and 1 for final"):
        semantic_consistency(
            torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), (torch.tensor([0, 1]), torch.tensor([0]))
        )


def test_half_precision_features_are_compared_in_single_precision():
    feature, final = 300 * torch.ones(1, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    assert semantic_consistency(feature, final).dtype == torch.float32
    assert semantic_consistency(feature, final) == 90000  # not representable in bfloat16
    assert internal_feature_distillation(feature).dtype == torch.float32


@pytest.mark.parametrize(
    ("feature", "final"),
    [((2, 4, 4, 4), (1, 4, 8, 8)), ((2, 4, 4, 4), (2, 4, 4, 4, 4)), ((2, 4, 8, 8), (2, 4, 16, 4))],
)
def test_maps_that_do_not_fit_are_an_error(feature, final):
    with pytest.raises(ValueError, match=r"feature"):
        semantic_consistency(torch.zeros(feature), torch.zeros(final))


def test_unknown_order_is_an_error():
    with pytest.raises(ValueError, match=r"'random'.*activation.*index"):
        internal_feature_distillation(torch.zeros(1, 4, 2, 2), order="random")


def no_loss(*_):
    return torch.tensor(0.0)


class FixedTaps:
    """Features at hand instead of a network."""

    def __init__(self, encoder, decoder, final):
        self.features = encoder, decoder, final
        self.active = True

    def take(self):
        return self.features


@pytest.fixture(params=["even", "uneven"])
def u_net_features(request):
    """3D, the first pooling anisotropic; of 16 x 16 or 15 x 15, which 8 and 4 do not divide."""
    encoder = [random((2, 6, 4, 8, 8)), random((2, 8, 2, 4, 4), 1)]
    decoder = [random((2, 6, 4, 8, 8), 2)]
    side = {"even": 16, "uneven": 15}[request.param]
    return encoder, decoder, random((2, 4, 4, side, side), 3)


def test_loss_averages_over_blocks_as_the_released_program(u_net_features, monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    encoder, decoder, final = u_net_features
    loss = SelfRegularizedLoss(lambda *_: torch.tensor(2.0), FixedTaps(encoder, decoder, final), 0.1, 0.01)
    total = loss(final, None)

    def scr(f):
        return numpy_scr(f.numpy(), final.numpy(), np.arange(4), np.arange(4))

    def ifd(f):
        return numpy_ifd(f.numpy(), numpy_ranking(f.numpy()))

    expected_scr = np.mean([scr(f) for f in [*encoder, *decoder]])
    expected_ifd = np.mean([ifd(f) for f in encoder]) + np.mean([ifd(f) for f in decoder])
    assert float(loss.terms["scr"]) == pytest.approx(expected_scr, abs=1e-5)
    assert float(loss.terms["ifd"]) == pytest.approx(expected_ifd, abs=1e-5)
    assert float(total) == pytest.approx(2 + 0.1 * expected_scr + 0.01 * expected_ifd, abs=1e-5)
    assert not any(term.requires_grad for term in loss.terms.values())


def test_loss_in_evaluation_is_the_segmentation_loss(u_net_features):
    taps = FixedTaps(*u_net_features)
    taps.active = False
    loss = SelfRegularizedLoss(lambda *_: torch.tensor(2.0), taps, 0.1, 0.1)
    assert loss(None, None) == 2
    assert loss.terms == {}


def test_term_without_weight_is_not_computed(u_net_features):
    loss = SelfRegularizedLoss(lambda *_: torch.tensor(2.0), FixedTaps(*u_net_features), 0, 0.1)
    loss(u_net_features[-1], None)
    assert set(loss.terms) == {"segmentation", "ifd"}


def test_blocks_of_a_single_channel_do_not_count_in_ifd(u_net_features):
    encoder, decoder, final = u_net_features
    with_single = [*encoder, random((2, 1, 2, 4, 4), 9)]
    losses = [SelfRegularizedLoss(no_loss, FixedTaps(e, decoder, final), 0, 1) for e in (encoder, with_single)]
    assert losses[0](final, None) == losses[1](final, None)


def test_what_sees_padding_alone_does_not_count(monkeypatch):
    """An image of 10 x 16 in a network of 16 x 16: of 4 x 4 places three rows see it, of 2 x 2 both."""
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    encoder, decoder, final = (
        [random((2, 6, 4, 4)), random((2, 6, 2, 2), 1)],
        [random((2, 6, 4, 4), 2)],
        random((2, 6, 16, 16), 3),
    )
    loss = SelfRegularizedLoss(no_loss, FixedTaps(encoder, decoder, final), 1, 1)
    loss(final[:, :, :10], None)
    image = [encoder[0][:, :, :3], encoder[1], decoder[0][:, :, :3]]
    finals = [final[:, :, :12], final, final[:, :, :12]]
    channels = np.arange(6), np.arange(6)
    expected = [numpy_scr(f.numpy(), g.numpy(), *channels) for f, g in zip(image, finals, strict=True)]
    assert float(loss.terms["scr"]) == pytest.approx(np.mean(expected), abs=1e-5)
    ifd = [numpy_ifd(f.numpy(), numpy_ranking(f.numpy())) for f in image]
    assert float(loss.terms["ifd"]) == pytest.approx(np.mean(ifd[:2]) + ifd[2], abs=1e-5)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["lambda_scr", "lambda_ifd"])
def test_lambda_must_be_finite_and_not_negative(name, value, u_net_features):
    lambdas = {"lambda_scr": 0.1, "lambda_ifd": 0.1, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        SelfRegularizedLoss(no_loss, FixedTaps(*u_net_features), **lambdas)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=3), st.integers(0, 99))
@settings(max_examples=30)
def test_pooling_equals_adaptive_average_pooling(sizes, seed):
    shape, larger = tuple(n for n, _ in sizes), tuple(n * k for n, k in sizes)
    feature = random((1, 2, *larger), seed)
    np.testing.assert_allclose(average_pool(feature, shape).numpy(), numpy_pool(feature.numpy(), shape), atol=1e-12)
