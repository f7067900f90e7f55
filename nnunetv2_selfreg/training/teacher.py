"""A teacher: the exponential moving average of the network, which serves in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nnunetv2_selfreg.losses.consistency import probabilities
from nnunetv2_selfreg.networks.features import unwrap
from nnunetv2_selfreg.tensors import at_full_resolution, map_tensors
from nnunetv2_selfreg.training.reliable import sum_over_ranks
from nnunetv2_selfreg.training.semi_supervised import SemiSupervised


class WithTeacher(SemiSupervised):
    """The network is a student; its average over the steps is its teacher.

        teacher <- a teacher + (1 - a) student, a = min(1 - 1 / (step + 1), decay), after each step

    The teacher runs in training mode, as the student. It is what validation, `network_weights` in checkpoints and
    prediction use; a checkpoint holds the student beside it.
    """

    ema_decay: float = 0.99
    """Upper bound of `a`, the share of itself that the teacher keeps at a step, in [0, 1)."""

    def initialize(self) -> None:
        self._require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        super().initialize()
        self.teacher = AveragedModel(unwrap(self.network), multi_avg_fn=self._average)
        self.teacher.requires_grad_(False)
        # Not dynamic: it shares its code with the student, whose batch is larger, and would be compiled for any size.
        module = self.teacher.module
        self._run_teacher = torch.compile(module, dynamic=False) if self._do_i_compile() else module
        self._exchanged = False

    def _average(self, teacher: Sequence[Tensor], student: Sequence[Tensor], steps: Tensor) -> None:
        decay = min(1 - 1 / (int(steps) + 1), self.ema_decay)
        get_ema_multi_avg_fn(decay)(teacher, student, steps)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.teacher.n_averaged == 0:  # the student may have been given pretrained weights since
            self.teacher.module.load_state_dict(unwrap(self.network).state_dict())

    @torch.no_grad()
    def teacher_probabilities(self, images: Tensor) -> Tensor:
        """What the teacher says of `images`, `(B, K, *spatial)` in at least single precision."""
        return probabilities(at_full_resolution(self._run_teacher(images)), self.label_manager.has_regions)

    def after_step(self) -> None:
        self.teacher.update_parameters(unwrap(self.network))

    @contextmanager
    def teacher_weights(self) -> Iterator[None]:
        """The network with the teacher's weights. The weights change places, so whatever wraps the network stays."""
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        mine, teachers = unwrap(self.network), self.teacher.module
        pairs = [*zip(mine.parameters(), teachers.parameters(), strict=True)]
        pairs += zip(mine.buffers(), teachers.buffers(), strict=True)
        for a, b in pairs:
            a.data, b.data = b.data, a.data
        self._exchanged = not self._exchanged

    def validation_step(self, batch: dict) -> dict:
        # nnU-Net's step overwrites ignored voxels of the target, so each pass gets its own.
        copy = {**batch, "target": map_tensors(Tensor.clone, batch["target"])}
        student = super().validation_step(copy)
        with self.teacher_weights():
            outputs = super().validation_step(batch)
        counts = {f"student_{name}": student[name] for name in ("tp_hard", "fp_hard", "fn_hard")}
        return {**outputs, **counts}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        tp, fp, fn = (
            sum_over_ranks(np.sum([outputs[f"student_{name}"] for outputs in val_outputs], 0))
            for name in ("tp_hard", "fp_hard", "fn_hard")
        )
        with np.errstate(invalid="ignore"):
            self.log_epoch_value("student_dice", float(np.nanmean(2 * tp / (2 * tp + fp + fn))))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self.teacher_weights():
            super().perform_actual_validation(save_probabilities)

    def save_checkpoint(self, filename: str) -> None:
        with self.teacher_weights():
            super().save_checkpoint(filename)

    def extra_state(self) -> dict:
        student = self.teacher.module if self._exchanged else unwrap(self.network)
        state = {"student_weights": student.state_dict(), "teacher_steps": int(self.teacher.n_averaged)}
        return {**super().extra_state(), **state}

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        self.teacher.module.load_state_dict(unwrap(self.network).state_dict())  # network_weights are the teacher's
        self.teacher.n_averaged.fill_(state["teacher_steps"])
        unwrap(self.network).load_state_dict(state["student_weights"])
