"""Variants of the trainers that the docs report on: found with `nnUNet_extTrainer=trainers:scripts/trials`.

A variant is a line of TRIALS, which says what is different in it. What needs code of its own stands above the table.
Names take a training length, as those of all trainers: `nnUNetTrainerCopyPasteHalfBox_25epochs_200iters`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.losses import SelfRegularizedLoss
from nnunetv2_selfreg.losses.consistency import gaussian_ramp_up
from nnunetv2_selfreg.losses.terms import Weighted
from nnunetv2_selfreg.networks.features import FeatureTaps
from nnunetv2_selfreg.networks.kmax import KMaxUXNet
from nnunetv2_selfreg.networks.mask_decoder import MaskDecoderSizes, MaskPredictor
from nnunetv2_selfreg.training.copy_paste import CopyPaste, Mixtures
from nnunetv2_selfreg.training.mean_teacher import MeanTeacher
from nnunetv2_selfreg.training.optimizers import WarmUpAdamW
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class LossOfUnitFeatures(SelfRegularizedLoss):
    """The terms of feature maps that are divided by their root mean square, so that no gradient changes their scale."""

    def _scr(self, features, final, image):
        return super()._scr([_unit(feature) for feature in features], _unit(final), image)

    def _ifd(self, features):
        return super()._ifd([_unit(feature) for feature in features])


def _unit(feature: Tensor) -> Tensor:
    return feature / feature.square().mean().sqrt()


class StraightPortLoss(SelfRegularizedLoss):
    """The terms of nnUNetTrainerSelfReg computed the published way, without any savings: full maps are permuted,
    normalised and pooled.

    Own code after the description of the released program in Zhu et al., MICCAI 2024, taken from 2D to any dimension.
    """

    scr_stop_gradient = True

    def _scr(self, features, final, _image):
        final = final.detach() if self.scr_stop_gradient else final
        terms = []
        for feature in features:
            # Pooled from full resolution for each block anew, and all of its channels shuffled.
            adaptive_pool = F.adaptive_avg_pool3d if feature.ndim == 5 else F.adaptive_avg_pool2d
            pooled = adaptive_pool(final, feature.shape[2:])
            n = min(feature.shape[1], pooled.shape[1])
            shuffled = feature[:, torch.randperm(feature.shape[1])]
            terms.append(F.mse_loss(shuffled[:, :n], pooled[:, torch.randperm(pooled.shape[1])][:, :n]))
        return torch.stack(terms).mean()

    def _ifd(self, features):
        terms = []
        for feature in features:
            normalised = F.normalize(feature.flatten(2), dim=2)
            ranking = normalised.mean((0, 2)).argsort(descending=True)
            ranked = feature[:, ranking]
            top, bottom = ranked.chunk(2, dim=1)
            terms.append(F.mse_loss(bottom, top))
        return torch.stack(terms).mean()


class LossIntoFinal(StraightPortLoss):
    """The gradient of SCR flows into the last decoder stage too, as it does where a port forgets to stop it."""

    scr_stop_gradient = False


class BlockTaps(FeatureTaps):
    """Reads every convolution block of PlainConvUNet's stages, not every stage's output."""

    @staticmethod
    def blocks(network: nn.Module) -> tuple[list[nn.Module], ...]:
        return tuple(
            [module for stage in part.stages for module in stage.modules() if isinstance(module, ConvDropoutNormReLU)]
            for part in (network.encoder, network.decoder)
        )


class GrowingWeights(SelfRegularized):
    """The weights of both terms grow from almost nothing over the first 40 % of the training."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        ramp = gaussian_ramp_up(self.current_epoch / self.num_epochs, 0.4)
        self.loss.lambda_scr, self.loss.lambda_ifd = self.lambda_scr * ramp, self.lambda_ifd * ramp


class StudentSeesWeakView(MeanTeacher):
    """The student sees the teacher's view, without its noise."""

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        return super().weighted_terms(replace(batch, strong=batch.weak))


class TwiceUnlabeled(MeanTeacher):
    """Two unlabelled samples for each of the plan's batch."""

    def initialize(self) -> None:
        self.unlabeled_batch_size = 2 * self.configuration_manager.batch_size
        super().initialize()


