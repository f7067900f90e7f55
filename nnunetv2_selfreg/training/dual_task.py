"""Two tasks teach each other: segmentation, and the signed distance to each structure's surface.

The segmentation network stays nnU-Net's own and serves alone in the end. The distance comes from a head beside it
(dual-task consistency) or from a second network (dual-task mutual learning).
"""

from __future__ import annotations

import math

from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch import distributed as dist

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.data.targets import WithSignedDistances
from nnunetv2_selfreg.errors import UnsupportedError
from nnunetv2_selfreg.losses.consistency import probabilities
from nnunetv2_selfreg.losses.dual_task import distance_regression, occurring, predicted_distance, soft_mask
from nnunetv2_selfreg.losses.terms import Weighted
from nnunetv2_selfreg.networks.features import LastStageTap, heads_of, unwrap
from nnunetv2_selfreg.tensors import at_full_resolution, of_image
from nnunetv2_selfreg.training.partner import WithPartners


class DistanceTask(WithPartners):
    """Trains a partner beside the network for the distances.

        L = L_seg + beta L_distance + ramp(t) mean ( mask(z) - p )^2

    `z` is the distance, the tanh of the partner's output; `p` are the foreground's softmax or the regions' sigmoids.
    The first two terms are of the labelled samples, the last of all. A family says what the partner is
    (:meth:`build_distance_module`), what it reads (:meth:`distance_input`) and what it learns (:meth:`distance_loss`).
    The weak views are not used. With `unlabeled_batch_size = 0` all samples are labelled.
    """

    sharpness: float = 1500.0
    """`k`, the steepness of the step from a distance to a mask, see :func:`soft_mask`; the published value."""
    distance_weight: float = 1.0
    """`beta`, the weight of what the distances learn from the labels."""

    _needs_unlabeled = False
    _distance_term: str
    """Name of the distance's loss in the log."""
    _name_in_checkpoints: str
    """Key of the partner's weights."""

    def build_distance_module(self) -> nn.Module:
        """The module that predicts the distances, one channel for each foreground class or region, and what it needs of
        the network."""
        raise NotImplementedError

    def distance_input(self, batch: Batch) -> Tensor:
        """What the module reads, after the network's forward pass of `batch.images`."""
        raise NotImplementedError

    def distance_loss(self, distance: Tensor, batch: Batch) -> Tensor:
        """What the module learns from the labels.

        Args:
            distance: `z` of the labelled samples, `(L, F, *spatial)`.
            batch: on the device.
        """
        raise NotImplementedError

    def initialize(self) -> None:
        self._require("sharpness", 0 < self.sharpness < math.inf, "finite and greater than 0")
        self._require("distance_weight", 0 <= self.distance_weight < math.inf, "finite and 0 at least")
        super().initialize()
        self.distance_partner = self.add_partner(self._name_in_checkpoints, self.build_distance_module())

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        output = self.network(batch.images)
        distance = predicted_distance(self.distance_partner.module(self.distance_input(batch)))
        (labeled, _), (of_labeled, _) = batch.cut(output), batch.cut(distance)
        self.terms["consistency_weight"] = self.ramp
        return {
            "segmentation": (1.0, self.supervised_loss(labeled, batch.target)),
            self._distance_term: (self.distance_weight, self.distance_loss(of_labeled, batch)),
            "consistency": (self.ramp, self.agreement(distance, at_full_resolution(output))),
        }

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


class DualTask(DistanceTask):
    """Dual-task consistency (DTC, Luo et al., AAAI 2021): one network, two heads.

        L = L_seg + beta MSE(z, sdm(y)) + ramp(t) mean ( mask(z) - p )^2

    The distance head is a 1x1 convolution of the last decoder stage. The distance of a class that is not in a sample,
    and of ignored voxels, does not count.
    """

    distance_weight = 0.3
    """`beta`, the weight of the distances' regression; the published value."""

    _name_in_checkpoints = "distance_head"
    _distance_term = "distance"

    def build_distance_module(self) -> nn.Module:
        self.tap = LastStageTap(self.network)  # first, since it raises for networks without stages
        network = unwrap(self.network)
        heads = heads_of(network)
        if not heads:
            raise UnsupportedError(
                f"{type(network).__name__} has no decoder.seg_layers to put the distance head beside. Use a plan whose "
                "network has them, such as PlainConvUNet or ResidualEncoderUNet."
            )
        head = next(module for module in heads[-1].modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))
        return type(head)(head.in_channels, self.foreground.count, kernel_size=1)

    def labeled_stream(self, loader):
        return WithSignedDistances(super().labeled_stream(loader), self.foreground, self.configuration_manager.spacing)

    def distance_input(self, batch: Batch) -> Tensor:
        final = self.tap.take().final
        return of_image(final, final.shape[2:], batch.images.shape[2:])

    def distance_loss(self, distance: Tensor, batch: Batch) -> Tensor:
        valid = self.foreground.valid(at_full_resolution(batch.target))
        return distance_regression(distance, batch.further["distance"], valid)


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
        return self.second_network(self.foreground.count)

    def distance_input(self, batch: Batch) -> Tensor:
        return batch.images

    def distance_loss(self, distance: Tensor, batch: Batch) -> Tensor:
        """Minus the Dice of `mask(z)`, in [-1, 0].

        The Dice of a class that does not occur would be a step of height 1 where the last false voxel goes: its
        gradient, steepened by the soft mask, is too large for half precision. So such a class counts as found.
        """
        target = at_full_resolution(batch.target)
        masks = self.foreground.masks(target)
        occurs = occurring(masks)
        if self.dice.batch_dice:  # nnU-Net's Dice is then that of all samples, on all ranks
            occurs = occurs.any(0, keepdim=True).int()
            if self.dice.ddp:
                dist.all_reduce(occurs, dist.ReduceOp.MAX)
            occurs = occurs.bool()
        return self.dice(soft_mask(distance, self.sharpness), masks, self.foreground.valid(target) & occurs)
