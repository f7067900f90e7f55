"""The two streams of a semi-supervised training: labelled samples as a trainer learns them, then unlabelled ones."""

from __future__ import annotations

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import threadpool_limits
from torch import Tensor

from nnunetv2_selfreg.data.targets import LabeledStream
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool
from nnunetv2_selfreg.data.views import TwoViews


class UnlabeledLoader(nnUNetDataLoader):
    """Patches from anywhere in the images of a pool, each in two views: `{"strong", "weak", "keys"}`."""

    def __init__(self, pool: UnlabeledPool, batch_size: int, like: nnUNetDataLoader) -> None:
        """`like` is the labelled stream's loader: the same patch sizes, and views made of its transforms."""
        crop = like.patch_size[1:] if like.patch_size_was_2d else like.patch_size
        patch = like.final_patch_size[1:] if like.patch_size_was_2d else like.final_patch_size
        super().__init__(pool, batch_size, crop, patch, _NoLabels())
        self.views = TwoViews(like.transforms)

    def generate_train_batch(self) -> dict:
        keys = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            pairs = [self.views(self._crop(self._data.load_image(key))) for key in keys]
        strong, weak = (torch.stack(views) for views in zip(*pairs, strict=True))
        return {"strong": strong, "weak": weak, "keys": keys}

    def _crop(self, image) -> Tensor:
        lower, upper = self.get_bbox(image.shape[1:], False, None)
        box = [[low, high] for low, high in zip(lower, upper, strict=True)]
        patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        return patch[:, 0] if self.patch_size_was_2d else patch


class TwoStreamLoader:
    """Joins the two streams into nnU-Net's batch.

    `data`: labelled samples, then strong views, `(L + U, C, *patch)`; `data_weak`: the weak views, `(U, C, *patch)`;
    `target`: of the labelled samples alone, as nnU-Net makes it; `keys`: of all samples.
    """

    def __init__(self, labeled: nnUNetDataLoader | LabeledStream, unlabeled: UnlabeledLoader) -> None:
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
            **labeled,
            "data": torch.cat((labeled["data"], unlabeled["strong"])),
            "data_weak": unlabeled["weak"],
            "keys": np.concatenate((labeled["keys"], unlabeled["keys"])),
        }


class _NoLabels:
    """What nnU-Net's loader asks of a label manager, for cases without labels: crops are uniform."""

    all_labels: list[int] = []  # noqa: RUF012 (nobody changes it)
    has_ignore_label = False
