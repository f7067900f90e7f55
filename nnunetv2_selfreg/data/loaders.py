"""The two streams of a semi-supervised training: labelled samples as a trainer learns them, then unlabelled ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits
from torch import Tensor

from nnunetv2_selfreg.data.pseudo_labels import PseudoLabeledCases
from nnunetv2_selfreg.data.targets import LabeledStream
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool
from nnunetv2_selfreg.data.views import TwoViews


class UnlabeledLoader(nnUNetDataLoader):
    """Patches from anywhere in the images of a pool, each in two views: `{"data", "data_weak", "keys"}`."""

    def __init__(self, pool: UnlabeledPool, batch_size: int, like: nnUNetDataLoader) -> None:
        """`like` is the labelled stream's loader: the same patch sizes, and views made of its transforms."""
        super().__init__(pool, batch_size, *patch_sizes(like), _NoLabels())
        self.views = TwoViews(like.transforms)

    def generate_train_batch(self) -> dict:
        keys = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            pairs = [self.views(self._crop(self._data.load_image(key))) for key in keys]
        strong, weak = (torch.stack(views) for views in zip(*pairs, strict=True))
        return {"data": strong, "data_weak": weak, "keys": keys}

    def _crop(self, image) -> Tensor:
        lower, upper = self.get_bbox(image.shape[1:], False, None)
        box = [[low, high] for low, high in zip(lower, upper, strict=True)]
        patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        return patch[:, 0] if self.patch_size_was_2d else patch


class PseudoLabeledLoader(nnUNetDataLoader):
    """Patches of images with pseudo-labels, taken and transformed as nnU-Net does with labelled ones: `{"data",
    "pseudo_target", "keys"}`, the target at every scale."""

    def __init__(
        self,
        cases: PseudoLabeledCases,
        batch_size: int,
        manager: LabelManager,
        like: nnUNetDataLoader,
        foreground_share: float,
    ) -> None:
        """`like` is the labelled stream's loader: the same patch sizes and transforms. A sample is placed on foreground
        with the probability `foreground_share`: nnU-Net's usual rule, so many of each batch, would place none of a
        single one."""
        super().__init__(
            cases,
            batch_size,
            *patch_sizes(like),
            manager,
            foreground_share,
            probabilistic_oversampling=True,
            transforms=like.transforms,
        )

    def generate_train_batch(self) -> dict:
        batch = super().generate_train_batch()
        return {"data": batch["data"], "pseudo_target": batch["target"], "keys": batch["keys"]}


def patch_sizes(loader: nnUNetDataLoader) -> tuple[Sequence[int], Sequence[int]]:
    """What a loader crops, and what of it the network gets, as its constructor takes them."""
    first = 1 if loader.patch_size_was_2d else 0
    return loader.patch_size[first:], loader.final_patch_size[first:]


class TwoStreamLoader:
    """Joins the two streams into nnU-Net's batch.

    `data`: labelled samples, then those of the other stream, `(L + U, C, *patch)`, which are the strong views of
    unlabelled ones; `target`: of the labelled samples alone, as nnU-Net makes it; `keys`: of all samples. What else a
    stream has stays as it is: `data_weak`, the weak views, `(U, C, *patch)`; `pseudo_target`.
    """

    def __init__(self, labeled: nnUNetDataLoader | LabeledStream, unlabeled: nnUNetDataLoader) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled

    def set_thread_id(self, thread_id: int) -> None:
        self.labeled.set_thread_id(thread_id)
        self.unlabeled.set_thread_id(thread_id)

    def __iter__(self) -> TwoStreamLoader:
        return self

    def __next__(self) -> dict:
        labeled, unlabeled = next(self.labeled), next(self.unlabeled)
        return {
            **unlabeled,
            **labeled,
            "data": torch.cat((labeled["data"], unlabeled["data"])),
            "keys": np.concatenate((labeled["keys"], unlabeled["keys"])),
        }


class _NoLabels:
    """What nnU-Net's loader asks of a label manager, for cases without labels: crops are uniform."""

    all_labels: list[int] = []  # noqa: RUF012 (nobody changes it)
    has_ignore_label = False
