"""The two views of a patch: one geometry, other intensities."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from workspace import seed

from nnunetv2_selfreg.data.views import LabeledViews, TwoViews, outside_of_body


def transforms(dimension: int, dummy_2d: bool = False, masks: bool = False):
    patch = (16,) * dimension
    axes = tuple(range(dimension))
    return nnUNetTrainer.get_training_transforms(
        patch, (-0.5, 0.5), [[1.0] * dimension, [0.5] * dimension], axes, dummy_2d, use_mask_for_norm=[masks, False]
    )


CASES = [(2, False), (3, False), (3, True)]


def image(dimension: int, dummy_2d: bool = False) -> torch.Tensor:
    """Two equal channels: a body, brighter to one corner, with nothing around it. Dummy 2D crops no larger in depth."""
    shape = (16, 20, 20) if dummy_2d else (20,) * dimension
    body = torch.zeros((1, *shape))
    body[(0, *[slice(3, n - 3) for n in shape])] = 1
    ramp = sum(torch.meshgrid(*(torch.linspace(0, 1, n) for n in shape), indexing="ij"))
    return (body * (0.5 + ramp)).repeat(2, *[1] * dimension)


@pytest.mark.parametrize(("dimension", "dummy_2d"), CASES)
def test_views_differ_in_intensities_only(dimension, dummy_2d):
    views = TwoViews(transforms(dimension, dummy_2d))
    differ = 0
    for number in range(25):
        seed(number)
        strong, weak = views(image(dimension, dummy_2d))
        assert strong.shape == weak.shape == (2, *[16] * dimension)
        differ += not torch.equal(strong, weak)
        correlation = np.corrcoef(strong[0].flatten(), weak[0].flatten())[0, 1]
        assert abs(correlation) > 0.4, number  # the same geometry; gamma may invert, blur and noise may be strong
    assert differ > 10


@pytest.mark.parametrize(("dimension", "dummy_2d"), CASES)
def test_weak_view_is_what_nnunets_own_list_makes_without_intensities(dimension, dummy_2d):
    everything = transforms(dimension, dummy_2d)
    spatial = [t for t in everything.transforms if not isinstance(t, RandomTransform)]  # the others are intensities
    assert len(spatial) < len(everything.transforms)
    views = TwoViews(everything)
    picture = image(dimension, dummy_2d)
    different = 0
    for number in range(10):
        seed(number)
        expected = ComposeTransforms(spatial)(image=picture, segmentation=torch.zeros_like(picture[:1]))["image"]
        seed(number)
        _, weak = views(picture)
        torch.testing.assert_close(weak, expected, rtol=0, atol=0)
        different += not torch.equal(weak, picture[tuple(slice(n) for n in weak.shape)])
    assert different == 10


def test_masked_channels_are_zero_outside_of_the_body_in_both_views(monkeypatch):
    views = TwoViews(transforms(3, masks=True))
    shared, samples = views.shared, []
    monkeypatch.setattr(views, "shared", lambda **sample: samples.append(shared(**sample)) or samples[-1])
    for number in range(10):
        seed(number)
        strong, weak = views(image(3) + 0.01)  # as resampling leaves it outside
        sample = samples[-1]
        outside = sample["segmentation"][0] < 0
        assert outside.any()
        assert not outside.all()
        assert (sample["image"][:, outside] != 0).any()
        assert (strong[0][outside] == 0).all()
        assert (weak[0][outside] == 0).all()
        torch.testing.assert_close(weak[0][~outside], sample["image"][0][~outside])
        torch.testing.assert_close(weak[1], sample["image"][1])  # not a masked channel


def test_mask_is_the_images_own_with_holes_filled():
    picture = torch.zeros(2, 7, 7)
    picture[0, 2:5, 2:5] = 1
    picture[0, 3, 3] = 0
    mask = outside_of_body(picture)
    assert mask.shape == (1, 7, 7)
    assert mask.dtype == torch.int16
    assert set(mask.unique().tolist()) == {-1, 0}
    assert mask[0, 3, 3] == 0
    assert (mask == 0).sum() == 9


@pytest.mark.parametrize(("dimension", "dummy_2d"), CASES)
@pytest.mark.parametrize("masks", [False, True])
def test_weak_view_and_target_of_a_labelled_patch_are_what_nnunets_own_list_makes_without_intensities(
    dimension, dummy_2d, masks
):
    everything = transforms(dimension, dummy_2d, masks)
    spatial = [t for t in everything.transforms if not isinstance(t, RandomTransform)]
    views, picture = LabeledViews(everything), image(dimension, dummy_2d)
    labels = (picture[:1] > 0.8).to(torch.int16) + (picture[:1] > 1.2) - (picture[:1] == 0).to(torch.int16)
    differ = 0
    for number in range(10):
        seed(number)
        expected = ComposeTransforms(spatial)(image=picture.clone(), segmentation=labels.clone())
        seed(number)
        found = views(image=picture.clone(), segmentation=labels.clone())
        strong, weak = found["image"].chunk(2)
        torch.testing.assert_close(weak, expected["image"], rtol=0, atol=0)
        torch.testing.assert_close(found["segmentation"], expected["segmentation"], rtol=0, atol=0)
        differ += not torch.equal(strong, weak)
        assert not masks or (strong[0][weak[0] == 0] == 0).float().mean() > 0.9
    assert differ > 4
