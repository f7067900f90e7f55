"""The step that all semi-supervised trainers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nnunetv2.utilities.helpers import dummy_context
from torch import Tensor, nn
from torch.optim import Optimizer

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.losses.consistency import gaussian_ramp_up
from nnunetv2_selfreg.losses.terms import Weighted
from nnunetv2_selfreg.tensors import map_tensors
from nnunetv2_selfreg.training.loading import TwoStreams


class SemiSupervised(TwoStreams):
    """Optimises the sum of the terms that a family makes of a batch.

        loader -> split into labelled, strong, weak, target -> weighted_terms -> sum -> backward -> clip, optimisers

    A family implements :meth:`weighted_terms`, and :meth:`after_step` if something follows the optimiser. What trains
    beside the network is a partner, see :class:`WithPartners`.
    """

    ramp_up_length: float = 1.0
    """Share of the training after which the unlabelled term has its full weight; the ramp is Gaussian."""
    passes_of_labeled: int = 1
    """How often networks see each labelled sample in a step: a fact of the family, which measurements read."""
    passes_of_unlabeled: int = 1
    """How often the network sees each unlabelled sample."""

    _steps_in_epoch = 0

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        """The terms of the loss by name, `(weight, scalar)` each; the step sums them and logs them without weights.

        The family runs the networks itself: `labeled, strong = batch.cut(self.network(batch.images))`. The network is
        run once a step, since SelfReg reads its features of that pass, and its loss is :meth:`supervised_loss`.

        Args:
            batch: on the device.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after the optimiser."""

    def supervised_loss(self, output: Any, target: Sequence[Tensor]) -> Tensor:
        """The trainer's loss, with SelfReg's terms where it is composed with that.

        Args:
            output: of the network, of the labelled samples alone.
            target: theirs, at every scale.
        """
        return self.apply_loss(self.loss, output, target)

    def apply_loss(self, loss: nn.Module, output: Any, target: Sequence[Tensor]) -> Tensor:
        """A loss of nnU-Net's, which takes targets at every scale with deep supervision, otherwise their only one."""
        return loss(output, target if self.enable_deep_supervision else target[0])

    @property
    def ramp(self) -> float:
        """Weight of the unlabelled term at this step, see :func:`gaussian_ramp_up`."""
        return gaussian_ramp_up(self.progress, self.ramp_up_length)

    @property
    def progress(self) -> float:
        """The share of the training that is done."""
        return (self.current_epoch + self._steps_in_epoch / self.num_iterations_per_epoch) / self.num_epochs

    def initialize(self) -> None:
        self._require("ramp_up_length", self.ramp_up_length > 0, "greater than 0")
        super().initialize()

    def on_train_epoch_start(self) -> None:
        self._steps_in_epoch = 0
        super().on_train_epoch_start()

    def optimise(self, batch: dict) -> dict:
        # nnU-Net's train_step with another loss: it has no seam between forward pass and loss.
        trained = self.trained_modules()
        for _, optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(batch)
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        for module, optimizer in trained:
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 12)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        self.after_step()
        self._steps_in_epoch += 1
        return {"loss": loss.detach().cpu().numpy()}

    def loss_of(self, batch: dict) -> Tensor:
        """The loss of a loader's batch, through the network."""
        split = Batch.split(map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch))
        with torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            return self.terms.total(self.weighted_terms(split))

    def trained_modules(self) -> list[tuple[nn.Module, Optimizer]]:
        """What a step optimises. The gradients of each module are clipped on their own, as nnU-Net clips them."""
        return [(self.network, self.optimizer)]
