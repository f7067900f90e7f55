"""The terms of a step's loss: summed in one place, and kept for the log."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add

import torch
from torch import Tensor

Weighted = tuple[float, Tensor]
"""A weight and a scalar term of a loss."""


class Terms(dict[str, Tensor | float]):
    """What a step's loss is made of, by name, detached and without weights: what a trainer logs.

    A trainer has one, empties it before each step, and shares it with its losses.
    """

    def total(self, terms: Mapping[str, Weighted]) -> Tensor:
        """The sum of weight * term, a scalar. Where gradients are enabled, as in training, the terms are noted.

        A name that has been noted since the last emptying keeps its term. So where a trainer's loss is one term of a
        family's, `segmentation` say, and has a term of that name itself, the inner one is logged, without what was
        added to it.

        >>> import torch
        >>> terms = Terms()
        >>> terms.total({"segmentation": (1.0, torch.tensor(2.0)), "consistency": (0.1, torch.tensor(5.0))})
        tensor(2.5000)
        >>> terms
        {'segmentation': tensor(2.), 'consistency': tensor(5.)}
        """
        if torch.is_grad_enabled():
            for name, (_, term) in terms.items():
                self.setdefault(name, term.detach())
        return reduce(add, (weight * term for weight, term in terms.values()))


class OwnTerms(Terms):
    """Those of a loss that shares them with nobody: each sum empties them first."""

    def total(self, terms: Mapping[str, Weighted]) -> Tensor:
        self.clear()
        return super().total(terms)
