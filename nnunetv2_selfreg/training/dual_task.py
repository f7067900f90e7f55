"""Two tasks teach each other: segmentation, and the signed distance to each structure's surface.

The segmentation network stays nnU-Net's own and serves alone in the end. The distance comes from a head beside it
(dual-task consistency) or from a second network (dual-task mutual learning).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nnunetv2_selfreg.data.foreground import at_full_resolution
from nnunetv2_selfreg.data.two_stream import WithSignedDistances
from nnunetv2_selfreg.features import LastStageTap, heads_of, unwrap
from nnunetv2_selfreg.losses.consistency import probabilities
from nnunetv2_selfreg.losses.dual_task import distance_regression, occurring, predicted_distance, soft_mask
from nnunetv2_selfreg.training.semi_supervised import SemiSupervised


class DistanceTask(SemiSupervised):
    """Trains a second module beside the network for the distances, with an optimiser and a schedule like the network's.

        L = L_seg + beta L_distance + ramp(t) mean ( mask(z) - p )^2

    `z` is the distance, the tanh of the module's output; `p` are the foreground's softmax or the regions' sigmoids. The
    first two terms are of the labelled samples, the last of all. A family says what the module is
    (:meth:`build_distance_module`), what it reads (:meth:`distance_input`) and what it learns (:meth:`distance_loss`).
    The weak views are not used. With `unlabeled_batch_size = 0` all samples are labelled.
    """

    sharpness: float = 1500.0
    """`k` of :func:`soft_mask`, the published value."""
    distance_weight: float = 1.0
    """`beta`."""

    _needs_unlabeled = False
    _distance_term: str
    """Name of the distance's loss in the log."""
    _name_in_checkpoints: str
    """Of the module."""

    def build_distance_module(self) -> nn.Module:
        """The module that predicts the distances, one channel for each foreground class or region, and what it needs of
        the network."""
        raise NotImplementedError

    def distance_input(self, batch: dict) -> Tensor:
        """What the module reads, after the network's forward pass of `batch["data"]`."""
        raise NotImplementedError

    def distance_loss(self, distance: Tensor, target: Tensor, batch: dict) -> Tensor:
        """What the module learns from the labels.

        Args:
            distance: `z` of the labelled samples, `(L, F, *spatial)`.
            target: of these, at full resolution.
            batch: the batch on the device.
        """
        raise NotImplementedError

    def initialize(self) -> None:
        self._require("sharpness", 0 < self.sharpness < math.inf, "finite and greater than 0")
        self._require("distance_weight", 0 <= self.distance_weight < math.inf, "finite and 0 at least")
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

    def semi_supervised_loss(self, output: Sequence[Tensor], target, batch: dict) -> Tensor:
        distance = predicted_distance(self.distance_module(self.distance_input(batch)))
        labels = at_full_resolution(target)
        segmentation = self.supervised_loss(output, target)
        of_labels = self.distance_loss(distance[: len(labels)], labels, batch)
        consistency = self.agreement(distance, output[0])
        terms = {"segmentation": segmentation, self._distance_term: of_labels, "consistency": consistency}
        self.keep_terms({**terms, "consistency_weight": torch.tensor(self.ramp)})
        return segmentation + self.distance_weight * of_labels + self.ramp * consistency

    def agreement(self, distance: Tensor, output: Tensor) -> Tensor:
        """Mean squared difference of the two tasks' foreground, also of ignored voxels: they are unlabelled ones.

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

    The distance head is a 1x1 convolution of the last decoder stage. The distance of a class that is not in a sample,
    and of ignored voxels, does not count.
    """

    distance_weight = 0.3
    """`beta`, the published value."""

    _name_in_checkpoints = "distance_head"
    _distance_term = "distance"

    def build_distance_module(self) -> nn.Module:
        self.tap = LastStageTap(self.network)  # first, since it raises for networks without stages
        network = unwrap(self.network)
        heads = heads_of(network)
        if not heads:
            raise NotImplementedError(
                f"{type(network).__name__} has no decoder.seg_layers to put the distance head beside. Use a plan whose "
                "network has them, such as PlainConvUNet or ResidualEncoderUNet."
            )
        return type(heads[-1])(heads[-1].in_channels, self.foreground.count, kernel_size=1)

    def labeled_stream(self, loader):
        return WithSignedDistances(super().labeled_stream(loader), self.foreground, self.configuration_manager.spacing)

    def distance_input(self, _batch: dict) -> Tensor:
        return self.tap.take().final

    def distance_loss(self, distance: Tensor, target: Tensor, batch: dict) -> Tensor:
        return distance_regression(distance, batch["distance"], self.foreground.valid(target))


class DualTaskMutual(DistanceTask):
    """Dual-task mutual learning (DTML, Zhang & Zhang, PRCV 2021): two networks, one for each task.

        L_1 = L_seg(p, y),  L_2 = Dice(mask(z), y),  both + ramp(t) mean ( mask(z) - p )^2

    The second network is of the planned architecture. The released program lets the consistency's gradient into both
    networks, as here, but adds it twice; here it counts once. The second network has no deep supervision, since its
    loss is of the full resolution, and a class that is not in a sample (with batch Dice: in the batch) counts as found,
    without gradient (our decisions).
    """

    _name_in_checkpoints = "distance_network"
    _distance_term = "distance_dice"

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
        for head in heads_of(network)[:-1]:
            head.requires_grad_(False)
        return network

    def distance_input(self, batch: dict) -> Tensor:
        return batch["data"]

    def distance_loss(self, distance: Tensor, target: Tensor, _batch: dict) -> Tensor:
        """Minus the Dice of `mask(z)`, in [-1, 0].

        The Dice of a class that does not occur would be a step of height 1 where the last false voxel goes: its
        gradient, steepened by the soft mask, is too large for half precision. So such a class counts as found.
        """
        masks = self.foreground.masks(target)
        occurs = occurring(masks)
        if self.dice.batch_dice:  # nnU-Net's Dice is then that of all samples, on all ranks
            occurs = occurs.any(0, keepdim=True).int()
            if self.dice.ddp:
                dist.all_reduce(occurs, dist.ReduceOp.MAX)
            occurs = occurs.bool()
        return self.dice(soft_mask(distance, self.sharpness), masks, self.foreground.valid(target) & occurs)
