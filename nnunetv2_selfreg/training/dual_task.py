"""Two tasks teach each other: segmentation, and the signed distance to each structure's surface.

The segmentation network stays nnU-Net's own and serves alone in the end. The distance comes from a head beside it
(dual-task consistency) or from a second network (dual-task mutual learning).
"""

from __future__ import annotations

import math

import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nnunetv2_selfreg.data.foreground import at_full_resolution
from nnunetv2_selfreg.data.two_stream import WithSignedDistances
from nnunetv2_selfreg.features import LastStageTap, unwrap
from nnunetv2_selfreg.losses.consistency import probabilities
from nnunetv2_selfreg.losses.dual_task import distance_regression, occurring, predicted_distance, soft_mask
from nnunetv2_selfreg.training.semi_supervised import SemiSupervised


class DistanceTask(SemiSupervised):
    """Trains a second module beside the network for the distances, with an optimiser and a schedule like the network's.

    A family says what the module is (:meth:`build_distance_module`) and what it learns. Both see the strong view alone.
    With `unlabeled_batch_size = 0` they train on labels alone, and the two tasks still have to agree.
    """

    sharpness: float = 1500.0
    """`k` of :func:`soft_mask`, the published value."""

    _needs_unlabeled = False
    _name_in_checkpoints: str
    """Of the module."""

    def build_distance_module(self) -> nn.Module:
        """The module that predicts the distances, one channel for each foreground class or region, and what it needs of
        the network."""
        raise NotImplementedError

    def initialize(self) -> None:
        self._require("sharpness", 0 < self.sharpness < math.inf, "finite and greater than 0")
        super().initialize()
        self.distance_module = self._like_the_network(self.build_distance_module())
        self.distance_optimizer, self.distance_schedule = self._optimizer_of(self.distance_module)

    def _like_the_network(self, module: nn.Module) -> nn.Module:
        """On the device, compiled and synchronised as nnU-Net does it with the network."""
        module = module.to(self.device)
        if self._do_i_compile():
            module = torch.compile(module)
        if self.is_ddp:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            devices = [self.local_rank] if self.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=devices)
        return module

    def _optimizer_of(self, module: nn.Module):
        network, self.network = self.network, module  # whose parameters configure_optimizers takes
        try:
            return self.configure_optimizers()
        finally:
            self.network = network

    def trained_modules(self) -> list[tuple[nn.Module, Optimizer]]:
        return [*super().trained_modules(), (self.distance_module, self.distance_optimizer)]

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.distance_module.train()
        self.distance_schedule.step(self.current_epoch)

    def agreement(self, distance: Tensor, output: Tensor) -> Tensor:
        """Mean squared difference of the two tasks' foreground.

            mean ( mask(z) - p )^2

        Args:
            distance: `z`, `(B, F, *spatial)` for `F` foreground classes or regions.
            output: of the network at full resolution, `(B, K, *spatial)`, with background unless there are regions.

        Returns:
            A scalar; both sides get its gradient.
        """
        foreground = probabilities(output, self.foreground.regions)[:, -self.foreground.count :]  # no background
        return ((soft_mask(distance, self.sharpness) - foreground) ** 2).mean()

    def extra_state(self) -> dict:
        weights, optimizer = unwrap(self.distance_module).state_dict(), self.distance_optimizer.state_dict()
        return {
            **super().extra_state(),
            self._name_in_checkpoints: weights,
            f"{self._name_in_checkpoints}_optimizer": optimizer,
        }

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        unwrap(self.distance_module).load_state_dict(state[self._name_in_checkpoints])
        self.distance_optimizer.load_state_dict(state[f"{self._name_in_checkpoints}_optimizer"])


