"""`nnUNetv2_selfreg <subcommand>`: what nnU-Net's own commands do not do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnunetv2_selfreg import __version__, discovery


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="nnUNetv2_selfreg", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="<subcommand>", required=True)
    trainers = commands.add_parser("trainers", help="list the trainers and say whether nnU-Net finds them")
    trainers.set_defaults(run=lambda _: show_trainers())
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


def show_trainers() -> int:
    """Prints each trainer with a line, and whether, how and where nnU-Net finds it. Status 1 if it misses one."""
    errors = {}
    for trainer in discovery.list_trainers():
        error = discovery.why_not_found(trainer.name)
        print(f"{trainer.name:40s} {trainer.summary}")
        if error is not None:
            errors[trainer] = error
    print("\nEach of them, and each stock trainer, takes a training length: _<N>epochs or _<N>epochs_<M>iters,")
    print("as in nnUNetTrainerSelfReg_50epochs or nnUNetTrainer_2epochs_20iters.\n")
    if errors:
        _explain_missing(errors)
        return 1
    _explain_found()
    return 0


def _explain_found() -> None:
    folder = discovery.searched_folder(discovery.list_trainers()[0])
    pth = discovery.set_at_start()
    if folder == discovery.trainers_folder() and pth is not None:
        how = f"{pth} extends {discovery.VARIABLE} at interpreter start; nothing to set"
    else:
        how = f"{discovery.VARIABLE} names it"
    print(f"nnU-Net finds them in {folder} ({how}).")


def _explain_missing(errors: dict[discovery.Trainer, str]) -> None:
    for trainer, error in errors.items():
        print(f"nnU-Net does not find {trainer.name}: {error}", file=sys.stderr)
    if any(discovery.searched_folder(trainer) is None for trainer in errors):
        print(f"Set this in your shell:\n    {discovery.export_line()}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
