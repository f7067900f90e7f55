"""SelfReg computed the published way, for comparison: found with `nnUNet_extTrainer=trainers:scripts/trials`.

Full maps are permuted, normalised and pooled. Own code after the description of the released program in Zhu et al.,
MICCAI 2024, taken from 2D to any dimension.
"""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn import functional as F

from nnunetv2_selfreg.losses import SelfRegularizedLoss
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class StraightPortLoss(SelfRegularizedLoss):
    """The terms of nnUNetTrainerSelfReg, with all the work."""

    scr_stop_gradient = True

    def _scr(self, features, final, _image):
        final = final.detach() if self.scr_stop_gradient else final
        terms = []
        for feature in features:
            # Pooled from full resolution for each block anew, and all of its channels shuffled.
            adaptive_pool = F.adaptive_avg_pool3d if feature.ndim == 5 else F.adaptive_avg_pool2d
            pooled = adaptive_pool(final, feature.shape[2:])
            n = min(feature.shape[1], pooled.shape[1])
            shuffled = feature[:, torch.randperm(feature.shape[1])]
            terms.append(F.mse_loss(shuffled[:, :n], pooled[:, torch.randperm(pooled.shape[1])][:, :n]))
        return torch.stack(terms).mean()

    def _ifd(self, features):
        terms = []
        for feature in features:
            normalised = F.normalize(feature.flatten(2), dim=2)
            ranking = normalised.mean((0, 2)).argsort(descending=True)
            ranked = feature[:, ranking]
            top, bottom = ranked.chunk(2, dim=1)
            terms.append(F.mse_loss(bottom, top))
        return torch.stack(terms).mean()


class nnUNetTrainerSelfRegStraightPort(SelfRegularized, nnUNetTrainer):
    """nnUNetTrainerSelfReg without any of its savings."""

    regularized_loss = StraightPortLoss


class LossIntoFinal(StraightPortLoss):
    """The gradient of SCR flows into the last decoder stage too, as it does where a port forgets to stop it."""

    scr_stop_gradient = False


class nnUNetTrainerSelfRegIntoFinal(SelfRegularized, nnUNetTrainer):
    """Semantic consistency pulls both sides together."""

    regularized_loss = LossIntoFinal
