"""The share of a term in the gradient, on a loss whose gradients are known."""

import gradient_share
import pytest
import torch


class Trainer:
    """3 x + weight (noise + 4 y), where the noise moves nothing."""

    consistency_weight = 0.5

    def __init__(self):
        self.network = torch.nn.ParameterDict({name: torch.tensor(1.0) for name in ("x", "y", "unused")})

    def loss_of(self, batch):
        x, y = self.network["x"], self.network["y"]
        return 3 * x + torch.randn(()) * x + self.consistency_weight * 4 * y


def test_norms_of_both_parts_with_the_same_random_numbers():
    trainer = Trainer()
    rest, term = gradient_share.shares(trainer, {}, "consistency_weight")
    torch.manual_seed(0)
    assert rest == pytest.approx(3 + torch.randn(()).item())
    assert term == pytest.approx(2)
    assert trainer.consistency_weight == 0.5
