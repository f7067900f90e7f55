"""Signed distances against a comparison of every pair of voxels; foreground masks of nnU-Net's targets."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nnunetv2_selfreg.data import signed_distance_map
from nnunetv2_selfreg.data.foreground import Foreground
from nnunetv2_selfreg.data.signed_distance import WithSignedDistances


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


@settings(deadline=None, max_examples=150)
@given(masks, st.tuples(*[st.floats(0.3, 4)] * 4))
def test_equals_all_pairs_and_keeps_the_mask(mask, spacing):
    spacing = spacing[: mask.ndim]
    distance = signed_distance_map(mask, spacing)
    assert distance.dtype == np.float32
    np.testing.assert_allclose(distance, by_all_pairs(mask, spacing), atol=1e-5)
    np.testing.assert_array_equal(distance < 0, mask)
    assert (distance != 0).all()


@pytest.mark.parametrize("shape", [(9, 8), (6, 9, 8)])
@pytest.mark.parametrize("where", ["middle", "corner", "border", "two parts"])
def test_masks_that_touch_the_border_or_have_a_single_voxel(shape, where):
    mask = np.zeros(shape, bool)
    if where == "middle":
        mask[tuple(s // 2 for s in shape)] = True
    elif where == "corner":
        mask[tuple(s - 1 for s in shape)] = True
    elif where == "border":
        mask[..., :3] = True
    else:
        mask[tuple(slice(0, 2) for _ in shape)] = mask[tuple(slice(-3, None) for _ in shape)] = True
    for spacing in (None, [2.5, 1, 0.7][-len(shape) :]):
        expected = by_all_pairs(mask, spacing or [1] * len(shape))
        np.testing.assert_allclose(signed_distance_map(mask, spacing), expected, atol=1e-5)


def test_mask_in_fortran_order_and_as_a_view():
    mask = np.random.default_rng(0).random((12, 10, 8)) > 0.7
    expected = signed_distance_map(mask)
    np.testing.assert_array_equal(signed_distance_map(np.asfortranarray(mask)), expected)
    np.testing.assert_array_equal(signed_distance_map(mask.T).T, expected)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1,), (1, 0), (1, -2), (1, float("nan")), (1, float("inf"))])
def test_spacing_must_be_positive_for_each_axis(spacing):
    with pytest.raises(ValueError, match="spacing"):
        signed_distance_map(np.ones((3, 3), bool), spacing)


def test_mask_must_be_boolean():
    with pytest.raises(TypeError, match="uint8"):
        signed_distance_map(np.ones((3, 3), np.uint8))


def test_masks_of_classes_leave_ignored_voxels_out():
    foreground = Foreground(2, regions=False, ignore_label=3)
    target = torch.tensor([0, 1, 2, 3]).reshape(1, 1, 2, 2).float()
    assert foreground.masks(target)[0].flatten(1).tolist() == [[False, True, False, False], [False, False, True, False]]
    assert foreground.valid(target).flatten().tolist() == [True, True, True, False]


def test_masks_of_regions_leave_ignored_voxels_out():
    foreground = Foreground(2, regions=True, ignore_label=3)
    target = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).reshape(1, 3, 2, 2).float()
    assert foreground.masks(target)[0].flatten(1).tolist() == [[False, True, True, False], [False, False, True, False]]
    assert foreground.valid(target).flatten().tolist() == [True, True, True, False]
    without = Foreground(3, regions=True, ignore_label=None)
    assert without.valid(target).all()
    assert torch.equal(without.masks(target), target > 0)


def test_a_label_that_the_data_set_does_not_have_is_found():
    known, ignored, unknown = (torch.tensor([[[[label, 1.0]]]]) for label in (2, 3, 4))
    plain, ignoring = (Foreground(2, regions=False, ignore_label=label) for label in (None, 3))
    assert [plain.unknown_label(target) for target in (known, ignored, unknown)] == [None, 3, 4]
    assert [ignoring.unknown_label(target) for target in (known, ignored, unknown)] == [None, None, 4]


class Labeled:
    """A labelled stream of one batch, as nnU-Net's loader yields it."""

    def set_thread_id(self, thread_id):
        self.thread = thread_id

    def __next__(self):
        target = torch.zeros(2, 1, 4, 6, 5)
        target[0, 0, 1:3, 2:4] = 1
        target[1, 0, :2] = 2
        return {"data": torch.zeros(2, 1, 4, 6, 5), "target": [target, target[..., ::2, ::2, ::2]], "keys": ["a", "b"]}


@pytest.mark.parametrize("copied", [False, True])
def test_stream_brings_the_maps_of_each_class_in_the_spacing_given(copied):
    spacing = (3.0, 1.0, 0.5)
    stream = WithSignedDistances(Labeled(), Foreground(2, regions=False, ignore_label=None), spacing)
    if copied:  # as worker processes that are not forked get it
        stream = pickle.loads(pickle.dumps(stream))
    stream.set_thread_id(3)  # as nnU-Net's augmenter does in each worker
    assert stream.loader.thread == 3
    batch = next(iter(stream))
    assert batch["distance"].shape == (2, 2, 4, 6, 5)
    for sample in (0, 1):
        for label in (1, 2):
            mask = (batch["target"][0][sample, 0] == label).numpy()
            expected = by_all_pairs(mask, spacing)
            np.testing.assert_allclose(batch["distance"][sample, label - 1], expected, atol=1e-5)
