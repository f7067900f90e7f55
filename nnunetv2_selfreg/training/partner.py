"""A second module that trains beside the network: a head, or another network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nnunetv2_selfreg.errors import UnsupportedError
from nnunetv2_selfreg.networks.features import heads_of, unwrap
from nnunetv2_selfreg.training.semi_supervised import SemiSupervised


class Partner:
    """A module with an optimiser and a schedule of its own, treated as nnU-Net treats its network.

    It is moved to the device, compiled, wrapped for several processes. Optimiser and schedule are what the trainer's
    `configure_optimizers` makes of it, so they are like the network's, whatever trainer that is.

    Args:
        trainer: is initialised.
        module: on any device.

    Raises:
        NotImplementedError: the optimiser is not of exactly the module's parameters.
    """

    def __init__(self, trainer: Any, module: nn.Module) -> None:
        module = module.to(trainer.device)
        if trainer._do_i_compile():
            module = torch.compile(module)
        if trainer.is_ddp:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            devices = [trainer.local_rank] if trainer.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=devices)
        self.module = module
        self.optimizer, self.schedule = _optimizer_like_the_networks(trainer, module)

    def begin_epoch(self, epoch: int) -> None:
        """As nnU-Net begins an epoch of training with its network."""
        self.module.train()
        self.schedule.step(epoch)

    def state(self, name: str) -> dict[str, Any]:
        """Weights and optimiser as they stand in a checkpoint."""
        return {name: unwrap(self.module).state_dict(), f"{name}_optimizer": self.optimizer.state_dict()}

    def load(self, name: str, state: dict[str, Any]) -> None:
        """Restores :meth:`state`."""
        unwrap(self.module).load_state_dict(state[name])
        self.optimizer.load_state_dict(state[f"{name}_optimizer"])


class WithPartners(SemiSupervised):
    """Trains partners beside the network: a step optimises them, checkpoints hold them.

    A family adds them at the end of its `initialize`. What the network's gradient and theirs have in common is the
    family's loss.
    """

    def initialize(self) -> None:
        self._partners: dict[str, Partner] = {}
        super().initialize()

    def add_partner(self, name: str, module: nn.Module) -> Partner:
        """Trains a module from now on; `name` is its key in checkpoints."""
        self._partners[name] = Partner(self, module)
        return self._partners[name]

    def second_network(self, output_channels: int, deep_supervision: bool = False) -> nn.Module:
        """Another network of the planned architecture.

        Raises:
            NotImplementedError: the architecture learns with deep supervision only, and here is none.
        """
        network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            output_channels,
            enable_deep_supervision=deep_supervision,
        )
        if deep_supervision:
            return network
        if getattr(network, "needs_deep_supervision", False):
            raise UnsupportedError(
                f"{type(self).__name__} trains a second network without deep supervision, with which alone "
                f"{type(network).__name__} learns. Compose it with another network."
            )
        # U-Nets have heads at the other scales all the same; DistributedDataParallel would wait for their gradients.
        for head in heads_of(network)[:-1]:
            head.requires_grad_(False)
        return network

    def trained_modules(self) -> list[tuple[nn.Module, Optimizer]]:
        return [*super().trained_modules(), *((p.module, p.optimizer) for p in self._partners.values())]

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        for partner in self._partners.values():
            partner.begin_epoch(self.current_epoch)

    def extra_state(self) -> dict:
        state = super().extra_state()
        for name, partner in self._partners.items():
            state |= partner.state(name)
        return state

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        for name, partner in self._partners.items():
            partner.load(name, state)


def _optimizer_like_the_networks(trainer: Any, module: nn.Module) -> tuple[Optimizer, Any]:
    network, trainer.network = trainer.network, module  # whose parameters configure_optimizers takes
    try:
        optimizer, schedule = trainer.configure_optimizers()
    finally:
        trainer.network = network
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if optimised != {id(p) for p in module.parameters()}:
        raise UnsupportedError(
            f"{type(trainer).__name__} trains a second module beside the network, and its configure_optimizers makes "
            "no optimiser of that module's parameters. Compose it with a trainer whose configure_optimizers takes "
            "self.network's parameters at each call, such as nnUNetTrainer."
        )
    return optimizer, schedule
