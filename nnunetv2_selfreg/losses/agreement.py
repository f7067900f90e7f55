"""How far two views of the same samples agree; the gradient reaches both.

Source: the semi-supervised program of Wu, Li, Zhang, "Dual KMax UX-Net", ISBI 2024 (arXiv 2311.12364), in the history
of its first author's k-Means_Mask_Mamba. The paper calls it dual contrastive loss, the program InfoNCE.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_selfreg.tensors import at_least_single

EPSILON = 1e-3  # a shorter vector of channels counts less, and the gradient of one that is 0 stays in half precision


def contrastive_agreement(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Each sample's two views shall be more alike than views of different samples are.

        S_xy[i, j] = mean over voxels of cos( x_i, y_j ) / temperature, the cosine being that of the voxels' channels
        L = - mean_i S_ab[i, i] + 1/2 mean_i lse( S_ba[i, :], S_bb[i, without i] )
                                + 1/2 mean_i lse( S_aa[i, without i], S_ab[i, :] )

    Ours: the mean over voxels. The program sums, and divides `L` by the number V of voxels in the end: its value is
    `contrastive_agreement(a, b, temperature / V) / V`. Over sums each log-sum-exp is but a maximum, so that loss and
    gradient are 0 as soon as each sample's own view is the most alike.

    Args:
        first: `a`, `(B, C, *spatial)`, of any dtype; `L` is computed in at least single precision.
        second: `b`, of the same shape.
        temperature: greater than 0; the program's is 0.5.

    Returns:
        Scalar; 0, without a gradient, of a single sample, which has nothing to be told from.

    >>> views = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])  # two samples of a voxel, each as sure as can be
    >>> contrastive_agreement(views, views)
    tensor(0.2395)
    >>> contrastive_agreement(views, views.flip(0))
    tensor(2.2395)
    """
    with torch.autocast(first.device.type, enabled=False):
        voxels = first[0, 0].numel()
        a, b = (F.normalize(at_least_single(view), dim=1, eps=EPSILON).flatten(1) for view in (first, second))
        own = torch.eye(len(a), dtype=torch.bool, device=a.device)

        def similarity(x: Tensor, y: Tensor) -> Tensor:
            return x @ y.T / (voxels * temperature)

        across = similarity(a, b)
        others = [similarity(x, x).masked_fill(own, -torch.inf) for x in (a, b)]
        told_apart = [torch.cat(both, 1).logsumexp(1).mean() for both in ((across, others[0]), (across.T, others[1]))]
        return (told_apart[0] + told_apart[1]) / 2 - across.diagonal().mean()


def squared_agreement(first: Tensor, second: Tensor) -> Tensor:
    """Mean ( a - b )^2 of two probability maps `(B, C, *spatial)`, a scalar."""
    return F.mse_loss(first, second)
