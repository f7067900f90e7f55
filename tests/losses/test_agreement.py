"""The consistency of two views against the released formula, loop by loop, and by hand."""

import math
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_selfreg.losses.agreement import contrastive_agreement, squared_agreement


def released(a: np.ndarray, b: np.ndarray, temperature: float = 0.5) -> float:
    """InfoNCE of the released program: dot products summed over voxels, the loss divided by their number."""

    def dots(x, y):
        x, y = (view / np.linalg.norm(view, axis=1, keepdims=True) for view in (x, y))
        return np.array([[(p * q).sum() / temperature for q in y] for p in x])

    def told_apart(own, across):
        rows = [np.r_[np.delete(row, i), others] for i, (row, others) in enumerate(zip(own, across, strict=True))]
        return np.mean([row.max() + math.log(np.exp(row - row.max()).sum()) for row in rows])

    s_ab = dots(a, b)
    loss = -np.trace(s_ab) / len(a) + (told_apart(dots(b, b), s_ab.T) + told_apart(dots(a, a), s_ab)) / 2
    return loss / a[0, 0].size


def views(seed: int, samples: int, channels: int, shape=(3, 4, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, samples, channels, *shape, generator=generator, dtype=torch.double))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 4))
def test_released_formula_is_a_special_case(seed, samples, channels):
    a, b = views(seed, samples, channels)
    voxels = a[0, 0].numel()
    found = contrastive_agreement(a, b, 0.5 / voxels) / voxels
    assert float(found) == pytest.approx(released(a.numpy(), b.numpy()), abs=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.05, 5))
def test_mean_over_voxels_is_the_released_formula_of_one_voxel_that_has_the_mean(seed, samples, temperature):
    """Of voxels that are all alike, the mean cosine is that of any of them."""
    a, b = (view.expand(-1, -1, 3, 4, 2) for view in views(seed, samples, 3, (1, 1, 1)))
    one = (view[..., :1, :1, :1].numpy() for view in (a, b))
    assert float(contrastive_agreement(a, b, temperature)) == pytest.approx(released(*one, temperature), abs=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_symmetric_in_the_views(seed, samples):
    a, b = views(seed, samples, 3)
    torch.testing.assert_close(contrastive_agreement(a, b), contrastive_agreement(b, a))
    torch.testing.assert_close(squared_agreement(a, b), squared_agreement(b, a))


def test_by_hand():
    """Two samples that have nothing in common: cosines 1 to themselves and 0 to each other, so 2 and 0 at 1/2."""
    a = torch.eye(2)[:, :, None].expand(2, 2, 5)
    alike = -2 + math.log(math.exp(2) + 1 + 1)
    assert float(contrastive_agreement(a, a)) == pytest.approx(alike)
    assert float(contrastive_agreement(a, a.flip(0))) == pytest.approx(0 + math.log(math.exp(2) + 1 + 1))
    assert float(squared_agreement(a, a.flip(0))) == pytest.approx(1)


def test_size_of_a_voxels_channels_does_not_count():
    a, b = views(0, 3, 4)
    scale = torch.rand(3, 1, *a.shape[2:]) + 0.1
    torch.testing.assert_close(contrastive_agreement(scale * a, b), contrastive_agreement(a, b))


@pytest.mark.parametrize("agreement", [contrastive_agreement, squared_agreement])
def test_both_views_learn_and_the_gradient_is_right(agreement):
    a, b = (view.requires_grad_() for view in views(1, 3, 2, (2, 2)))
    assert torch.autograd.gradcheck(agreement, (a, b))
    agreement(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0


def test_step_along_the_gradient_makes_views_of_a_sample_more_alike_than_others():
    a, b = (view.requires_grad_() for view in views(2, 4, 3))

    def lead():
        x, y = (torch.nn.functional.normalize(view, dim=1).flatten(1) for view in (a, b))
        cosines = (x @ y.T).detach()
        return float(cosines.diagonal().mean() - cosines.mean())

    before = lead()
    contrastive_agreement(a, b).backward()
    with torch.no_grad():
        for view in (a, b):
            view -= 10 * view.grad
    assert lead() > before


def test_single_sample_has_nothing_to_learn():
    a, b = (view.requires_grad_() for view in views(0, 1, 3))
    loss = contrastive_agreement(a, b)
    loss.backward()
    assert float(loss.detach()) == 0
    assert (a.grad == 0).all()
    assert (b.grad == 0).all()


def test_equal_views_have_no_squared_gradient():
    a = views(0, 2, 3)[0].requires_grad_()
    squared_agreement(a, a.detach().clone()).backward()
    assert (a.grad == 0).all()


SAID = {
    "one-hot": torch.eye(3)[1].reshape(3, 1, 1).expand(2, 3, 8, 8),
    "equal": torch.full((2, 3, 8, 8), 0.25),
    "zero": torch.zeros(2, 3, 8, 8),
    "huge": torch.tensor([[6e4, 0, 0], [0, -6e4, 6e4]]).reshape(2, 3, 1, 1).expand(2, 3, 8, 8),
    "noise": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("first", "second"), combinations_with_replacement(SAID, 2))
def test_finite_for_whatever_a_network_says(first, second, dtype):
    a, b = (SAID[name].to(dtype).clone().requires_grad_() for name in (first, second))
    loss = contrastive_agreement(a, b)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()


def test_similarities_are_of_single_precision_at_least():
    """Of 2^17 voxels half precision would sum none right."""
    a, b = (view.float() for view in views(0, 2, 3, (64, 64, 32)))
    expected = contrastive_agreement(a, b)
    with torch.autocast("cpu", dtype=torch.float16):
        torch.testing.assert_close(contrastive_agreement(a, b), expected, rtol=1e-6, atol=0)
