"""The terms of a step's loss: summed in one place, and kept for the log."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add

from torch import Tensor

Weighted = tuple[float, Tensor]
"""A weight and a scalar term of a loss."""


class Terms(dict[str, Tensor | float]):
    """What a step's loss is made of, by name, detached and without weights: what a trainer logs.

    A trainer has one, empties it before each step, and shares it with its losses.
    """

    def total(self, terms: Mapping[str, Weighted]) -> Tensor:
        """The sum of weight * term, a scalar; the terms are noted.

        A loss may be a term of another one, under whose name the inner one's own term is known: that, which is noted
        first, stays.

        >>> import torch
        >>> terms = Terms()
        >>> terms.total({"segmentation": (1.0, torch.tensor(2.0)), "consistency": (0.1, torch.tensor(5.0))})
        tensor(2.5000)
        >>> terms
        {'segmentation': tensor(2.), 'consistency': tensor(5.)}
        """
        for name, (_, term) in terms.items():
            self.setdefault(name, term.detach())
        return reduce(add, (weight * term for weight, term in terms.values()))
