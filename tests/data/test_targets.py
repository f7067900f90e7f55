"""Signed distances beside the targets of the labelled stream."""

import pickle

import numpy as np
import pytest
import torch

from nnunetv2_selfreg.data import signed_distance_map
from nnunetv2_selfreg.data.foreground import Foreground
from nnunetv2_selfreg.data.targets import WithSignedDistances


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
            expected = signed_distance_map(mask, spacing)
            np.testing.assert_array_equal(batch["distance"][sample, label - 1], expected)
