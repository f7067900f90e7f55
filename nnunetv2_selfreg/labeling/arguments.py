"""`nnUNetv2_selfreg pseudo_label`: its arguments. What it needs beyond these is imported when it runs."""

from __future__ import annotations

import argparse
import shlex
import statistics
from pathlib import Path

from nnunetv2_selfreg.errors import UserError

TEXT = """\
Labels the unlabelled scans of a fold with a trained model, for nnUNetTrainerSelfTraining. Plans, folds and labels stay
as they are. Start it again after an interruption: labelled cases are skipped.

    nnUNetv2_train 2 3d_fullres 5 -tr nnUNetTrainerCopyPaste
    nnUNetv2_selfreg pseudo_label -d 2 -c 3d_fullres -f 5 -tr nnUNetTrainerCopyPaste --overview
    nnUNetv2_train 2 3d_fullres 5 -tr nnUNetTrainerSelfTraining

Each case gets a disagreement: the voxels that two models label differently (of one model: its mirrored and its plain
prediction), divided by the voxels of foreground. The worst tenth is left out, and each case without foreground.
"""


def add_pseudo_label(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand `pseudo_label`."""
    parser = commands.add_parser(
        "pseudo_label",
        help="label unlabelled scans with a trained model, for self-training",
        description=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="data set: number or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="as 3d_fullres")
    parser.add_argument("-f", required=True, nargs="+", type=_fold, metavar="FOLD", help="of the teachers; or all")
    parser.add_argument("-tr", nargs="+", default=[], metavar="TRAINER", help="of the teachers")
    parser.add_argument(
        "-m", nargs="+", type=Path, default=[], metavar="FOLDER", help="further teachers: model folders"
    )
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--student", type=_fold, metavar="FOLD", help="fold that is trained with the labels; default: -f"
    )
    parser.add_argument(
        "--drop", type=float, default=0.1, metavar="SHARE", help="of the cases, the most disputed; default: %(default)s"
    )
    parser.add_argument("--keep_empty", action="store_true", help="keep cases in which no foreground is found")
    parser.add_argument("--name", default="", help="of a further set for the same fold; default: none")
    parser.add_argument("--overview", action="store_true", help="draw the most and the least disputed cases")
    parser.add_argument("--overwrite", action="store_true", help="replace the labels of other teachers")
    parser.add_argument("-num_parts", type=int, default=1, metavar="N", help="processes that share the cases")
    parser.add_argument("-part_id", type=int, default=0, metavar="I", help="which of them this is, from 0")
    parser.add_argument("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="default: %(default)s")
    parser.set_defaults(run=run, kept="Labelled cases are kept: the same command goes on with the others.")


def _fold(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no fold: give its number, or all")
    return text if text == "all" else int(text)


def run(options: argparse.Namespace) -> int:
    """Labels, and prints what there is now and how to go on."""
    import torch

    from nnunetv2_selfreg.data.datasets import preprocessed_folder
    from nnunetv2_selfreg.labeling.label import pseudo_label
    from nnunetv2_selfreg.labeling.teachers import model_folder

    if not 0 <= options.part_id < options.num_parts:
        raise UserError(f"-part_id {options.part_id} of -num_parts {options.num_parts}: give 0 to one less than that.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA GPU here. Give -device cpu, or mend the driver.")
    if not options.tr and not options.m:
        raise UserError("No teacher is given. Name its trainer with -tr, or its model folder with -m.")
    dataset = preprocessed_folder(options.d).name
    models = [model_folder(dataset, trainer, options.p, options.c) for trainer in options.tr] + options.m
    job, description = pseudo_label(
        options.d,
        options.c,
        models,
        options.f,
        options.p,
        options.chk,
        options.student,
        options.drop,
        options.keep_empty,
        options.name,
        options.overwrite,
        (options.part_id, options.num_parts),
        options.device,
    )
    _tell(job, description, options)
    return 0


def _tell(job, description, options: argparse.Namespace) -> None:
    from nnunetv2_selfreg.data.splits import some
    from nnunetv2_selfreg.labeling.overview import draw_overview

    done, pool = len(description.disagreement), len(job.pool.identifiers)
    print(f"{done} of {pool} cases are labelled in {job.folder}.")
    for reason in dict.fromkeys(description.dropped.values()):
        cases = [case for case, why in description.dropped.items() if why == reason]
        print(f"Left out for {reason}: {len(cases)}, {some(cases)}.")
    known = [value for value in description.disagreement.values() if value is not None]
    if known:
        print(f"Disagreement: median {statistics.median(known):.3f}, from {min(known):.3f} to {max(known):.3f}.")
    elif done:
        print("Disagreement: unknown, since there is one model and it does not mirror. None is left out for it.")
    if done and options.overview:
        print(draw_overview(job, description))
    if done < pool:
        print("The other cases are left: run the other parts, or this command again.")
    else:
        print("Next:", _next_command(description, options))


def _next_command(description, options: argparse.Namespace) -> str:
    trainer = "nnUNetTrainerSelfTraining"
    if options.name:
        trainer = f"a trainer of yours with pseudo_label_set = {options.name!r}, see docs/self-training.md"
    plans = "" if options.p == "nnUNetPlans" else f" -p {shlex.quote(options.p)}"
    return f"nnUNetv2_train {shlex.quote(options.d)} {options.c} {description.fold}{plans} -tr {trainer}"
