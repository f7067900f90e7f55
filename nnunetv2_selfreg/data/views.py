"""A strong and a weak view of a patch, made from nnU-Net's own training transforms."""

from __future__ import annotations

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from nnunetv2_selfreg.errors import UnsupportedError

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
        return self._views(self.shared(**sample))

    def _views(self, sample: dict) -> tuple[Tensor, Tensor]:
        """Of a sample in its geometry."""
        strong = self.intensity(image=sample["image"].clone())["image"]
        return self._mask(strong, sample), self._mask(sample["image"], sample)

    def _mask(self, image: Tensor, sample: dict) -> Tensor:
        return self.masking(**{**sample, "image": image})["image"]


class LabeledViews(TwoViews):
    """The two views of a labelled patch, in the place of nnU-Net's transforms.

    nnU-Net's loader expects one image of them: the strong view's channels, then the weak view's. The segmentation is
    transformed as nnU-Net does it, and masks the body. Not for cascades, in which it becomes channels of the image.
    """

    def __init__(self, transforms: ComposeTransforms) -> None:
        super().__init__(transforms)
        self.segmentation = ComposeTransforms([t for t in transforms.transforms if _kind(t) is SegOnlyTransform])

    def __call__(self, image: Tensor, segmentation: Tensor) -> dict:
        """`image` `(2 C, *spatial)` and `segmentation`, at all scales, of an image `(C, *spatial)`."""
        sample = self.shared(image=image, segmentation=segmentation)
        views = torch.cat(self._views(sample))
        return {"image": views, **self.segmentation(segmentation=sample["segmentation"])}


def outside_of_body(image: Tensor) -> Tensor:
    """-1 where all channels of `image` `(C, *spatial)` are about 0, 0 elsewhere and in holes: `(1, *spatial)`, int16.

    This is nnU-Net's nonzero mask as far as an image tells it: listed cases have theirs in the segmentation file, which
    is not opened.
    """
    body = binary_fill_holes((image.abs() > NOTHING).any(0).numpy())
    return torch.from_numpy(body.astype(np.int16) - 1)[None]


_KINDS = (ImageOnlyTransform, SegOnlyTransform, MaskImageTransform)


def _kind(transform: BasicTransform) -> type | None:
    """One of _KINDS, or None for a transform that moves image and segmentation alike."""
    if isinstance(transform, RandomTransform):
        return _kind(transform.transform)
    if isinstance(transform, (OneOfTransform, ComposeTransforms)):
        inner = getattr(transform, "list_of_transforms", None) or transform.transforms
        kinds = {_kind(t) for t in inner}
        if len(kinds) != 1:
            raise UnsupportedError(f"{transform} mixes intensities and geometry, so it cannot be split into two views")
        return kinds.pop()
    if isinstance(transform, MoveSegAsOneHotToDataTransform):
        return SegOnlyTransform
    return next((kind for kind in _KINDS if isinstance(transform, kind)), None)
