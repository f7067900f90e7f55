"""Signed distances against a comparison of every pair of voxels."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nnunetv2_selfreg.data import signed_distance_map


def by_all_pairs(mask: np.ndarray, spacing) -> np.ndarray:
    """Every inside voxel against every outside one; a side divided by its largest distance."""
    if mask.all() or not mask.any():
        return np.where(mask, -1.0, 1.0)
    inside, outside = (np.argwhere(part) * np.asarray(spacing, float) for part in (mask, ~mask))
    pairs = np.linalg.norm(inside[:, None] - outside[None], axis=-1)
    result = np.empty(mask.shape)
    result[mask] = -pairs.min(1) / pairs.min(1).max()
    result[~mask] = pairs.min(0) / pairs.min(0).max()
    return result


masks = arrays(bool, array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7)) | arrays(
    bool, array_shapes(min_dims=4, max_dims=4, min_side=1, max_side=4)
)


@settings(max_examples=150)
@given(masks, st.tuples(*[st.floats(0.3, 4)] * 4))
def test_equals_all_pairs_and_keeps_the_mask(mask, spacing):
    spacing = spacing[: mask.ndim]
    distance = signed_distance_map(mask, spacing)
    assert distance.dtype == np.float32
    np.testing.assert_allclose(distance, by_all_pairs(mask, spacing), atol=1e-5)
    np.testing.assert_array_equal(distance < 0, mask)
    assert (distance != 0).all()


@pytest.mark.parametrize("shape", [(9, 8), (6, 9, 8)])
@pytest.mark.parametrize("where", ["empty", "full", "middle", "corner", "border", "two parts"])
def test_masks_that_are_empty_or_full_or_touch_the_border_or_have_a_single_voxel(shape, where):
    mask = np.full(shape, where == "full")
    if where == "middle":
        mask[tuple(s // 2 for s in shape)] = True
    elif where == "corner":
        mask[tuple(s - 1 for s in shape)] = True
    elif where == "border":
        mask[..., :3] = True
    elif where == "two parts":
        mask[tuple(slice(0, 2) for _ in shape)] = mask[tuple(slice(-3, None) for _ in shape)] = True
    for spacing in (None, [2.5, 1, 0.7][-len(shape) :]):
        expected = by_all_pairs(mask, spacing or [1] * len(shape))
        np.testing.assert_allclose(signed_distance_map(mask, spacing), expected, atol=1e-5)


def test_mask_in_fortran_order_and_as_a_view():
    mask, spacing = np.random.default_rng(0).random((12, 10, 8)) > 0.7, (3, 1, 0.4)
    expected = signed_distance_map(mask, spacing)
    np.testing.assert_array_equal(signed_distance_map(np.asfortranarray(mask), spacing), expected)
    np.testing.assert_allclose(signed_distance_map(mask.T, spacing[::-1]).T, expected, rtol=1e-6)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1,), (1, 0), (1, -2), (1, np.nan), (1, np.inf), 2.0, ("a", 1)])
def test_spacing_must_be_positive_for_each_axis(spacing):
    with pytest.raises(ValueError, match="it must have a positive number for each of 2 axes"):
        signed_distance_map(np.ones((3, 3), bool), spacing)


def test_mask_must_be_boolean():
    with pytest.raises(TypeError, match="the mask is an array of uint8"):
        signed_distance_map(np.ones((3, 3), np.uint8))
    with pytest.raises(TypeError, match="the mask is a list, it must be a boolean NumPy array"):
        signed_distance_map([[True, False]])


def test_other_data_modules_need_neither_torch_nor_edt():
    """The command line's, for one, should start at once, and with a damaged edt too."""
    program = "import sys, nnunetv2_selfreg.data.signed_distance; assert not {'torch', 'edt'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
