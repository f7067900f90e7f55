"""`nnUNetv2_selfreg <subcommand>`: what nnU-Net's own commands do not do."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_selfreg import __version__, discovery
from nnunetv2_selfreg.benchmark.arguments import add_benchmark
from nnunetv2_selfreg.errors import UserError, one_line
from nnunetv2_selfreg.labeling.arguments import add_pseudo_label

# What a subcommand needs beyond these is imported when it runs: `--help` does not wait for PyTorch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status: 2 for a mistake that the user can mend, 130 for an interrupt, both
    told in one line."""
    parser = argparse.ArgumentParser(prog="nnUNetv2_selfreg", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="<subcommand>", required=True)
    trainers = commands.add_parser("trainers", help="list the trainers and say whether nnU-Net finds them")
    trainers.set_defaults(run=lambda _: show_trainers())
    _add_preprocess_unlabeled(commands)
    _add_split(commands)
    add_pseudo_label(commands)
    add_benchmark(commands)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (UserError, OSError) as error:  # no permission and full disks name the file too
        print("nnUNetv2_selfreg:", one_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nnUNetv2_selfreg: interrupted.", getattr(parsed, "kept", ""), file=sys.stderr)
        return 130


def show_trainers() -> int:
    """Prints each trainer of the package, and each in other folders of `nnUNet_extTrainer`, with a line, and whether,
    how and where nnU-Net finds it. Status 1 if it misses one."""
    errors = {}
    others = discovery.trainers_of_others()
    for trainer in [*discovery.list_trainers(), *others]:
        if trainer in others[:1]:
            print(f"\nOthers, in {discovery.VARIABLE}:")
        error = discovery.why_not_found(trainer.name)
        print(f"{trainer.name:40s} {trainer.summary}")
        if error is not None:
            errors[trainer] = error
    print("\nEach of them, and each stock trainer, takes a training length: _<N>epochs or _<N>epochs_<M>iters,")
    print("as in nnUNetTrainerSelfReg_50epochs or nnUNetTrainer_2epochs_20iters.\n")
    for folder in discovery.external_folders():
        if not folder.is_dir():
            print(f"{discovery.VARIABLE} names {folder}, and there is no such folder.", file=sys.stderr)
    if errors:
        _explain_missing(errors)
        return 1
    _explain_found()
    return 0


def _explain_found() -> None:
    pth = discovery.set_at_start()
    folders = [discovery.searched_folder(trainer) for trainer in discovery.list_trainers()]
    for folder in dict.fromkeys(folders):  # more than one where another copy of a trainer comes first
        if folder == discovery.trainers_folder() and pth is not None:
            how = f"{pth} extends {discovery.VARIABLE} at interpreter start; nothing to set"
        else:
            how = f"{discovery.VARIABLE} names it"
        print(f"nnU-Net finds them in {folder} ({how}).")


def _explain_missing(errors: dict[discovery.Trainer, str]) -> None:
    from nnunetv2_selfreg.data.splits import some

    reasons: dict[str, list[str]] = {}
    for trainer, error in errors.items():
        nowhere = discovery.searched_folder(trainer) is None
        reason = f"set this in your shell:\n    {discovery.export_line()}" if nowhere else error
        reasons.setdefault(reason, []).append(trainer.name)
    for reason, names in reasons.items():
        print(f"nnU-Net does not find {some(names)}: {reason}", file=sys.stderr)


def _add_preprocess_unlabeled(commands: argparse._SubParsersAction) -> None:
    text = "preprocess images without labels; what is done already is skipped"
    parser = commands.add_parser("preprocess_unlabeled", help=text, description=text)
    parser.add_argument("-d", required=True, metavar="DATASET", help="data set: number or name")
    parser.add_argument("-c", required=True, nargs="+", metavar="CONFIGURATION", help="as in -c 2d 3d_fullres")
    parser.add_argument("-i", type=Path, metavar="FOLDER", help="the images; default: imagesUn of the raw data set")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument(
        "-np", type=int, metavar="N", help="processes; default: nnUNet_def_n_proc or 8, no more than there are cores"
    )
    parser.add_argument("--overwrite", action="store_true", help="make cases again that are there")
    kept = "Finished cases are kept: the same command goes on with the others."
    parser.set_defaults(run=preprocess_unlabeled, kept=kept)


def preprocess_unlabeled(options: argparse.Namespace) -> int:
    """Preprocesses the images and prints how many there are now. Status 1 if it had to leave some out."""
    from nnunetv2_selfreg.data import preprocessing

    if options.overwrite:
        options.kept = "Each case is whole, as it was or made anew: the same command begins again."
    outcome = preprocessing.preprocess_unlabeled(
        options.d, options.c, options.i, options.p, options.np, options.overwrite
    )
    print(f"{outcome.done} cases preprocessed, {outcome.done_before} were there, {len(outcome.rejected)} rejected:")
    print(*outcome.folders, sep="\n")
    return 1 if outcome.rejected else 0


def _add_split(commands: argparse._SubParsersAction) -> None:
    text = "append a fold with few labels to splits_final.json"
    parser = commands.add_parser("split", help=text, description=text)
    parser.add_argument("-d", required=True, metavar="DATASET", help="data set: number or name")
    size = {"type": _count_or_fraction, "metavar": "N"}
    parser.add_argument("--labeled", required=True, help="cases that keep their labels; 0.1 is a tenth of all", **size)
    parser.add_argument("--val", default=0.2, help="cases that validate, likewise; default: a fifth", **size)
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle; default: %(default)s")
    parser.add_argument(
        "--sorted",
        action="store_true",
        dest="in_order",
        help="take the cases by name instead: the first are labelled, the last validate",
    )
    parser.set_defaults(run=split, kept="Nothing was changed.")


def _count_or_fraction(text: str) -> int | float:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    raise argparse.ArgumentTypeError(f"{text} is no number: give one of cases, as 8, or a fraction of them, as 0.1")


def split(options: argparse.Namespace) -> int:
    """Appends the fold; prints its number and how to train on it."""
    from nnunetv2_selfreg.data import splits

    number, fold, is_new = splits.append_fold(options.d, options.labeled, options.val, options.seed, options.in_order)
    sizes = "{train} labelled, {unlabeled} unlabelled, {val} for validation".format(
        **{part: len(cases) for part, cases in fold.items()}
    )
    dataset, there = shlex.quote(options.d), "" if is_new else " (there already)"
    print(f"Fold {number}{there}: {sizes}. With your configuration instead of 3d_fullres:")
    print(f"labelled only    nnUNetv2_train {dataset} 3d_fullres {number} -tr nnUNetTrainer")
    needs = "" if fold["unlabeled"] else "    (after nnUNetv2_selfreg preprocess_unlabeled)"
    print(f"semi-supervised  nnUNetv2_train {dataset} 3d_fullres {number} -tr nnUNetTrainerCopyPaste{needs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
