"""Consistency, ramp and uncertainty against NumPy evaluations of the formulas."""

import math

import numpy as np
import pytest
import torch

from nnunetv2_selfreg.losses.consistency import (
    certain_voxels,
    gaussian_ramp_up,
    probabilities,
    squared_consistency,
    uncertainty,
)


@pytest.fixture
def logits():
    return torch.randn((2, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("length", [0.4, 1.0])
def test_ramp_rises_to_one_and_stays(length):
    values = [gaussian_ramp_up(t, length) for t in np.linspace(0, 1, 11)]
    assert values[0] == pytest.approx(math.exp(-5))
    assert values == sorted(values)
    assert gaussian_ramp_up(length / 2, length) == pytest.approx(math.exp(-5 * 0.25))
    assert gaussian_ramp_up(length, length) == values[-1] == 1


def test_probabilities_of_classes_and_of_regions(logits):
    array = logits.numpy()
    softmax = np.exp(array) / np.exp(array).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities(logits, regions=False), softmax)
    np.testing.assert_allclose(probabilities(logits, regions=True), 1 / (1 + np.exp(-array)))
    assert probabilities(logits.half(), regions=False).dtype == torch.float32


def test_consistency_is_the_mean_square_over_kept_voxels(logits):
    student, teacher = torch.rand_like(logits), torch.rand_like(logits)
    square = (student.numpy() - teacher.numpy()) ** 2
    assert float(squared_consistency(student, teacher)) == pytest.approx(square.mean())
    kept = torch.rand(2, 1, 4, 5) > 0.5
    mask = np.broadcast_to(kept.numpy(), square.shape)
    assert float(squared_consistency(student, teacher, kept)) == pytest.approx(square[mask].mean())
    assert squared_consistency(student, teacher, torch.zeros(2, 1, 4, 5)) == 0


def test_teacher_gets_no_gradient(logits):
    student, teacher = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (squared_consistency(student, teacher) + squared_consistency(student * 2, teacher)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_uncertainty_is_the_entropy(logits):
    p = probabilities(logits, regions=False).numpy()
    np.testing.assert_allclose(uncertainty(torch.from_numpy(p), False)[:, 0], -(p * np.log(p + 1e-6)).sum(1))
    q = probabilities(logits, regions=True).numpy()
    binary = -q * np.log(q + 1e-6) - (1 - q) * np.log(1 - q + 1e-6)
    np.testing.assert_allclose(uncertainty(torch.from_numpy(q), True), binary)


@pytest.mark.parametrize(("regions", "channels", "largest"), [(False, 2, 2), (False, 5, 5), (True, 3, 2)])
def test_threshold_grows_from_three_quarters_to_all_of_the_largest_entropy(regions, channels, largest):
    undecided = torch.full((1, channels, 2, 2), 0.5 if regions else 1 / channels)
    assert float(uncertainty(undecided, regions).max()) == pytest.approx(math.log(largest), abs=1e-4)
    assert not certain_voxels(undecided, regions, 0.0).any()
    sure = torch.zeros(1, channels, 2, 2)
    sure[:, 0] = 1
    assert certain_voxels(sure, regions, 0.0).all()
    # Entropy between 75 % and 100 % of the largest: kept once the ramp is up.
    between = 0.95 * undecided + 0.05 * sure if not regions else torch.full((1, channels, 2, 2), 0.3)
    assert not certain_voxels(between, regions, 0.0).any()
    assert certain_voxels(between, regions, 1.0).all()