class DualTask(DistanceTask):
    """Dual-task consistency (DTC, Luo et al., AAAI 2021): one network, two heads.

        L = L_seg + beta MSE(z, sdm(y)) + ramp(t) mean ( mask(z) - p )^2

    `z` is the tanh of the distance head, a 1x1 convolution of the last decoder stage, `p` the foreground's softmax or
    the regions' sigmoids. The first two are of the labelled samples, the last of all. The distance of a class that is
    not in a sample, and of ignored voxels, does not count.
    """

    distance_weight: float = 0.3
    """`beta`."""
    _name_in_checkpoints = "distance_head"

    def initialize(self) -> None:
        self._require("distance_weight", 0 <= self.distance_weight < math.inf, "finite and 0 at least")
        super().initialize()

    def build_distance_module(self) -> nn.Module:
        self.tap = LastStageTap(self.network)  # first, since it raises for networks without stages
        segmentation_head = unwrap(self.network).decoder.seg_layers[-1]
        return type(segmentation_head)(segmentation_head.in_channels, self.foreground.count, kernel_size=1)

    def labeled_stream(self, loader):
        return WithSignedDistances(super().labeled_stream(loader), self.foreground, self.configuration_manager.spacing)

    def semi_supervised_loss(self, output, target, batch) -> Tensor:
        distance = predicted_distance(self.distance_module(self.tap.take().final))
        labeled = len(batch["distance"])
        valid = self.foreground.valid(at_full_resolution(target))
        terms = {
            "segmentation": self.supervised_loss(output, target),
            "distance": distance_regression(distance[:labeled], batch["distance"], valid),
            "consistency": self.agreement(distance, output[0]),
        }
        self.keep_terms({**terms, "consistency_weight": torch.tensor(self.ramp)})
        return terms["segmentation"] + self.distance_weight * terms["distance"] + self.ramp * terms["consistency"]


class DualTaskMutual(DistanceTask):
    """Dual-task mutual learning (DTML, Zhang & Zhang, PRCV 2021): two networks, one for each task.

        L_1 = L_seg(p, y),  L_2 = Dice(mask(z), y),  both + ramp(t) mean ( mask(z) - p )^2

    `z` is the tanh of the second network, of the planned architecture. The released program lets the consistency's
    gradient into both networks, as here, but adds it twice; here it counts once. The second network has no deep
    supervision, since its loss is of the full resolution, and a class that is not in a sample (with batch Dice: in the
    batch) counts as found, without gradient (our decisions).
    """

    _name_in_checkpoints = "distance_network"

    def initialize(self) -> None:
        super().initialize()
        self.dice = MemoryEfficientSoftDiceLoss(
            batch_dice=self.configuration_manager.batch_dice, do_bg=True, smooth=1e-5, ddp=self.is_ddp
        )

    def build_distance_module(self) -> nn.Module:
        network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.foreground.count,
            enable_deep_supervision=False,
        )
        # U-Nets have heads at the other scales all the same; DistributedDataParallel would wait for their gradients.
        for head in list(getattr(network.decoder, "seg_layers", ()))[:-1]:
            head.requires_grad_(False)
        return network

    def semi_supervised_loss(self, output, target, batch) -> Tensor:
        distance = predicted_distance(self.distance_module(batch["data"]))
        terms = {
            "segmentation": self.supervised_loss(output, target),
            "distance_dice": self.distance_dice(distance, at_full_resolution(target)),
            "consistency": self.agreement(distance, output[0]),
        }
        self.keep_terms({**terms, "consistency_weight": torch.tensor(self.ramp)})
        return terms["segmentation"] + terms["distance_dice"] + self.ramp * terms["consistency"]

    def distance_dice(self, distance: Tensor, target: Tensor) -> Tensor:
        """Minus the Dice of `mask(z)`, in [-1, 0].

        The Dice of a class that does not occur would be a step of height 1 where the last false voxel goes: its
        gradient, steepened by the soft mask, is too large for half precision. So such a class counts as found.

        Args:
            distance: `z`, `(B, F, *spatial)`, the labelled samples first.
            target: of these, at full resolution.
        """
        masks = self.foreground.masks(target)
        occurs = occurring(masks)
        if self.dice.batch_dice:  # nnU-Net's Dice is then that of all samples, on all ranks
            occurs = occurs.any(0, keepdim=True).int()
            if self.dice.ddp:
                dist.all_reduce(occurs, dist.ReduceOp.MAX)
            occurs = occurs.bool()
        soft = soft_mask(distance[: len(masks)], self.sharpness)
        return self.dice(soft, masks, self.foreground.valid(target) & occurs)
