"""What every trainer of this package does besides its method: whole checkpoints, no training on NaN, logged terms."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist
from torch import nn

from nnunetv2_selfreg.data.foreground import Foreground
from nnunetv2_selfreg.data.splits import check_fold
from nnunetv2_selfreg.errors import DivergedError, FullDiskError, SettingError, UserError, one_line, show_alone
from nnunetv2_selfreg.files import EXTRA_STATE, replacing, says_full_disk
from nnunetv2_selfreg.losses.terms import Terms
from nnunetv2_selfreg.tensors import at_full_resolution
from nnunetv2_selfreg.training.checks import check_labels, check_patch, check_preprocessed
from nnunetv2_selfreg.training.progress import add_terms_panel

_Trainer = nnUNetTrainer if TYPE_CHECKING else object  # a mixin: the composed class brings the trainer


class ReliableTraining(_Trainer):
    """Base of all mixins over nnUNetTrainer.

    * A checkpoint is written beside its place and renamed: a kill at any moment leaves the last one whole.
    * A loss that is not finite, in training or validation, stops the run before anything is saved.
    * A label that the data set does not have stops it too, named with its case; labels with gaps do before it starts.
    * A full disk is named, with what is kept. What the user can mend ends nnU-Net's commands with one line, the
      traceback is in the log file.
    * What the losses note in `terms` is logged each epoch with nnU-Net's logger: in the log file, in a panel of
      `progress.png`, in Weights & Biases, in the checkpoint.

    A way of training that replaces nnU-Net's optimisation step overrides :meth:`optimise`.
    """

    terms: Terms
    """Terms of the last training step's loss: the only store, which all losses of the trainer share."""
    segmentation_loss: nn.Module
    """What `_build_loss` made, whatever has wrapped `loss` since, as SelfReg does."""

    def initialize(self) -> None:
        show_alone(self.log_file)
        check_labels(self.label_manager, self.plans_manager.dataset_name)
        self._check_patch_of_planned_network()
        self.terms = Terms()
        super().initialize()
        self.segmentation_loss = self.loss
        self.foreground = Foreground.of(self.label_manager)

    def _check_patch_of_planned_network(self) -> None:
        """A U-Net's skip connections would end in an error about sizes of tensors; other networks check themselves."""
        strides = self.configuration_manager.network_arch_init_kwargs.get("strides")
        if strides and type(self).build_network_architecture is nnUNetTrainer.build_network_architecture:
            try:
                check_patch(self.configuration_manager.patch_size, strides)
            except ValueError as error:
                raise SettingError(f"{self.configuration_name} of {self.plans_manager.plans_name}: {error}") from error

    def do_split(self) -> tuple[list[str], list[str]]:
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        reads_the_file = super().do_split.__func__ is nnUNetTrainer.do_split  # and not a split of the user's own
        if self.fold != "all" and reads_the_file:
            there = set(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
            check_fold(Path(self.preprocessed_dataset_folder_base) / "splits_final.json", self.fold, there)
        train, val = super().do_split()
        properties = Path(self.preprocessed_dataset_folder) / f"{train[0]}.pkl"
        check_preprocessed(Path(self.preprocessed_dataset_folder_base), properties, self.label_manager)
        return train, val

    def run_training(self) -> None:
        with self._naming_a_full_disk():
            super().run_training()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self._naming_a_full_disk():
            super().perform_actual_validation(save_probabilities)

    @contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        """Says what is kept. Which disk it is the error tells, if anything: a checkpoint's, a temporary folder's, or a
        container's shared memory."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not says_full_disk(str(error)):
                raise
            said = str(error) if isinstance(error, FullDiskError) else f"{one_line(error)}. Make room there."
            raise FullDiskError(f"{said} {self._where_to_continue()}") from error

    def optimise(self, batch: dict) -> dict:
        """One optimisation step, nnU-Net's here. Returns what nnUNetTrainer.train_step returns, `{"loss": array}`."""
        return super().train_step(batch)

    def train_step(self, batch: dict) -> dict:
        self._refuse_unknown_labels(batch)
        self.terms.clear()
        outputs = self.optimise(batch)
        terms = {name: float(term) for name, term in self.terms.items()}
        self._stop_unless_finite({"loss": outputs["loss"], **terms}, batch)
        return {**outputs, **terms}

    def validation_step(self, batch: dict) -> dict:
        self._refuse_unknown_labels(batch)
        outputs = super().validation_step(batch)
        self._stop_unless_finite({"validation loss": outputs["loss"]}, batch)
        return outputs

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        terms = {
            name: float(np.mean(gather_from_ranks([outputs[name] for outputs in train_outputs]))) for name in self.terms
        }
        for name, value in terms.items():
            self.log_epoch_value(name, value)

    def on_epoch_end(self) -> None:
        self._continue_old_curves()
        super().on_epoch_end()
        if self.local_rank == 0:
            curves = self.logger.local_logger.my_fantastic_logging
            add_terms_panel(self.output_folder, {name: curves[name] for name in self.terms})

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with replacing(filename) as part:
            super().save_checkpoint(part)
            self._add_extra_state(part)

    def extra_state(self) -> dict:
        """What a trainer keeps in its checkpoints beside nnU-Net's entries: tensors and plain values by name."""
        return {}

    def load_extra_state(self, state: dict) -> None:
        """Restores :meth:`extra_state`, whose names are all there."""

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        if not self.was_initialized:
            self.initialize()
        if not zipfile.is_zipfile(filename_or_checkpoint):  # whose directory is at its end
            raise UserError(
                f"{filename_or_checkpoint} is damaged. Remove it: --c goes on from the checkpoint before it, if there "
                "is one, and else begins anew."
            )
        state = torch.load(filename_or_checkpoint, map_location=self.device, weights_only=False).get(EXTRA_STATE, {})
        missing = sorted(set(self.extra_state()) - set(state))
        if missing:
            raise UserError(
                f"{filename_or_checkpoint} has no {', '.join(missing)}: another trainer wrote it. To start from its "
                "weights, begin a new training with -pretrained_weights."
            )
        super().load_checkpoint(filename_or_checkpoint)
        self.load_extra_state(state)

    def _require(self, name: str, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise SettingError(f"{type(self).__name__}.{name} is {getattr(self, name)}, it must be {what}")

    def _add_extra_state(self, filename: str) -> None:
        # nnU-Net builds and writes its dictionary in one function, so the file is read and written again.
        state = self.extra_state()
        if state:
            checkpoint = torch.load(filename, map_location="cpu", weights_only=False)
            torch.save({**checkpoint, EXTRA_STATE: state}, filename)

    def _stop_unless_finite(self, losses: dict, batch: dict) -> None:
        bad = {name: float(value) for name, value in losses.items() if not math.isfinite(value)}
        if not bad:
            return
        named = bad if set(bad) == {"loss"} else {name: value for name, value in bad.items() if name != "loss"}
        message = (
            f"Training stopped in epoch {self.current_epoch}: {', '.join(f'{n} is {v}' for n, v in named.items())}. "
            f"Cases in the batch: {', '.join(map(str, batch['keys']))}. Look for NaN or extreme intensities in these; "
            "if they are sound, lower the learning rate or the weight of that term. " + self._where_to_continue()
        )
        self.print_to_log_file(message, also_print_to_console=False)
        raise DivergedError(message)

    def _refuse_unknown_labels(self, batch: dict) -> None:
        """A label out of range would end a GPU's work with an assertion that names nothing."""
        unknown = self.foreground.unknown_labels(at_full_resolution(batch["target"]))
        if unknown:
            found = ", ".join(f"{label} in {batch['keys'][sample]}" for sample, label in unknown.items())
            message = (
                f"Not among the data set's labels: {found}, of {self.preprocessed_dataset_folder}. Correct the files "
                "in labelsTr, and preprocess again."
            )
            self.print_to_log_file(message, also_print_to_console=False)
            raise SettingError(message)

    def _where_to_continue(self) -> str:
        for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"):  # nnU-Net's order for --c
            if os.path.isfile(os.path.join(self.output_folder, name)):
                return f"--c continues from {name} in {self.output_folder}, which was written before this."
        return f"There is no checkpoint in {self.output_folder} yet: start again."

    def log_epoch_value(self, name: str, value: float) -> None:
        """Logs a value of this epoch with nnU-Net's logger and prints it to the log file; once an epoch for a name."""
        self._log(name, value)
        self.print_to_log_file(name, np.round(value, decimals=4))

    def _log(self, name: str, value: float) -> None:
        """Logs with nnU-Net's logger, which takes one value an epoch of keys that it knows. Epochs before a key's
        first one, as after resuming a stock checkpoint, are NaN."""
        curves = self.logger.local_logger.my_fantastic_logging
        curve = curves.setdefault(name, [])
        curve.extend([math.nan] * (self.current_epoch - len(curve)))
        self.logger.log(name, value, self.current_epoch)

    def _continue_old_curves(self) -> None:
        """Logs NaN for curves of an earlier part of the run that nobody continues: nnU-Net's plot would end there."""
        curves = self.logger.local_logger.my_fantastic_logging
        for name in set(curves) - set(LocalLogger().my_fantastic_logging):
            if len(curves[name]) <= self.current_epoch:
                self._log(name, math.nan)


def sum_over_ranks(array: np.ndarray) -> np.ndarray:
    """The sum of the arrays of all processes."""
    return np.sum(gather_from_ranks([array]), 0)


def gather_from_ranks(values: list) -> list:
    """The values of all processes, in the order of their ranks; `values` itself without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return [value for of_rank in gathered for value in of_rank]
