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
from nnunetv2_selfreg.training.reliable import gather_from_ranks

CONTRASTIVE, SQUARED = "contrastive", "squared"


class QueryConsistency(WithPartners):
    """Query-distribution consistency (Dual KMax UX-Net, Wu et al., ISBI 2024), for a network that segments by queries.

        L = sum over both views of L_seg(labelled) + ramp(t) [ w_s L_segc(S) + w_q L_qdc(A) ]

    `L_seg` is all that the trainer's loss sums, the queries' own included. `S` are the logits of the query
    segmentation, `A` the merged assignments of the masks, of all samples of this process, and the consistencies are
    :func:`contrastive_agreement`, or :func:`squared_agreement` of softmax(S) and of A. Strong and weak view are one
    patch in the same place, as in the paper (the released program crops twice).

    One network sees both views, as in the released program; with `shared_weights = False` a second one of the
    architecture, its partner, sees the strong ones, as the paper's figure has it. The network that sees the weak views
    serves at inference. With `unlabeled_batch_size = 0` all samples are labelled.

    Ours: the ramp, nnU-Net's losses at all scales, a weight for each consistency (the program has one for both, 0.1,
    and as committed adds neither), and that ignored voxels are unlabelled ones.
    """

    segmentation_consistency_weight: float = 0.1
    """`w_s`, the weight of the segmentations' consistency at the end of the ramp; 0 leaves it out."""
    query_consistency_weight: float = 0.1
    """`w_q`, the weight of the queries' consistency at the end of the ramp; 0 leaves it out."""
    consistency: str = CONTRASTIVE
    """"contrastive" (published), or "squared": the mean squared difference of probabilities."""
    temperature: float = 0.5
    """Of the contrastive form; the released value."""
    shared_weights: bool = True
    """Whether one network sees both views."""
    ramp_up_length = 0.4
    passes_of_labeled = passes_of_unlabeled = 2

    _needs_unlabeled = False
    for_regions = "nnUNetTrainerMeanTeacher"

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
        if self.consistency == CONTRASTIVE:
            self._look_for_a_second_sample()
        if not self.shared_weights:
            network = self.second_network(self.label_manager.num_segmentation_heads, deep_supervision=True)
            self.strong_partner = self.add_partner("strong_network", network)

    def labeled_stream(self, loader):
        return WithWeakView(super().labeled_stream(loader))

    def _look_for_a_second_sample(self) -> None:
        """All processes compute the same loss, the one of that with the fewest samples."""
        if min(gather_from_ranks([self.batch_size + self._unlabeled_of_this_rank()])) < 2:
            self.consistency = SQUARED
            self.print_to_log_file("One sample a step, which has no other to be told from: squared consistency")

    def weighted_terms(self, batch: Batch) -> dict[str, Weighted]:
        strong, weak = self.both_views(batch.images, torch.cat((batch.further["labeled_weak"], batch.weak)))
        (labeled_strong, _), (labeled_weak, _) = batch.cut(strong), batch.cut(weak)
        supervised = self.supervised_loss(labeled_weak, batch.target)
        return {
            "segmentation": (1.0, supervised),
            "strong_segmentation": (1.0, self.apply_loss(self.segmentation_loss, labeled_strong, batch.target)),
            **self.consistencies(strong, weak),
        }

    def both_views(self, strong: Tensor, weak: Tensor) -> tuple[KMaxOutput, KMaxOutput]:
        """What is said of each view, `(B, C, *patch)`."""
        if self.shared_weights:
            return cut(self.network(torch.cat((strong, weak))), len(strong))
        return self.strong_partner.module(strong), self.network(weak)

    def consistencies(self, strong: KMaxOutput, weak: KMaxOutput) -> dict[str, Weighted]:
        """The terms of all samples; one without a weight is left out."""
        ramp = self.terms["consistency_ramp"] = self.ramp
        segmentations = [output.segmentation for output in (strong, weak)]
        if self.consistency == SQUARED:
            segmentations = [probabilities(logits, regions=False) for logits in segmentations]
        assignments = [output.log_assignments[-1].exp() for output in (strong, weak)]
        terms = {}
        if self.segmentation_consistency_weight:
            weight = ramp * self.segmentation_consistency_weight
            terms["segmentation_consistency"] = weight, self.agreement(*segmentations)
        if self.query_consistency_weight:
            terms["query_consistency"] = ramp * self.query_consistency_weight, self.agreement(*assignments)
        return terms

    def agreement(self, strong: Tensor, weak: Tensor) -> Tensor:
        """A consistency of what is said of both views, `(B, K, *spatial)`."""
        if self.consistency == CONTRASTIVE:
            return contrastive_agreement(strong, weak, self.temperature)
        return squared_agreement(strong, weak)
