"""Two views of each sample, labelled or not, must agree on its segmentation and on its queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.data.targets import WithWeakView
from nnunetv2_selfreg.errors import UnsupportedError
from nnunetv2_selfreg.losses.agreement import contrastive_agreement, squared_agreement
from nnunetv2_selfreg.losses.consistency import probabilities
from nnunetv2_selfreg.losses.kmax import KMaxLoss
from nnunetv2_selfreg.losses.terms import Weighted
from nnunetv2_selfreg.networks.kmax import KMaxOutput
from nnunetv2_selfreg.tensors import cut
from nnunetv2_selfreg.training.partner import WithPartners

CONTRASTIVE, SQUARED = "contrastive", "squared"


class QueryConsistency(WithPartners):
    """Query-distribution consistency (Dual KMax UX-Net, Wu et al., ISBI 2024), for a network that segments by queries.

        L = sum over both views of L_seg(labelled) + ramp(t) [ w_s L_segc(S) + w_q L_qdc(A) ]

    `L_seg` is all that the trainer's loss sums, the queries' own included. `S` are the logits of the query
    segmentation, `A` the merged assignments of the masks, of all samples, and the consistencies are
    :func:`contrastive_agreement`, or the mean squared difference of softmax(S) and of A. Strong and weak view are one
    patch in the same place; published are two crops.

    One network sees both views, as in the released program; with `shared_weights = False` a second one of the
    architecture, its partner, sees the strong ones, as the paper's figure has it. The network that sees the weak views
    serves at inference. With `unlabeled_batch_size = 0` all samples are labelled.

    Ours: the ramp and its length, nnU-Net's losses at all scales, one weight for both consistencies at any time (the
    program raises it in four steps, and has both lines commented out), ignored voxels being unlabelled ones.
    """

    segmentation_consistency_weight: float = 0.1
    """`w_s`, the weight of the segmentations' consistency at the end of the ramp."""
    query_consistency_weight: float = 0.1
    """`w_q`, the weight of the queries' consistency at the end of the ramp."""
    consistency: str = CONTRASTIVE
    """"contrastive" (published), or "squared": the mean squared difference of probabilities."""
    temperature: float = 0.5
    """Of the contrastive form; the released value."""
    shared_weights: bool = True
    """Whether one network sees both views."""
    ramp_up_length = 0.4
    passes_of_labeled = passes_of_unlabeled = 2

    _needs_unlabeled = False

    def initialize(self) -> None:
        for name in ("segmentation_consistency_weight", "query_consistency_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite and 0 at least")
        self._require("consistency", self.consistency in (CONTRASTIVE, SQUARED), f"{CONTRASTIVE} or {SQUARED}")
        self._require("temperature", 0 < self.temperature < math.inf, "finite and greater than 0")
        super().initialize()
        if not isinstance(self.segmentation_loss, KMaxLoss):
            raise UnsupportedError(
                f"{type(self).__name__} trains a network that segments by queries. Compose it with KMaxUXNetBackbone."
            )
        if self.consistency == CONTRASTIVE and self.batch_size + self._unlabeled_of_this_rank() < 2:
            self.consistency = SQUARED
            self.print_to_log_file("One sample a step, which has no other to be told from: squared consistency")
        if not self.shared_weights:
            network = self.second_network(self.label_manager.num_segmentation_heads, deep_supervision=True)
            self.strong_partner = self.add_partner("strong_network", network)

    def labeled_stream(self, loader):
        return WithWeakView(super().labeled_stream(loader))

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        strong, weak = self.both_views(batch.images, torch.cat((batch.further["labeled_weak"], batch.weak)))
        (labeled_strong, _), (labeled_weak, _) = batch.cut(strong), batch.cut(weak)
        ramp = self.terms["consistency_ramp"] = self.ramp
        supervised = self.supervised_loss(labeled_weak, batch.target)
        return {
            "segmentation": (1.0, supervised),
            "strong_segmentation": (1.0, self.apply_loss(self.segmentation_loss, labeled_strong, batch.target)),
            "segmentation_consistency": (
                ramp * self.segmentation_consistency_weight,
                self.agreement(strong.segmentation, weak.segmentation, logits=True),
            ),
            "query_consistency": (
                ramp * self.query_consistency_weight,
                self.agreement(strong.log_assignments[-1].exp(), weak.log_assignments[-1].exp()),
            ),
        }

    def both_views(self, strong: Tensor, weak: Tensor) -> tuple[KMaxOutput, KMaxOutput]:
        """What is said of each view, `(B, C, *patch)`."""
        if self.shared_weights:
            return cut(self.network(torch.cat((strong, weak))), len(strong))
        return self.strong_partner.module(strong), self.network(weak)

    def agreement(self, strong: Tensor, weak: Tensor, logits: bool = False) -> Tensor:
        """A consistency of what is said of both views, `(B, K, *spatial)`: logits or probabilities."""
        if self.consistency == CONTRASTIVE:
            return contrastive_agreement(strong, weak, self.temperature)
        if logits:
            strong, weak = probabilities(strong, regions=False), probabilities(weak, regions=False)
        return squared_agreement(strong, weak)
