"""`nnUNetv2_selfreg benchmark run | report | metrics`: their arguments.

What a subcommand needs beyond these is imported when it runs: `--help` waits for nothing and needs no extra.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from types import ModuleType

from nnunetv2_selfreg.benchmark import protocols
from nnunetv2_selfreg.errors import UserError

EXTRA = ("monai", "psutil")
INSTALL = 'pip install "monai>=1.5" psutil'  # the extra, also for who has a wheel or a checkout

BENCHMARK = """\
Does a trainer help on my data? Two commands tell:

    nnUNetv2_selfreg benchmark run -d 4 -c 3d_fullres -f 0 1 -o runs -tr nnUNetTrainer nnUNetTrainerSelfReg
    nnUNetv2_selfreg benchmark report runs -o report
"""
RUN = """\
Trains each trainer on each fold with the same plan, cases and iterations, through nnU-Net's own commands.

    nnUNetv2_selfreg benchmark run -d 4 -c 3d_fullres -f 0 1 -o runs -tr nnUNetTrainer nnUNetTrainerSelfReg
    nnUNetv2_selfreg benchmark run left-atrium-8 -o runs -tr nnUNetTrainer nnUNetTrainerMeanTeacher --repetitions 3
    nnUNetv2_selfreg benchmark run left-atrium-8 -o runs -tr nnUNetTrainer --jobs > jobs.txt

A protocol names data set, folds, plan and length. Without one, -d and -c name any data set. What is missing of plans,
preprocessed cases and folds is made first. Start the command again after an interruption: finished runs are skipped,
the others continue from their last whole checkpoint or begin anew.
"""
REPORT = """\
Compares the finished runs of a protocol with those of stock nnU-Net: tables in report.md, which is printed too, each
case in cases.csv, the differences of each class in differences.csv, and figures. Contours are drawn where the
predictions are still there, and the images in nnUNet_raw. The rest needs result.json and metrics.csv of each run only.
"""
METRICS = """\
Dice, Jaccard, 95 % Hausdorff and average surface distance (in mm) of predicted segmentations. Every file of a
PREDICTION folder is compared with the file of that name in REFERENCE. A training's fold_X/validation is such a folder,
gt_segmentations in nnUNet_preprocessed the reference. The CSV has a row for each folder, case and class; the means are
printed.
"""


def add_benchmark(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand `benchmark` with its own subcommands."""
    benchmark = _add_parser(commands, "benchmark", "compare trainers with stock nnU-Net on any data set", BENCHMARK)
    subcommands = benchmark.add_subparsers(metavar="run | report | metrics", required=True)
    _add_run(subcommands)
    _add_report(subcommands)
    _add_metrics(subcommands)


def _add_run(subcommands: argparse._SubParsersAction) -> None:
    parser = _add_parser(subcommands, "run", "train, validate and measure; what is done already is skipped", RUN)
    parser.add_argument("protocol", nargs="?", metavar="PROTOCOL", help=", ".join(protocols.names()))
    parser.add_argument("--protocol", type=Path, metavar="FILE", dest="protocol_file", help="one of your own, as JSON")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="of all runs")
    parser.add_argument(
        "-tr", nargs="+", default=["nnUNetTrainer"], metavar="TRAINER", help="default: nnUNetTrainer, to compare with"
    )
    parser.add_argument("-f", type=int, nargs="+", metavar="FOLD", help="default: the protocol's, or 0")
    parser.add_argument("--scale", help="of the protocol: cpu (default), full; some have more")
    parser.add_argument("--repetitions", type=_positive, default=1, metavar="N")
    parser.add_argument("--only", type=_positive, metavar="R", help="only repetition R, counted from 1")
    parser.add_argument("-device", choices=["cpu", "cuda"], help="default: the scale's, else cuda")
    parser.add_argument("--jobs", action="store_true", help="print a command for each unfinished run instead")
    free = parser.add_argument_group("without a protocol (-d also replaces a protocol's data set)")
    free.add_argument("-d", metavar="DATASET", help="data set: number or name")
    free.add_argument("-c", metavar="CONFIGURATION", help="as 2d or 3d_fullres")
    free.add_argument("-p", metavar="PLANS", help="default: nnUNetPlans")
    free.add_argument("--epochs", type=_positive, metavar="N", help="default: 1000")
    free.add_argument("--iterations", type=_positive, metavar="N", help="of an epoch, default: 250")
    kept = "Finished runs are kept: the same command goes on, where there is one from the last checkpoint."
    parser.set_defaults(run=run, kept=kept)


def run(options: argparse.Namespace) -> int:
    """Executes the runs, or prints jobs. Status 1 if one failed."""
    return _module("runs").benchmark(options)


def _add_report(subcommands: argparse._SubParsersAction) -> None:
    parser = _add_parser(subcommands, "report", "tables and figures of the finished runs", REPORT)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the folder of all runs, or a protocol's in it")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="of the report")
    parser.set_defaults(run=report)


def report(options: argparse.Namespace) -> int:
    """Writes and prints the report."""
    _module("report").write_report(options.runs, options.o)
    return 0


def _add_metrics(subcommands: argparse._SubParsersAction) -> None:
    parser = _add_parser(subcommands, "metrics", "overlap and surface distances of any segmentations", METRICS)
    parser.add_argument("reference", type=Path, metavar="REFERENCE")
    parser.add_argument("prediction", type=Path, nargs="+", metavar="PREDICTION")
    parser.add_argument("-djfile", type=Path, required=True, metavar="FILE", help="dataset.json")
    parser.add_argument("-o", type=Path, required=True, metavar="FILE", help="CSV to write")
    parser.set_defaults(run=metrics)


def metrics(options: argparse.Namespace) -> int:
    """Writes the table and prints its means."""
    _module("metrics").write_metrics(options.reference, options.prediction, options.djfile, options.o)
    return 0


def _add_parser(commands: argparse._SubParsersAction, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=summary, description=text, formatter_class=as_written)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1")
    return int(text)


def _module(name: str) -> ModuleType:
    """A module of this package.

    Raises:
        UserError: it needs the extra, which is not installed.
    """
    try:
        return import_module(f"nnunetv2_selfreg.benchmark.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise UserError(f"the benchmark needs {error.name}, which is not installed: {INSTALL}") from error
