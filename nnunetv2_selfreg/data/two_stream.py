"""Batches of two streams: labelled samples as nnU-Net loads them, with signed distances where a trainer learns them,
then unlabelled ones in a strong and a weak view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from scipy.ndimage import binary_fill_holes
from threadpoolctl import threadpool_limits
from torch import Tensor

from nnunetv2_selfreg.data.foreground import Foreground, at_full_resolution
from nnunetv2_selfreg.data.signed_distance import signed_distance_map
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool

# Resampling rings where the image was cut out of nothing; real intensities are of the order of 1. On a resampled
# ellipsoid this keeps 4 % of the outside, next to the body, and loses less than 1 % of the body at its rim. Images of
# preprocess_unlabeled are exactly zero outside.
NOTHING = 0.05


class TwoViews:
    """A strong and a weak view of a patch: one geometry, and intensity augmentation for the strong one only.

    Made from nnU-Net's own training transforms. Each of them is spatial (shared, mirroring included), about the image's
    intensities (strong view), about the segmentation (left out), or nnU-Net's masking of what lies outside the body
    (last, on both views). The mask is the image's own: where a masked channel is not zero, holes filled.
    """

    def __init__(self, transforms: ComposeTransforms) -> None:
        parts = {kind: [t for t in transforms.transforms if _kind(t) is kind] for kind in (None, *_KINDS)}
        self.shared = ComposeTransforms(parts[None])
        self.intensity = ComposeTransforms(parts[ImageOnlyTransform])
        self.masking = ComposeTransforms(parts[MaskImageTransform])
        self.masked_channels = sorted({c for t in parts[MaskImageTransform] for c in t.apply_to_channels})

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Strong and weak view of `image` `(C, *spatial)`."""
        sample = {"image": image}
        if self.masked_channels:
            sample["segmentation"] = outside_of_body(image[self.masked_channels])
        sample = self.shared(**sample)
        strong = self.intensity(image=sample["image"].clone())["image"]
        return self._mask(strong, sample), self._mask(sample["image"], sample)

    def _mask(self, image: Tensor, sample: dict) -> Tensor:
        return self.masking(**{**sample, "image": image})["image"]


def outside_of_body(image: Tensor) -> Tensor:
    """-1 where all channels of `image` `(C, *spatial)` are about 0, 0 elsewhere and in holes: `(1, *spatial)`, int16.

    This is nnU-Net's nonzero mask as far as an image tells it: listed cases have theirs in the segmentation file, which
    is not opened.
    """
    body = binary_fill_holes((image.abs() > NOTHING).any(0).numpy())
    return torch.from_numpy(body.astype(np.int16) - 1)[None]


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

    def __init__(self, labeled: nnUNetDataLoader | WithSignedDistances, unlabeled: UnlabeledLoader) -> None:
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


class WithSignedDistances:
    """nnU-Net's labelled stream, whose batches have `distance` too: `(L, K, *patch)`, float32, the signed distance map
    of each foreground class or region.

    Made here, that is in the worker processes and after augmentation, of the target at full resolution. So it is the
    distance within the patch, and a voxel counts as large as the configuration says, however it was scaled.
    """

    def __init__(self, loader: nnUNetDataLoader, foreground: Foreground, spacing: Sequence[float]) -> None:
        """`loader` yields nnU-Net's batches; `spacing` is the configuration's, in mm."""
        self.loader = loader
        self.foreground = foreground
        self.spacing = tuple(spacing)

    def set_thread_id(self, thread_id: int) -> None:
        self.loader.set_thread_id(thread_id)

    def __iter__(self) -> WithSignedDistances:
        return self

    def __next__(self) -> dict:
        batch = next(self.loader)
        masks = self.foreground.masks(at_full_resolution(batch["target"])).numpy()
        distance = np.empty(masks.shape, np.float32)
        for index in np.ndindex(masks.shape[:2]):
            distance[index] = signed_distance_map(masks[index], self.spacing)
        return {**batch, "distance": torch.from_numpy(distance)}


class _NoLabels:
    """What nnU-Net's loader asks of a label manager, for cases without labels: crops are uniform."""

    all_labels: list[int] = []  # noqa: RUF012 (nobody changes it)
    has_ignore_label = False


_KINDS = (ImageOnlyTransform, SegOnlyTransform, MaskImageTransform)


def _kind(transform: BasicTransform) -> type | None:
    """One of _KINDS, or None for a transform that moves image and segmentation alike."""
    if isinstance(transform, RandomTransform):
        return _kind(transform.transform)
    if isinstance(transform, (OneOfTransform, ComposeTransforms)):
        inner = getattr(transform, "list_of_transforms", None) or transform.transforms
        kinds = {_kind(t) for t in inner}
        if len(kinds) != 1:
            raise NotImplementedError(
                f"{transform} mixes intensities and geometry, so it cannot be split into two views"
            )
        return kinds.pop()
    if isinstance(transform, MoveSegAsOneHotToDataTransform):
        return SegOnlyTransform
    return next((kind for kind in _KINDS if isinstance(transform, kind)), None)
