"""How much a weighted term of a semi-supervised trainer's loss moves the network, beside the rest of the loss.

    python scripts/measure/gradient_share.py 4 2d_small -f 5 -tr nnUNetTrainerMeanTeacher_25epochs_200iters \\
        --checkpoint checkpoint_final.pth --weight consistency_weight -device cpu

Takes the gradient of the loss on real batches, with the weight (an attribute of the trainer) and with 0 in its place,
the random numbers being the same; their difference is the term's own gradient. Printed are the medians over batches of
the norm of both and of their ratio, with the term's weight and at weight 1. The trainer is named with its length, so
that the ramp stands where the checkpoint was written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from build_trainer import add_plan, build, check
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan(parser)
    parser.add_argument("-tr", required=True, metavar="TRAINER")
    parser.add_argument("--checkpoint", type=Path, help="of this trainer; default: an untrained network")
    parser.add_argument("--weight", default="consistency_weight", metavar="ATTRIBUTE")
    parser.add_argument("--batches", type=int, default=6)
    arguments = parser.parse_args()
    check(parser, arguments, [arguments.tr])

    os.environ["nnUNet_n_proc_DA"] = "0"
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results  # a trainer writes a log file as soon as it exists
        trainer = build([arguments.tr], arguments)[arguments.tr]
        if arguments.checkpoint:
            trainer.load_checkpoint(str(arguments.checkpoint))
        loader, _ = trainer.get_dataloaders()
        norms = [shares(trainer, next(loader), arguments.weight) for _ in range(arguments.batches)]
    weight = getattr(trainer, arguments.weight)
    rest, term = (statistics.median(column) for column in zip(*norms, strict=True))
    ratio = statistics.median(term / rest for rest, term in norms)
    print(f"rest of the loss: {rest:.3g}; {arguments.weight} {weight}: {term:.3g}")
    print(f"ratio: {ratio:.3g}" + (f", at weight 1: {ratio / weight:.3g}" if weight else ""))


def shares(trainer: Any, batch: dict, weight: str) -> tuple[float, float]:
    """Norms of the gradient without the term and of the term's own."""
    whole, value = gradient(trainer, batch), getattr(trainer, weight)
    setattr(trainer, weight, 0.0)
    rest = gradient(trainer, batch)
    setattr(trainer, weight, value)
    return float(rest.norm()), float((whole - rest).norm())


def gradient(trainer: Any, batch: dict) -> Tensor:
    """Of the loss, in all parameters of the network; always with the same random numbers."""
    torch.manual_seed(0)
    parameters = list(trainer.network.parameters())
    gradients = torch.autograd.grad(trainer.loss_of(batch), parameters, materialize_grads=True)
    return torch.cat([gradient.flatten().float() for gradient in gradients])


if __name__ == "__main__":
    main()
