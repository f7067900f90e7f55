"""Self-training: a student learns from labelled cases, and from whole volumes that a teacher has labelled before."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.data.loaders import PseudoLabeledLoader
from nnunetv2_selfreg.data.pseudo_labels import folder_of, read_pseudo_labels
from nnunetv2_selfreg.data.unlabeled import recipe
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import sha256
from nnunetv2_selfreg.losses.terms import Weighted
from nnunetv2_selfreg.networks.features import unwrap
from nnunetv2_selfreg.tensors import as_list
from nnunetv2_selfreg.training.copy_paste import CopyPaste
from nnunetv2_selfreg.training.semi_supervised import SemiSupervised


class PseudoLabeled(SemiSupervised):
    """The unlabelled samples have labels, which `nnUNetv2_selfreg pseudo_label` has made of whole volumes.

    They are taken and augmented as nnU-Net does with labelled ones, foreground oversampling included. A batch has their
    targets at every scale, `further["pseudo_target"]`, beside their images, `strong`. There are no weak views.
    """

    pseudo_label_set: str = ""
    """`--name` of the set of pseudo-labels; empty: the one without a name."""
    start_from_teacher: bool = False
    """Whether the student starts with its teacher's weights; if there are several, with the first one's."""

    _learned_from: list[str] = []  # noqa: RUF012 (nobody changes it): hashes of the teachers

    def unlabeled_stream(self, samples: int, like: nnUNetDataLoader) -> nnUNetDataLoader:
        pool = self.unlabeled_pool()
        folder, labels = self.pseudo_labels_folder, self.dataset_json["labels"]
        current = recipe(self.plans_manager, self.configuration_manager)
        description, cases = read_pseudo_labels(folder, pool, self.label_manager, labels, current)
        if self._learned_from not in ([], description.made_by):
            raise UserError(
                f"This training has learned from other labels than those that are in {folder} now, of "
                f"{description.teachers_named}. Begin a new one, without --c."
            )
        self._learned_from = description.made_by
        self.print_to_log_file(
            f"{len(cases.identifiers)} of {len(pool.identifiers)} unlabelled cases with labels of "
            f"{description.teachers_named}, from {folder}, {samples} samples of them a step"
        )
        if self.start_from_teacher and self.current_epoch == 0:  # a resumed training has its own weights
            self._start_from(description.teachers[0])
        return PseudoLabeledLoader(cases, samples, self.label_manager, like)

    @property
    def pseudo_labels_folder(self) -> Path:
        """Where the fold's pseudo-labels are."""
        return folder_of(Path(self.preprocessed_dataset_folder), self.fold, self.pseudo_label_set)

    def _start_from(self, teacher: dict) -> None:
        """Loads the weights of the checkpoint that labelled.

        Raises:
            UserError: it is gone, another one by now, or of another network.
        """
        file, remedy = Path(teacher["checkpoint"]), "With start_from_teacher = False the student begins anew."
        if not file.is_file() or sha256(file) != teacher["sha256"]:
            raise UserError(f"{file}, the teacher of these pseudo-labels, is gone or was trained again. {remedy}")
        weights = torch.load(file, map_location=self.device, weights_only=False)["network_weights"]
        try:
            unwrap(self.network).load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{file} has another network than {type(self).__name__}. {remedy}") from error

    def extra_state(self) -> dict:
        return {**super().extra_state(), "pseudo_labels_of": self._learned_from}

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        self._learned_from = state["pseudo_labels_of"]


class SelfTraining(PseudoLabeled):
    """A student of pseudo-labels (Lee, ICML workshop 2013; Xie et al., CVPR 2020), in nnU-Net's own training.

        L = L_seg(labelled) + ramp(t) w L_seg(pseudo-labelled)

    `L_seg` is nnU-Net's loss with deep supervision. The student begins anew, as published for noisy students; its noise
    is nnU-Net's augmentation. Our decisions: as many pseudo-labelled samples as labelled ones on top of these,
    `w = 1`, and a short ramp, since the labels are a trained model's from the start.
    """

    pseudo_weight: float = 1.0
    """`w`, the weight of the pseudo-labelled samples' loss."""
    ramp_up_length = 0.1

    def initialize(self) -> None:
        self._require("pseudo_weight", 0 <= self.pseudo_weight < math.inf, "finite and 0 at least")
        super().initialize()

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        labeled, pseudo = batch.cut(self.network(batch.images))
        weight = self.pseudo_weight * self.ramp
        self.terms["pseudo_weight"] = weight
        return {
            "segmentation": (1.0, self.supervised_loss(labeled, batch.target)),
            "pseudo_segmentation": (weight, self.apply_loss(self.segmentation_loss, pseudo, pseudo_target(batch))),
        }


class PseudoLabeledCopyPaste(PseudoLabeled, CopyPaste):
    """Bidirectional copy-paste whose unlabelled parts have pseudo-labels of whole volumes, not the average's."""

    def labels_of_unlabeled(self, batch: Batch) -> list[Tensor]:
        return pseudo_target(batch)


def pseudo_target(batch: Batch) -> list[Tensor]:
    """The targets of a batch's unlabelled samples at every scale."""
    return list(as_list(batch.further["pseudo_target"]))
