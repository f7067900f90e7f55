"""AdamW with a warm-up, in the place of nnU-Net's SGD."""

from __future__ import annotations

import math

import torch
from nnunetv2.training.lr_scheduler.warmup import PolyLRScheduler_offset
from torch.optim import Optimizer

from nnunetv2_selfreg.training.reliable import ReliableTraining


class WarmUpAdamW(ReliableTraining):
    """Trains with AdamW, a linear warm-up and then nnU-Net's polynomial decay.

    nnU-Net sets `initial_lr` and `weight_decay` of every trainer, so the attributes here have names of their own, and
    take their places.
    """

    learning_rate: float = 5e-4
    """The largest learning rate; ours (published: 1e-4, constant for UX-Net and after a warm-up for SwinUNETR)."""
    adamw_weight_decay: float = 1e-2
    """Weight decay of AdamW; torch's default."""
    learning_rate_warm_up: float = 0.05
    """Share of the epochs in which the learning rate grows, in whole epochs, so none of a training with 10 or fewer."""

    def configure_optimizers(self) -> tuple[Optimizer, WarmUpPolyLR]:
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "finite and greater than 0")
        self._require("adamw_weight_decay", 0 <= self.adamw_weight_decay < math.inf, "finite and 0 at least")
        self._require("learning_rate_warm_up", 0 <= self.learning_rate_warm_up < 1, "in [0, 1)")
        self.initial_lr, self.weight_decay = self.learning_rate, self.adamw_weight_decay
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        warm_up = min(round(self.learning_rate_warm_up * self.num_epochs), self.num_epochs - 1)
        return optimizer, WarmUpPolyLR(optimizer, self.initial_lr, self.num_epochs, warm_up)


class WarmUpPolyLR(PolyLRScheduler_offset):
    """lr(e) = initial_lr * min( (e + 1) / (W + 1), (1 - (e - W) / (E - W))^0.9 ) in epoch e of E, W being the warm-up.

    nnU-Net has the two parts as two schedules, between which a trainer must change.
    """

    def step(self, current_step: int | None = None) -> None:
        epoch = self.ctr if current_step in (None, -1) else current_step
        super().step(current_step)  # constant until the warm-up's end
        if epoch < self.start_step:
            for group in self.optimizer.param_groups:
                group["lr"] *= (epoch + 1) / (self.start_step + 1)
