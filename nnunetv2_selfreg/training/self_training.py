"""Self-training: a student learns from labelled cases, and from whole volumes that a teacher has labelled before."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor
from torch import distributed as dist

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.data.loaders import PseudoLabeledLoader
from nnunetv2_selfreg.data.pseudo_labels import Description, PseudoLabeledCases, folder_of, read_pseudo_labels
from nnunetv2_selfreg.data.unlabeled import recipe
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import sha256
from nnunetv2_selfreg.losses.terms import Weighted
from nnunetv2_selfreg.networks.features import unwrap
from nnunetv2_selfreg.tensors import as_list
from nnunetv2_selfreg.training.copy_paste import CopyPaste
from nnunetv2_selfreg.training.semi_supervised import SemiSupervised

LAST_ROUND = "checkpoint_last_round.pth"


class PseudoLabeled(SemiSupervised):
    """The unlabelled samples have labels, which `nnUNetv2_selfreg pseudo_label` has made of whole volumes.

    They are taken and augmented as nnU-Net does with labelled ones; as large a share of them is placed on foreground,
    by chance. A batch has their targets at every scale, `further["pseudo_target"]`, beside their images, `strong`.
    There are no weak views. A checkpoint knows the teachers, the cases, and whose labels the teachers saw.
    """

    pseudo_label_set: str = ""
    """`--name` of the set of pseudo-labels; empty: the one without a name."""
    start_from_teacher: bool = False
    """Whether the student starts with its teacher's weights; if there are several, with the first one's."""

    _needs_unlabeled = True
    _dice_of_unlabeled = True
    _learned_from: dict[str, list[str]] = MappingProxyType({"teachers": [], "cases": [], "seen": []})

    def _set_batch_size_and_oversample(self) -> None:
        share, batch_size = self.oversample_foreground_percent, self.configuration_manager.batch_size
        placed = batch_size - round(batch_size * (1 - share))  # as nnU-Net rounds it, of all processes' samples
        self._foreground_share = share if self.probabilistic_oversampling else placed / batch_size
        super()._set_batch_size_and_oversample()

    def unlabeled_stream(self, samples: int, like: nnUNetDataLoader) -> nnUNetDataLoader:
        description, cases = self._read_pseudo_labels()
        self._refuse_other_teachers(description)
        self._learned_from = {"teachers": description.made_by, "cases": cases.identifiers, "seen": description.seen}
        self.print_to_log_file(
            f"{len(cases.identifiers)} unlabelled cases with labels of {description.teachers_named}, from "
            f"{self.pseudo_labels_folder}, {samples} samples of them a step; {len(description.dropped)} are left out"
        )
        return PseudoLabeledLoader(cases, samples, self.label_manager, like, self._foreground_share)

    def _read_pseudo_labels(self) -> tuple[Description, PseudoLabeledCases]:
        pool, folder, labels = self.unlabeled_pool(), self.pseudo_labels_folder, self.dataset_json["labels"]
        current = recipe(self.plans_manager, self.configuration_manager)
        val = [] if self.fold == "all" else self.do_split()[1]
        return read_pseudo_labels(folder, pool, self.label_manager, labels, current, self.fold, val)

    def _refuse_other_teachers(self, description: Description) -> None:
        """A resumed training goes on with the labels that it began with; other cases of these are told."""
        before = self._learned_from
        if before["teachers"] not in ([], description.made_by):
            raise UserError(
                f"This training has learned from other labels than those that are in {self.pseudo_labels_folder} now, "
                f"of {description.teachers_named}. Begin a new one, without --c."
            )
        now = [case for case in description.disagreement if case not in description.dropped]
        if before["cases"] not in ([], now):
            self.print_to_log_file("Other pseudo-labelled cases are left out now than when this training began")

    @property
    def pseudo_labels_folder(self) -> Path:
        """Where the fold's pseudo-labels are."""
        return folder_of(Path(self.preprocessed_dataset_folder), self.fold, self.pseudo_label_set)

    def on_train_start(self) -> None:
        if self.start_from_teacher and self.current_epoch == 0:  # a resumed training has its own weights
            if not self.was_initialized:
                self.initialize()
            description, _ = self._read_pseudo_labels()
            self._start_from(description.teachers[0])
        super().on_train_start()
        self._set_last_round_aside()

    def _set_last_round_aside(self) -> None:
        """nnU-Net's --c prefers a final checkpoint to a later one of an unfinished training. So that of the round
        before, which is the teacher of this one, gets another name."""
        if self.is_ddp:
            dist.barrier()  # each process has read it
        file = Path(self.output_folder) / "checkpoint_final.pth"
        replaced = self.current_epoch == 0 and not self.disable_checkpointing
        if replaced and self.local_rank == 0 and file.is_file():
            file.replace(file.with_name(LAST_ROUND))
            self.print_to_log_file(f"{file.name} of an earlier training here is now {LAST_ROUND}")

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
        return {**super().extra_state(), **self._learned_from}

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        self._learned_from = {name: state[name] for name in self._learned_from}


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

    def initialize(self) -> None:
        self._require("largest_component", not self.largest_component, "False: pseudo-labels are what they are")
        super().initialize()

    def labels_of_unlabeled(self, batch: Batch) -> list[Tensor]:
        return pseudo_target(batch)


def pseudo_target(batch: Batch) -> list[Tensor]:
    """The targets of a batch's unlabelled samples at every scale."""
    return list(as_list(batch.further["pseudo_target"]))
