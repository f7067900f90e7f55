"""What labelled samples have beside nnU-Net's image and target, made in the worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_selfreg.data.foreground import Foreground
from nnunetv2_selfreg.data.signed_distance import signed_distance_map
from nnunetv2_selfreg.data.views import LabeledViews
from nnunetv2_selfreg.tensors import at_full_resolution


class LabeledStream:
    """nnU-Net's labelled stream, whose batches a family extends."""

    def __init__(self, loader: nnUNetDataLoader | LabeledStream) -> None:
        self.loader = loader

    def set_thread_id(self, thread_id: int) -> None:
        self.loader.set_thread_id(thread_id)

    def __iter__(self) -> LabeledStream:
        return self

    def __next__(self) -> dict:
        raise NotImplementedError


class WithWeakView(LabeledStream):
    """nnU-Net's labelled stream, whose batches have `labeled_weak` too: the same patches, `(L, C, *patch)`, in the same
    place, with intensities as they are."""

    def __init__(self, loader: nnUNetDataLoader) -> None:
        super().__init__(copy(loader))  # others make their views of the transforms of this one
        self.loader.transforms = LabeledViews(loader.transforms)

    def __next__(self) -> dict:
        batch = next(self.loader)
        strong, weak = (view.contiguous() for view in batch["data"].chunk(2, 1))  # each alone goes to the other process
        return {**batch, "data": strong, "labeled_weak": weak}


class WithSignedDistances(LabeledStream):
    """nnU-Net's labelled stream, whose batches have `distance` too: `(L, K, *patch)`, float32, the signed distance map
    of each foreground class or region.

    Made here, that is in the worker processes and after augmentation, of the target at full resolution. So it is the
    distance within the patch, and a voxel counts as large as the configuration says, however it was scaled.
    """

    def __init__(self, loader: nnUNetDataLoader, foreground: Foreground, spacing: Sequence[float]) -> None:
        """`loader` yields nnU-Net's batches; `spacing` is the configuration's, in mm."""
        super().__init__(loader)
        self.foreground = foreground
        self.spacing = tuple(spacing)

    def __next__(self) -> dict:
        batch = next(self.loader)
        masks = self.foreground.masks(at_full_resolution(batch["target"])).numpy()
        distance = np.empty(masks.shape, np.float32)
        for index in np.ndindex(masks.shape[:2]):
            distance[index] = signed_distance_map(masks[index], self.spacing)
        return {**batch, "distance": torch.from_numpy(distance)}
