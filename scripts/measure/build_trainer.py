"""A trainer as nnUNetv2_train builds it, for scripts that take single steps with it."""

from __future__ import annotations

import argparse
from typing import Any

import torch


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options that say on what a trainer trains."""
    parser.add_argument("dataset", help="name or id, preprocessed")
    parser.add_argument("configuration")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS")
    parser.add_argument("-f", default="0", metavar="FOLD")
    parser.add_argument("-device", default="cuda", choices=["cpu", "cuda"])


def build(name: str, arguments: argparse.Namespace) -> Any:
    """The trainer of that name on the plan of :func:`add_plan`, initialised, its network ready for steps."""
    from nnunetv2.run.run_training import get_trainer_from_args

    fold = arguments.f if arguments.f == "all" else int(arguments.f)
    device = torch.device(arguments.device)
    trainer = get_trainer_from_args(arguments.dataset, arguments.configuration, fold, name, arguments.p, device=device)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.network.train()
    return trainer
