"""A trainer as nnUNetv2_train builds it, for scripts that take single steps with it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nnunetv2_selfreg import discovery
from nnunetv2_selfreg.data.datasets import labeled_cases, preprocessed_folder
from nnunetv2_selfreg.data.preprocessing import prepare
from nnunetv2_selfreg.data.splits import check_fold
from nnunetv2_selfreg.errors import UserError, one_line


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options that say on what a trainer trains."""
    parser.add_argument("dataset", help="name or id, preprocessed")
    parser.add_argument("configuration")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS")
    parser.add_argument("-f", default="0", metavar="FOLD")
    parser.add_argument("-device", default="cuda", choices=["cpu", "cuda"])


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace, trainers: list[str]) -> None:
    """Ends the script with one line if a trainer cannot be built, or the table not be written: before work starts."""
    try:
        folder = preprocessed_folder(arguments.dataset)
        prepare(folder, [arguments.configuration], arguments.p)
        if arguments.f != "all":
            if not arguments.f.isdecimal():
                raise UserError(f"-f {arguments.f} is no fold: give its number, or all")
            check_fold(folder / "splits_final.json", int(arguments.f), labeled_cases(folder))
        discovery.require(trainers)
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no GPU here; -device cpu measures without")
        output: Path | None = getattr(arguments, "o", None)
        if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
            raise UserError(f"-o {output}: give a file in a folder that exists")
    except UserError as error:
        parser.error(one_line(error))


def build(names: Iterable[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The trainers of these names on the plan of :func:`add_plan`, initialised, their networks ready for steps.

    All are looked for before a network is built: see :func:`nnunetv2_selfreg.benchmark.metrics.mask_metrics` for what
    MONAI's may load.
    """
    from nnunetv2.run.run_training import get_trainer_from_args

    fold = arguments.f if arguments.f == "all" else int(arguments.f)
    plan = arguments.dataset, arguments.configuration, fold
    device = torch.device(arguments.device)
    trainers = {name: get_trainer_from_args(*plan, name, arguments.p, device=device) for name in names}
    for trainer in trainers.values():
        trainer.initialize()
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        trainer.network.train()
    return trainers
