"""The one place that knows where labelled samples end."""

from collections import namedtuple

import pytest
import torch

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.tensors import at_full_resolution

Output = namedtuple("Output", "segmentation scales")


def numbered(count: int, first: int = 0) -> torch.Tensor:
    """Images whose voxels are the number of their sample."""
    return torch.arange(first, first + count).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).float()


def loaded(labeled: int, unlabeled: int) -> dict:
    target = [numbered(labeled), numbered(labeled)[..., :1, :1]]
    batch = {"data": numbered(labeled + unlabeled), "target": target, "keys": ["a"], "distance": numbered(labeled)}
    return {**batch, "data_weak": numbered(unlabeled, 10)} if unlabeled else batch


def test_parts_of_a_batch():
    batch = Batch.split(loaded(2, 3))
    assert batch.labeled[:, 0, 0, 0].tolist() == [0, 1]
    assert batch.strong[:, 0, 0, 0].tolist() == [2, 3, 4]
    assert batch.weak[:, 0, 0, 0].tolist() == [10, 11, 12]
    assert [len(scale) for scale in batch.target] == [2, 2]
    assert batch.further["distance"].shape == (2, 1, 2, 2)
    assert torch.equal(batch.images, numbered(5))


def test_target_without_deep_supervision_is_a_list_of_one():
    whole = loaded(2, 3)
    batch = Batch.split({**whole, "target": whole["target"][0]})
    assert [scale.shape for scale in batch.target] == [(2, 1, 2, 2)]
    assert len(batch.labeled) == 2


def test_without_unlabelled_samples_both_views_are_empty():
    batch = Batch.split(loaded(2, 0))
    assert batch.strong.shape == batch.weak.shape == (0, 1, 2, 2)
    assert torch.equal(batch.images, batch.labeled)


def test_outputs_of_any_structure_are_cut_where_the_labelled_samples_end():
    batch = Batch.split(loaded(2, 3))
    output = Output(numbered(5), [numbered(5), (numbered(5),)])
    labeled, others = batch.cut(output)
    for part, expected in ((labeled, numbered(2)), (others, numbered(3, 2))):
        assert isinstance(part, Output)
        assert isinstance(part.scales, list)
        for tensor in (part.segmentation, part.scales[0], part.scales[1][0], at_full_resolution(part)):
            assert torch.equal(tensor, expected)


def test_output_that_cannot_be_cut_is_an_error():
    """Rather than labelled and unlabelled samples that are mixed up."""
    with pytest.raises(TypeError, match="a network's output has a Batch"):
        Batch.split(loaded(2, 3)).cut([numbered(5), Batch.split(loaded(1, 1))])
