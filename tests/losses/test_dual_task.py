"""The transform between the tasks, and the regression of distances."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunetv2_selfreg.data import signed_distance_map
from nnunetv2_selfreg.losses.dual_task import distance_regression, occurring, predicted_distance, soft_mask


@given(arrays(bool, array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=8)))
def test_soft_mask_of_a_distance_map_is_the_mask(mask):
    soft = soft_mask(torch.from_numpy(signed_distance_map(mask)))
    np.testing.assert_allclose(soft, mask, atol=1e-6)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (5, 0.3, 0.3)])
@pytest.mark.parametrize("part", ["ball", "all but a corner", "a voxel"])
def test_soft_mask_is_the_mask_at_a_real_patch_size(part, spacing):
    """Where the largest distance is many voxels long a voxel at the surface is only on the right side of 0.5."""
    mask = np.zeros((80, 112, 112), bool)
    if part == "ball":
        grid = np.indices(mask.shape) - np.array([40, 50, 60]).reshape(3, 1, 1, 1)
        mask = (grid**2).sum(0) < 30**2
    else:
        mask[-1, -1, -1] = True
        mask = ~mask if part == "all but a corner" else mask
    soft = soft_mask(torch.from_numpy(signed_distance_map(mask, spacing)))
    np.testing.assert_array_equal(soft > 0.5, mask)


def test_predicted_distance_keeps_the_precision():
    assert predicted_distance(torch.zeros(1, dtype=torch.float16)).dtype == torch.float32
    output = torch.randn(5, dtype=torch.float64)
    assert torch.equal(predicted_distance(output), output.tanh())


def test_classes_that_occur_in_a_sample():
    masks = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    masks[0, 1, 2, 2] = True
    assert occurring(masks).flatten(1).tolist() == [[False, True], [False, False]]
    assert occurring(masks).shape == (2, 2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transform_and_gradient_are_finite_in_half_precision(dtype):
    distance = torch.linspace(-1, 1, 2001, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        soft = soft_mask(distance)
        soft.sum().backward()
    assert soft.dtype == torch.float32
    assert soft.isfinite().all()
    assert distance.grad.isfinite().all()
    assert soft[0] == 1
    assert soft[-1] == 0


@pytest.mark.parametrize("voxels", [1, 5, 50])
def test_gradient_of_a_small_structure_fits_in_half_precision(voxels):
    """nnU-Net's Dice of a structure about which the network is undecided, times its gradient scaler's first scale."""
    target = torch.zeros(1, 1, 16, 16, 16, dtype=torch.bool)
    target.view(-1)[:voxels] = True
    output = torch.where(target, -3.0, 3.0).half()
    output.view(-1)[0] = 0
    output.requires_grad_()
    dice = MemoryEfficientSoftDiceLoss(do_bg=True, smooth=1e-5, ddp=False)
    (2**16 * dice(soft_mask(predicted_distance(output)), target)).backward()
    assert output.grad.isfinite().all()
    assert output.grad.view(-1)[0].abs() > 1000


@pytest.mark.parametrize("sharpness", [0, -1, float("nan")])
def test_sharpness_must_be_positive(sharpness):
    with pytest.raises(ValueError, match="the sharpness is"):
        soft_mask(torch.zeros(1), sharpness)


def test_slope_at_the_surface_is_a_quarter_of_the_sharpness():
    distance = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    soft_mask(distance, sharpness=20.0).backward()
    assert distance.grad.item() == pytest.approx(-5)
    assert torch.autograd.gradcheck(
        lambda z: soft_mask(z, 20.0), (torch.randn(5, dtype=torch.float64) / 20).requires_grad_()
    )


def test_regression_is_the_mean_over_valid_voxels_of_classes_that_occur():
    generator = torch.Generator().manual_seed(0)
    predicted, distance = torch.rand(2, 2, 2, 3, 4, 5, generator=generator)
    distance[0, 0] -= 0.5
    distance[1, 1] -= 0.5  # the two other pairs of sample and class have no inside
    valid = torch.rand(2, 1, 3, 4, 5, generator=generator) > 0.3
    squares = [((predicted[i, i] - distance[i, i]) ** 2)[valid[i, 0]] for i in (0, 1)]
    torch.testing.assert_close(distance_regression(predicted, distance, valid), torch.cat(squares).mean())


@pytest.mark.parametrize("nothing", ["no class", "all ignored"])
def test_regression_on_nothing_is_zero_with_a_zero_gradient(nothing):
    predicted = torch.rand(1, 2, 4, 4, requires_grad=True)
    distance = torch.ones(1, 2, 4, 4) * (1 if nothing == "no class" else -1)
    loss = distance_regression(predicted, distance, torch.full((1, 1, 4, 4), nothing == "no class"))
    loss.backward()
    assert loss == 0
    assert not predicted.grad.any()
