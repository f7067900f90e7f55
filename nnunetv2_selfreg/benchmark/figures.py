"""The figures of a benchmark's report: differences by case, learning curves, Dice against time, contours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from batchgenerators.utilities.file_and_folder_operations import load_json
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_selfreg.analysis.contours import Case, contour_figure
from nnunetv2_selfreg.benchmark.statistics import comparisons, epoch_seconds, interval


def draw_differences(cases: pd.DataFrame, file: Path) -> None:
    """Dice of each trainer minus stock, a dot for each case, the mean with its interval; so of each repetition of stock
    minus its others. Nothing without stock."""
    values = {name: table.mean(axis=1).dropna() for name, table in comparisons(cases, "dice").items()}
    if not values:
        return
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(values)), layout="constrained")
    axes = figure.subplots()
    for height, mine in enumerate(values.values()):
        axes.plot(mine, np.full(len(mine), height), "o", alpha=0.4, markeredgewidth=0)
        axes.plot(interval(mine), [height + 0.25] * 2, "k-", linewidth=2)
        axes.plot(mine.mean(), height + 0.25, "kd")
    axes.axvline(0, color="gray", linewidth=1)
    axes.set(yticks=range(len(values)), yticklabels=values, ylim=(-0.5, len(values) - 0.25))
    axes.set_xlabel("Dice, trainer minus stock, points (a dot is a case)")
    figure.savefig(file, dpi=150)


def draw_learning_curves(results: list[dict], file: Path) -> None:
    """Pseudo Dice by epoch, a line for each run. Not the moving average: in a short training it hides the start."""
    with _figure_by_trainer(results, file) as (axes, colors):
        for result in results:
            dice = result["curves"]["mean_fg_dice"]
            axes.plot(range(1, len(dice) + 1), dice, linewidth=1, color=colors[result["trainer"]])
        axes.set(xlabel="epoch", ylabel="pseudo Dice")


def draw_dice_against_time(cases: pd.DataFrame, results: list[dict], file: Path) -> None:
    """Mean Dice on the validation cases against the time of the training, a dot for each run."""
    of_run = cases.groupby(["trainer", "fold", "repetition"])["dice"].mean()
    with _figure_by_trainer(results, file) as (axes, colors):
        for result in results:
            dice = of_run[result["trainer"], result["fold"], result["repetition"]]
            axes.plot(epoch_seconds(result).sum() / 60, dice, "o", color=colors[result["trainer"]])
        axes.set(xlabel="training, min", ylabel="mean Dice, %")


@contextmanager
def _figure_by_trainer(results: list[dict], file: Path) -> Iterator[tuple[Axes, dict[str, str]]]:
    """Axes with a legend of trainers, and their colours."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    trainers = dict.fromkeys(result["trainer"] for result in results)
    colors = dict(zip(trainers, cycle(colormaps["tab20"].colors), strict=False))
    yield axes, colors
    handles = [Line2D([], [], color=color, label=name, marker="o") for name, color in colors.items()]
    axes.legend(handles=handles, fontsize="small" if len(handles) <= 6 else "xx-small")
    figure.savefig(file, dpi=150)


def draw_contours(cases: pd.DataFrame, results: list[dict], folder: Path) -> list[str]:
    """The best, the median and the worst case by the mean Dice over all runs, as a first run of each trainer predicts
    them. Returns the trainers whose contours cannot be drawn, because predictions or images are not there."""
    ranking = cases.groupby("case")["dice"].mean().dropna().sort_values().index
    if ranking.empty:  # no case has any class
        return []
    chosen = {"best": ranking[-1], "median": ranking[len(ranking) // 2], "worst": ranking[0]}
    raw = Path(os.environ.get("nnUNet_raw", ""), results[0].get("dataset", ""))
    missing = []
    for trainer in dict.fromkeys(result["trainer"] for result in results):
        mine = [result for result in results if result["trainer"] == trainer]
        try:
            drawn = [_case_to_draw(which, case, cases, mine, raw) for which, case in chosen.items()]
        except FileNotFoundError:
            missing.append(trainer)
        else:
            contour_figure(drawn, folder / f"contours-{trainer}.png")
    return missing


def _case_to_draw(which: str, case: str, cases: pd.DataFrame, results: list[dict], raw: Path) -> Case:
    """A case of the raw data set as the first of the runs that has it predicts it.

    Raises:
        FileNotFoundError: none of them has it, or the data set, or that case of it, is not there.
    """
    description = load_json(str(raw / "dataset.json"))
    name = case + description["file_ending"]
    predictions = {result["folder"] / result.get("validation", "") / name: result for result in results}
    predicted = next(filter(Path.is_file, predictions), None)
    if predicted is None:
        raise FileNotFoundError(name)
    files = get_filenames_of_train_images_and_targets(str(raw), description).get(case)
    if files is None:
        raise FileNotFoundError(case)
    reader = determine_reader_writer_from_dataset_json(description, files["images"][0], verbose=False)()
    image, properties = reader.read_images(files["images"][:1])
    reference, prediction = (reader.read_seg(str(file))[0][0] for file in (files["label"], predicted))
    run = {name: predictions[predicted][name] for name in ("trainer", "fold", "repetition")}
    of_run = cases[(cases[list(run)] == pd.Series(run)).all(axis=1) & (cases["case"] == case)]
    title = f"{which}: {case}, Dice {of_run['dice'].mean():.1f} %"
    return Case(title, image[0], reference, prediction, properties["spacing"])
