"""The box, the mixtures at every scale, and the largest components."""

import itertools

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from nnunetv2_selfreg.data.mixing import at_size, box_masks, box_sides, largest_components, mix


@given(st.lists(st.integers(4, 12), min_size=2, max_size=3), st.floats(0.3, 0.95))
def test_mask_is_one_box_of_the_right_sides(size, ratio):
    masks = box_masks(3, size, ratio)
    assert masks.shape == (3, 1, *size)
    for mask in ~masks[:, 0].numpy():
        (place,) = ndimage.find_objects(mask.astype(int))
        assert mask[place].all()
        assert mask.sum() == mask[place].size
        assert mask[place].shape == tuple(int(ratio * length) for length in size)


def test_box_is_anywhere_in_the_patch():
    starts = {tuple(np.argwhere(~mask[0].numpy())[0]) for mask in box_masks(500, (5, 4), 0.6)}
    assert starts == {(a, b) for a in range(3) for b in range(3)}


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_ratio_outside_0_and_1_is_named(ratio):
    with pytest.raises(ValueError, match=f"the box ratio is {ratio}, it must be between 0 and 1"):
        box_sides((8, 8), ratio)


def test_empty_box_is_named():
    with pytest.raises(ValueError, match=r"a box of 0.667 of a patch of \(1, 8, 8\) voxels is empty"):
        box_sides((1, 8, 8), 2 / 3)


@pytest.mark.parametrize("size", [(6, 5), (4, 6, 5)])
def test_mask_of_ones_is_the_first_of_zeros_the_second(size):
    first, second = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    ones = torch.ones(2, 1, *size, dtype=torch.bool)
    assert torch.equal(mix(first, second, ones), first)
    assert torch.equal(mix(first, second, ~ones), second)


@pytest.mark.parametrize("size", [(16, 12), (8, 16, 12)])
def test_targets_follow_at_every_scale(size):
    """Mixing at a scale is nnU-Net's downsampling of what was mixed at full resolution."""
    labeled, other = (torch.randint(0, 5, (2, 2, *size)).float() for _ in range(2))
    masks = box_masks(2, size, 2 / 3)
    scales = [[1.0] * len(size), [0.5] * len(size), [1.0, *[0.25] * (len(size) - 1)]]
    downsample = DownsampleSegForDSTransform(scales)
    whole = mix(labeled, other, masks)
    expected = [torch.stack(scale) for scale in zip(*map(downsample._apply_to_segmentation, whole), strict=True)]
    for scale in expected:
        mine = mix(at_size(labeled, scale.shape[2:]), at_size(other, scale.shape[2:]), masks)
        assert torch.equal(mine, scale)


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """The components of a mask, by flooding from voxel to voxel."""
    rest, components = {tuple(voxel) for voxel in np.argwhere(mask)}, []
    steps = list(itertools.product((-1, 0, 1), repeat=mask.ndim))
    while rest:
        todo, found = [rest.pop()], []
        while todo:
            found.append(voxel := todo.pop())
            neighbours = {tuple(a + b for a, b in zip(voxel, step, strict=True)) for step in steps} & rest
            rest -= neighbours
            todo += neighbours
        component = np.zeros_like(mask)
        component[tuple(np.transpose(found))] = True
        components.append(component)
    return components


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("size", [(9, 9), (6, 7, 8)])
def test_largest_component_of_each_class_in_each_sample(size, regions):
    generator = np.random.default_rng(0)
    shape = (3, 2 if regions else 1, *size)
    labels = generator.random(shape) < 0.15 if regions else generator.choice(3, shape, p=[0.8, 0.1, 0.1])
    given = torch.from_numpy(labels.copy())
    kept = largest_components(given).numpy()
    assert torch.equal(given, torch.from_numpy(labels))  # stays as it is
    assert kept.dtype == labels.dtype
    for sample, before in zip(kept, labels, strict=True):
        for label in (0, 1) if regions else (1, 2):
            mask, rest = (before[label], sample[label]) if regions else (before[0] == label, sample[0] == label)
            components = connected(mask)
            assert rest.sum() == max(component.sum() for component in components) < mask.sum()
            assert any(np.array_equal(rest, component) for component in components)


def test_nothing_is_the_largest_component_of_nothing():
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    assert torch.equal(largest_components(nothing), nothing)
    assert torch.equal(largest_components(nothing.bool()), nothing.bool())