class TeacherSeesStrongView(CopyPaste):
    """The teacher labels the view that is mixed."""

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        return super().weighted_terms(replace(batch, weak=batch.strong))


class MixturesAlone(CopyPaste):
    """The network sees no plain labelled samples."""

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        mixtures = self.mixtures(batch)
        return self.mixture_terms(self.network(mixtures.images), mixtures)


class NothingPasted(CopyPaste):
    """Labelled samples again in the place of their mixtures: the same losses and the average, but nothing pasted."""

    def mixtures(self, batch: Batch) -> Mixtures:
        mixed = super().mixtures(batch)
        pairs = self.pairs([batch.labeled, *batch.target], len(mixed.other) // 2)
        images, *target = map(torch.cat, zip(*pairs, strict=True))
        return mixed._replace(images=images, target=target)


class ThreefoldBatch(nnUNetTrainer):
    """Three times the plan's samples a step, as many as copy-paste's student sees, of which nnU-Net places the same
    share on foreground as of the plan's batch."""

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        placed = self.batch_size - round(self.batch_size * (1 - self.oversample_foreground_percent))
        self.oversample_foreground_percent = placed / self.batch_size
        self.batch_size *= 3


class QueriesWithoutActivation(KMaxUXNet):
    """Nothing follows a residual of the queries."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        for layer in self.decoder.mask_decoder.layers:
            layer.activation = nn.Identity()


class LargeMaskLogits(KMaxUXNet):
    """The scale of the mask logits starts at 1."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        for module in self.modules():
            if isinstance(module, MaskPredictor):
                nn.init.ones_(module.scale)


class LiveBranches(KMaxUXNet):
    """The queries' residual branches start at the size of what they are added to."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        for layer in self.decoder.mask_decoder.layers:
            for branch in (layer.update, layer.attention, layer.feed_forward):
                nn.init.ones_(branch[-1].weight)


class Trial:
    """A trainer that differs from another one.

    Args:
        base: the other one's name; it may be a trial too.
        title: what the docs call the trial.
        mixins: code of its own.
        attributes: those that have other values.
    """

    def __init__(self, base: str, title: str, *mixins: type, **attributes: Any) -> None:
        self.base, self.title, self.mixins, self.attributes = base, title, mixins, attributes


NARROW = {"width": 16, "deepest": 128}  # the stock network of the benchmark's CPU scale has 16 to 128 channels
SLIM = {"mask_decoder_sizes": MaskDecoderSizes(width=64, key_width=32, heads=4, feed_forward_width=256)}
SGD = nnUNetTrainer.configure_optimizers

TRIALS = {
    "nnUNetTrainerTriple": Trial("nnUNetTrainer", "stock with as many samples a step", ThreefoldBatch),
    "nnUNetTrainerAdamW": Trial("nnUNetTrainer", "stock network: AdamW, 5e-4", WarmUpAdamW),
    # docs/selfreg.md
    "nnUNetTrainerSelfRegScrOnly": Trial("nnUNetTrainerSelfReg", "SCR alone", lambda_ifd=0.0),
    "nnUNetTrainerSelfRegIfdOnly": Trial("nnUNetTrainerSelfReg", "IFD alone", lambda_scr=0.0),
    "nnUNetTrainerSelfRegTenth": Trial("nnUNetTrainerSelfReg", "both, 0.0015", lambda_scr=0.0015, lambda_ifd=0.0015),
    # the weight published for ACDC
    "nnUNetTrainerSelfRegStrong": Trial("nnUNetTrainerSelfReg", "both, 0.1", lambda_scr=0.1, lambda_ifd=0.1),
    "nnUNetTrainerSelfRegPaperIFD": Trial(
        "nnUNetTrainerSelfReg", "paper's IFD (index order, one way)", ifd_order="index", ifd_stop_gradient=True
    ),
    "nnUNetTrainerSelfRegWarm": Trial(
        "nnUNetTrainerSelfReg", "weights ramped up over 40 % of the steps", GrowingWeights
    ),
    "nnUNetTrainerSelfRegUnit": Trial(
        "nnUNetTrainerSelfReg", "every feature map divided by its root mean square", regularized_loss=LossOfUnitFeatures
    ),
    "nnUNetTrainerSelfRegAllBlocks": Trial(
        "nnUNetTrainerSelfReg", "every convolution block instead of a stage's output", feature_taps=BlockTaps
    ),
    "nnUNetTrainerSelfRegIntoFinal": Trial(
        "nnUNetTrainerSelfReg", "SCR's gradient into the last stage too", regularized_loss=LossIntoFinal
    ),
    "nnUNetTrainerSelfRegStraightPort": Trial(
        "nnUNetTrainerSelfReg", "the straight port that the cost is compared with", regularized_loss=StraightPortLoss
    ),
    # docs/unlabelled-data.md
    "nnUNetTrainerMeanTeacherWeight0": Trial(
        "nnUNetTrainerMeanTeacher", "weight 0: the average alone", consistency_weight=0.0
    ),
    "nnUNetTrainerMeanTeacherWeight1": Trial("nnUNetTrainerMeanTeacher", "weight 1", consistency_weight=1.0),
    "nnUNetTrainerMeanTeacherWeight10": Trial("nnUNetTrainerMeanTeacher", "weight 10", consistency_weight=10.0),
    "nnUNetTrainerMeanTeacherWeight100": Trial("nnUNetTrainerMeanTeacher", "weight 100", consistency_weight=100.0),
    "nnUNetTrainerMeanTeacherWeight1000": Trial("nnUNetTrainerMeanTeacher", "weight 1000", consistency_weight=1000.0),
    "nnUNetTrainerMeanTeacherNoRamp": Trial(
        "nnUNetTrainerMeanTeacherWeight10", "weight 10, no ramp", ramp_up_length=1e-9
    ),
    "nnUNetTrainerMeanTeacherLongRamp": Trial(
        "nnUNetTrainerMeanTeacherWeight100", "weight 100, ramp to the end, as published", ramp_up_length=1.0
    ),
    "nnUNetTrainerMeanTeacherOneView": Trial(
        "nnUNetTrainerMeanTeacherWeight10",
        "weight 10, the student sees the teacher's view, as published",
        StudentSeesWeakView,
    ),
    "nnUNetTrainerMeanTeacherSlow": Trial(
        "nnUNetTrainerMeanTeacherWeight100", "weight 100, decay 0.999", ema_decay=0.999
    ),
    "nnUNetTrainerMeanTeacherDouble": Trial(
        "nnUNetTrainerMeanTeacherWeight100", "weight 100, twice as many unlabelled samples", TwiceUnlabeled
    ),
    # docs/copy-paste.md
    "nnUNetTrainerCopyPasteSmallBox": Trial("nnUNetTrainerCopyPaste", "box of a third of each side", box_ratio=1 / 3),
    "nnUNetTrainerCopyPasteHalfBox": Trial("nnUNetTrainerCopyPaste", "box of half of each side", box_ratio=1 / 2),
    "nnUNetTrainerCopyPasteLargeBox": Trial(
        "nnUNetTrainerCopyPaste", "box of five sixths of each side", box_ratio=5 / 6
    ),
    "nnUNetTrainerCopyPasteUnlabeled0": Trial(
        "nnUNetTrainerCopyPaste", "unlabelled part without weight", unlabeled_weight=0.0
    ),
    "nnUNetTrainerCopyPasteUnlabeled1": Trial(
        "nnUNetTrainerCopyPaste", "unlabelled part with weight 1", unlabeled_weight=1.0
    ),
    "nnUNetTrainerCopyPasteMixture1": Trial("nnUNetTrainerCopyPaste", "mixtures with weight 1", mixture_weight=1.0),
    "nnUNetTrainerCopyPasteMixturesOnly": Trial(
        "nnUNetTrainerCopyPaste",
        "mixtures alone, with weight 1: two thirds of the samples a step",
        MixturesAlone,
        mixture_weight=1.0,
    ),
    "nnUNetTrainerCopyPasteNoWarmUp": Trial("nnUNetTrainerCopyPaste", "no warm-up", mixture_warm_up=0.0),
    # the ramp takes as long as by default
    "nnUNetTrainerCopyPasteLongWarmUp": Trial(
        "nnUNetTrainerCopyPaste", "warm-up of 40 %, ramp until 70 %", mixture_warm_up=0.4, ramp_up_length=0.7
    ),
    "nnUNetTrainerCopyPasteLabeledOnly": Trial(
        "nnUNetTrainerCopyPaste", "warm-up to the end: labelled samples alone", mixture_warm_up=1.0
    ),
    "nnUNetTrainerCopyPasteUnmixed": Trial(
        "nnUNetTrainerCopyPaste",
        "labelled samples alone, repeated instead of mixed",
        NothingPasted,
        mixture_warm_up=1.0,
    ),
    "nnUNetTrainerCopyPasteNoRamp": Trial("nnUNetTrainerCopyPaste", "no ramp, as published", ramp_up_length=1e-6),
    "nnUNetTrainerCopyPasteNoTeacher": Trial(
        "nnUNetTrainerCopyPaste", "no teacher: the network labels, and predicts", ema_decay=0.0
    ),
    "nnUNetTrainerCopyPasteLargest": Trial(
        "nnUNetTrainerCopyPaste", "largest component, as published", largest_component=True
    ),
    "nnUNetTrainerCopyPasteOneView": Trial(
        "nnUNetTrainerCopyPaste", "the teacher reads the strong view, as published", TeacherSeesStrongView
    ),
    # docs/self-training.md
    "nnUNetTrainerSelfTrainingPerfect": Trial(
        "nnUNetTrainerSelfTraining", "a perfect teacher: the real labels", pseudo_label_set="perfect"
    ),
    "nnUNetTrainerSelfTrainingMixtures": Trial(
        "nnUNetTrainerSelfTraining", "self-training, the teacher labelled mixtures", pseudo_label_set="mixtures"
    ),
    "nnUNetTrainerSelfTrainingSecond": Trial(
        "nnUNetTrainerSelfTraining", "second round: the student's labels", pseudo_label_set="second"
    ),
    "nnUNetTrainerSelfTrainingHalf": Trial("nnUNetTrainerSelfTraining", "weight 0.5", pseudo_weight=0.5),
    "nnUNetTrainerSelfTrainingFromTeacher": Trial(
        "nnUNetTrainerSelfTraining", "starts with the teacher's weights", start_from_teacher=True
    ),
    # docs/networks.md
    "nnUNetTrainerUXNetNarrow": Trial("nnUNetTrainerUXNet", "UX-Net: AdamW, 5e-4 (the default)", **NARROW),
    "nnUNetTrainerUXNetNarrowFast": Trial("nnUNetTrainerUXNetNarrow", "UX-Net: AdamW, 2e-3", learning_rate=2e-3),
    "nnUNetTrainerUXNetNarrowSlow": Trial(
        "nnUNetTrainerUXNetNarrow", "UX-Net: AdamW, 1e-4, as published", learning_rate=1e-4
    ),
    "nnUNetTrainerUXNetNarrowSGD": Trial(
        "nnUNetTrainerUXNetNarrow", "UX-Net: nnU-Net's SGD, 1e-2", configure_optimizers=SGD
    ),
    "nnUNetTrainerSelfRegUXNetNarrow": Trial("nnUNetTrainerSelfRegUXNet", "UX-Net with SelfReg", **NARROW),
    "nnUNetTrainerKMaxUXNetNarrow": Trial(
        "nnUNetTrainerKMaxUXNet", "k-means UX-Net: AdamW, 5e-4 (the default)", **NARROW
    ),
    "nnUNetTrainerKMaxUXNetSlim": Trial("nnUNetTrainerKMaxUXNetNarrow", "k-means UX-Net, slim: the default", **SLIM),
    "nnUNetTrainerKMaxUXNetSlimFast": Trial("nnUNetTrainerKMaxUXNetSlim", "AdamW, 2e-3", learning_rate=2e-3),
    "nnUNetTrainerKMaxUXNetSlimWeight1": Trial("nnUNetTrainerKMaxUXNetSlim", "query weight 1", query_weight=1.0),
    "nnUNetTrainerKMaxUXNetSlimWeight0": Trial("nnUNetTrainerKMaxUXNetSlim", "query weight 0", query_weight=0.0),
    "nnUNetTrainerKMaxUXNetSlimScale1": Trial(
        "nnUNetTrainerKMaxUXNetSlim", "mask logits start ten times as large", network_class=LargeMaskLogits
    ),
    "nnUNetTrainerKMaxUXNetSlimNoActivation": Trial(
        "nnUNetTrainerKMaxUXNetSlim", "no activation after residuals", network_class=QueriesWithoutActivation
    ),
    "nnUNetTrainerKMaxUXNetSlimLiveBranches": Trial(
        "nnUNetTrainerKMaxUXNetSlim", "residual branches do not start at 0", network_class=LiveBranches
    ),
    "nnUNetTrainerDualKMaxUXNetSlim": Trial(
        "nnUNetTrainerDualKMaxUXNet", "Dual KMax UX-Net, slim: both consistencies, the default", **NARROW, **SLIM
    ),
    "nnUNetTrainerDualKMaxUXNetSlimNone": Trial(
        "nnUNetTrainerDualKMaxUXNetSlim",
        "two views, no consistency",
        segmentation_consistency_weight=0.0,
        query_consistency_weight=0.0,
    ),
    "nnUNetTrainerDualKMaxUXNetSlimSegmentation": Trial(
        "nnUNetTrainerDualKMaxUXNetSlim", "consistency of segmentations alone", query_consistency_weight=0.0
    ),
    "nnUNetTrainerDualKMaxUXNetSlimQueries": Trial(
        "nnUNetTrainerDualKMaxUXNetSlim", "consistency of queries alone", segmentation_consistency_weight=0.0
    ),
    "nnUNetTrainerDualKMaxUXNetSlimSquared": Trial(
        "nnUNetTrainerDualKMaxUXNetSlim", "squared consistencies", consistency="squared"
    ),
    "nnUNetTrainerDualKMaxUXNetSlimTwo": Trial("nnUNetTrainerDualKMaxUXNetSlim", "two networks", shared_weights=False),
    "nnUNetTrainerMeanTeacherUXNetNarrow": Trial(
        "nnUNetTrainerUXNetNarrow", "UX-Net under the mean teacher", MeanTeacher
    ),
    "nnUNetTrainerCopyPasteUXNetNarrow": Trial("nnUNetTrainerUXNetNarrow", "UX-Net under copy-paste", CopyPaste),
    "nnUNetTrainerKMaxUXNetNarrowSGD": Trial(
        "nnUNetTrainerKMaxUXNetNarrow", "k-means UX-Net: nnU-Net's SGD, 1e-2", configure_optimizers=SGD
    ),
    "nnUNetTrainerSwinUNETRNarrow": Trial(
        "nnUNetTrainerSwinUNETR", "SwinUNETR: AdamW, 5e-4 (the default)", feature_size=12
    ),
    "nnUNetTrainerSwinUNETRNarrowSGD": Trial(
        "nnUNetTrainerSwinUNETRNarrow", "SwinUNETR: nnU-Net's SGD, 1e-2", configure_optimizers=SGD
    ),
    "nnUNetTrainerSelfRegSwinUNETRNarrow": Trial(
        "nnUNetTrainerSelfRegSwinUNETR", "SwinUNETR with SelfReg", feature_size=12
    ),
}


def __getattr__(name: str) -> type[nnUNetTrainer]:
    """The trainer of a trial, of whose name nnU-Net asks each module in its folders."""
    if name not in TRIALS:
        raise AttributeError(f"{name} is not in the table of trials")
    trial = TRIALS[name]
    bases = *trial.mixins, recursive_find_trainer_class_by_name(trial.base)
    globals()[name] = trainer = type(name, bases, {"__doc__": trial.title, **trial.attributes})  # nnU-Net asks twice
    return trainer
