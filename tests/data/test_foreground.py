"""Foreground masks of nnU-Net's targets, and labels that should not be there."""

import torch

from nnunetv2_selfreg.data.foreground import Foreground


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


def test_labels_that_the_data_set_does_not_have_are_found_by_sample():
    target = torch.tensor([2, 3, 4, -1]).reshape(4, 1, 1, 1) * torch.tensor([0, 1])
    plain, ignoring = (Foreground(2, regions=False, ignore_label=label) for label in (None, 3))
    assert plain.unknown_labels(target) == {1: 3, 2: 4, 3: -1}
    assert ignoring.unknown_labels(target) == {2: 4, 3: -1}
    assert Foreground(2, regions=True, ignore_label=None).unknown_labels(target) == {}
    assert plain.unknown_labels(target[:2].clamp_max(2)) == plain.unknown_labels(target[:0]) == {}
