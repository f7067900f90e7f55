"""What the runs of a protocol say: tables, the paired differences to stock nnU-Net, and figures.

    python scripts/benchmark_report.py runs/left-atrium-8-cpu -o report

Reads `result.json` and `metrics.csv` of each run that `benchmark.py` finished in the folder; these can be kept without
the models. Writes `report.md`, `cases.csv` (every case of every run), `differences.csv` (of each class too),
`differences.png`, `learning_curves.png` and `dice_against_time.png`; where the predictions are still there and the
images in `nnUNet_raw`, also the contours of the best, the median and the worst case, in `contours-TRAINER.png`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from scipy.stats import bootstrap, wilcoxon
from segmentation_metrics import METRICS

from nnunetv2_selfreg.analysis.contours import Case, contour_figure

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

STOCK = "nnUNetTrainer"
IN_PERCENT = ("dice", "jaccard")
LEARNED = 0.7  # pseudo Dice in every class
BOOTSTRAP_SEED = 0


def read_runs(folder: Path) -> tuple[pd.DataFrame, list[dict]]:
    """All rows of all finished runs, with `trainer`, `fold` and `repetition`, overlaps in percent; and all results with
    their `folder`, also of runs that diverged.

    Raises:
        FileNotFoundError: no run is finished.
    """
    tables, results = [], []
    for file in sorted(folder.glob("*/result.json")):
        result = {"failure": None, **load_json(str(file)), "folder": file.parent}
        results.append(result)
        if result["failure"] is None:
            table = pd.read_csv(file.with_name("metrics.csv"))
            tables.append(table.assign(**{name: result[name] for name in ("trainer", "fold", "repetition")}))
    if not results:
        raise FileNotFoundError(f"{folder} has no finished run (*/result.json)")
    if not tables:
        failures = "; ".join(f"{result['folder'].name}: {result['failure']}" for result in results)
        raise FileNotFoundError(f"all runs of {folder} failed: {failures}")
    cases = pd.concat(tables, ignore_index=True)
    cases[[*IN_PERCENT]] *= 100
    return cases, results


def incomplete_repetitions(cases: pd.DataFrame) -> list[tuple[str, int]]:
    """Trainer and number of the repetitions that lack folds which another repetition of the trainer has."""
    folds = cases.groupby(["trainer", "repetition"])["fold"].nunique()
    return folds[folds < folds.groupby("trainer").transform("max")].index.tolist()


def summary(cases: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the complete repetitions of the mean over cases (of all folds), by trainer and
    class."""
    repetitions = pd.MultiIndex.from_frame(cases[["trainer", "repetition"]])
    complete = cases[~repetitions.isin(incomplete_repetitions(cases))]
    of_repetition = complete.groupby(["trainer", "class", "repetition"])[[*METRICS]].mean()
    return of_repetition.groupby(["trainer", "class"]).agg(["mean", "std", "count"])


def differences(cases: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
    """Trainer minus stock, for every other trainer: a row for each case, a column for each class.

    Each side is averaged over its repetitions first. Where one of them has no value, since neither the reference nor
    that repetition's prediction has the class, there is none of the pair.
    """
    keys = ["trainer", "fold", "case", "class"]
    of_pair = cases.groupby(keys)[metric].apply(lambda values: values.mean(skipna=False)).unstack("trainer")
    if STOCK not in of_pair:
        return {}
    others = of_pair.drop(columns=STOCK).sub(of_pair[STOCK], axis=0)
    return {name: others[name].unstack("class").dropna(how="all") for name in others}


def interval(values: pd.Series) -> tuple[float, float]:
    """95 % bootstrap interval (BCa) of the mean over cases; NaN where all are equal."""
    if values.nunique() < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    found = bootstrap((values.to_numpy(),), np.mean, random_state=generator).confidence_interval
    return float(found.low), float(found.high)


def wilcoxon_p(values: pd.Series) -> float:
    """Two-sided Wilcoxon signed-rank test over cases; NaN where nothing differs."""
    return float(wilcoxon(values).pvalue) if values.any() else np.nan


def difference_rows(cases: pd.DataFrame) -> pd.DataFrame:
    """A row for each trainer, metric and class, and for the mean of the classes."""
    rows = []
    for metric, title in METRICS.items():
        for trainer, table in differences(cases, metric).items():
            for name, values in [("mean", table.mean(axis=1)), *table.items()]:
                values = values.dropna()
                low, high = interval(values)
                better = (values > 0).sum() if metric in IN_PERCENT else (values < 0).sum()
                numbers = {"mean": values.mean(), "low": low, "high": high, "better": better, "p": wilcoxon_p(values)}
                about = {"trainer": trainer, "metric": title, "class": name, "cases": len(values)}
                rows.append({**about, **numbers})
    return pd.DataFrame(rows)


def markdown(cases: pd.DataFrame, rows: pd.DataFrame, results: list[dict]) -> str:
    """The report; `rows` are those of :func:`difference_rows`."""
    tables = [_summary_table(cases), _difference_table(rows), _cost_table(results)]
    machines = sorted({result["machine"] for result in results})
    versions = sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results})
    failed = [f"{result['folder'].name}: {result['failure']}" for result in results if result["failure"]]
    incomplete = [
        f"Repetition {number} of {trainer} lacks folds and is not in the first table."
        for trainer, number in incomplete_repetitions(cases)
    ]
    return "\n\n".join(
        [
            f"# {results[0]['protocol']}",
            *("\n".join(table) for table in tables if table),
            *incomplete,
            *failed,
            "Machines: " + "; ".join(machines),
            "Versions: " + "; ".join(versions),
            f"Seeds: trainings are not seeded, as in nnU-Net; bootstrap {BOOTSTRAP_SEED}.",
            "\n".join(["```bash", *dict.fromkeys(result["command"] for result in results), "```"]),
        ]
    )


def _summary_table(cases: pd.DataFrame) -> list[str]:
    lines = ["Mean over cases; ± is the standard deviation over repetitions.", ""]
    lines += _head("trainer", "class", "repetitions", *METRICS.values())
    for (trainer, name), row in summary(cases).iterrows():
        numbers = [_with_spread(row[metric]) for metric in METRICS]
        lines.append(_row(trainer, name, int(row[("dice", "count")]), *numbers))
    return lines


def _difference_table(rows: pd.DataFrame) -> list[str]:
    """Of the mean over classes; differences.csv has each class."""
    if rows.empty:
        return []
    lines = ["Paired over cases, each averaged over its repetitions and classes (each class: differences.csv).", ""]
    lines += _head("trainer minus stock", "metric", "cases", "mean", "95 % interval", "better cases", "Wilcoxon p")
    for _, row in rows[rows["class"] == "mean"].iterrows():
        numbers = [f"{row['mean']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}", row["better"], f"{row['p']:.2g}"]
        lines.append(_row(row["trainer"], row["metric"], row["cases"], *numbers))
    return lines


def _cost_table(results: list[dict]) -> list[str]:
    """Medians over runs; a dash where no run has been measured."""
    costs = pd.DataFrame([{"trainer": result["trainer"], **costs_of(result)} for result in results])
    lines = [
        "Medians over runs. A step is an epoch's time by its training steps, so its share of the online validation is "
        "in it (scripts/step_time.py compares steps alone); a prediction is one with mirroring. A trainer has learned "
        f"in the first epoch with a pseudo Dice of {LEARNED} in every class.",
        "",
    ]
    lines += _head("trainer", *costs.columns[1:])
    for trainer, row in costs.groupby("trainer").median().iterrows():
        lines.append(_row(trainer, *map(_as_cost, row)))
    return lines


def costs_of(result: dict) -> dict[str, float]:
    """What a run took; NaN for what was not measured."""
    seconds = epoch_seconds(result)
    return {
        "parameters, M": result.get("parameters", np.nan) / 1e6,
        "step, s": np.median(seconds) / result.get("iterations", np.nan) if len(seconds) else np.nan,
        "training, min": seconds.sum() / 60 if len(seconds) else np.nan,
        "peak memory, MiB": result.get("peak_memory_mib") or np.nan,
        "prediction of a case, s": result.get("prediction_seconds") or np.nan,
        "learned in epoch": first_epoch_with(result.get("curves", {}).get("dice_per_class_or_region", [])),
    }


def first_epoch_with(dice: list[list[float]], enough: float = LEARNED) -> float:
    """The first epoch, counted from 1, in which every class has so much; NaN without one."""
    return next((number for number, classes in enumerate(dice, 1) if min(classes) >= enough), np.nan)


def epoch_seconds(result: dict) -> np.ndarray:
    """The time of each epoch; none if the run left no curves."""
    curves = result.get("curves", {"epoch_end_timestamps": [], "epoch_start_timestamps": []})
    return np.subtract(curves["epoch_end_timestamps"], curves["epoch_start_timestamps"])


def _with_spread(values: pd.Series) -> str:
    return f"{values['mean']:.2f}" + ("" if np.isnan(values["std"]) else f" ± {values['std']:.2f}")


def _as_cost(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*titles: str) -> list[str]:
    return [_row(*titles), _row(*["---"] * len(titles))]


def draw_differences(cases: pd.DataFrame, file: Path) -> None:
    """Dice of each trainer minus stock, a dot for each case, the mean with its interval. Nothing without stock."""
    values = {name: table.mean(axis=1).dropna() for name, table in differences(cases, "dice").items()}
    if not values:
        return
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.5 * len(values)), layout="constrained")
    for height, mine in enumerate(values.values()):
        axes.plot(mine, np.full(len(mine), height), "o", alpha=0.4, markeredgewidth=0)
        axes.plot(interval(mine), [height + 0.25] * 2, "k-", linewidth=2)
        axes.plot(mine.mean(), height + 0.25, "kd")
    axes.axvline(0, color="gray", linewidth=1)
    axes.set(yticks=range(len(values)), yticklabels=values, ylim=(-0.5, len(values) - 0.25))
    axes.set_xlabel("Dice, trainer minus stock, points (a dot is a case)")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_learning_curves(results: list[dict], file: Path) -> None:
    """Pseudo Dice by epoch, a line for each run. Not the moving average: in a short training it hides the start."""
    with _figure_by_trainer(results, file) as (axes, colors):
        for result in results:
            axes.plot(result["curves"]["mean_fg_dice"], linewidth=1, color=colors[result["trainer"]])
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
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(result["trainer"] for result in results))}
    yield axes, colors
    axes.legend(handles=[Line2D([], [], color=color, label=name, marker="o") for name, color in colors.items()])
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_contours(cases: pd.DataFrame, results: list[dict], folder: Path) -> list[str]:
    """The best, the median and the worst case by the mean Dice over all runs, as a first run of each trainer predicts
    them. Returns the trainers whose contours cannot be drawn, because predictions or images are not there."""
    ranking = cases.groupby("case")["dice"].mean().dropna().sort_values().index
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
        FileNotFoundError: none of them has it, or there is no such data set.
    """
    description = load_json(str(raw / "dataset.json"))
    name = case + description["file_ending"]
    predictions = {result["folder"] / result.get("validation", "") / name: result for result in results}
    predicted = next(filter(Path.is_file, predictions), None)
    if predicted is None:
        raise FileNotFoundError(name)
    files = get_filenames_of_train_images_and_targets(str(raw), description)[case]
    reader = determine_reader_writer_from_dataset_json(description, files["images"][0], verbose=False)()
    image, properties = reader.read_images(files["images"][:1])
    reference, prediction = (reader.read_seg(str(file))[0][0] for file in (files["label"], predicted))
    run = {name: predictions[predicted][name] for name in ("trainer", "fold", "repetition")}
    of_run = cases[(cases[list(run)] == pd.Series(run)).all(axis=1) & (cases["case"] == case)]
    title = f"{which}: {case}, Dice {of_run['dice'].mean():.1f} %"
    return Case(title, image[0], reference, prediction, properties["spacing"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        cases, results = read_runs(arguments.runs)
    except FileNotFoundError as error:
        parser.error(str(error))
    arguments.o.mkdir(parents=True, exist_ok=True)
    rows = difference_rows(cases)
    report = markdown(cases, rows, results)
    (arguments.o / "report.md").write_text(report + "\n")
    cases.to_csv(arguments.o / "cases.csv", index=False)
    rows.to_csv(arguments.o / "differences.csv", index=False)
    finished = [result for result in results if result["failure"] is None]
    draw_differences(cases, arguments.o / "differences.png")
    draw_learning_curves(finished, arguments.o / "learning_curves.png")
    draw_dice_against_time(cases, finished, arguments.o / "dice_against_time.png")
    missing = draw_contours(cases, finished, arguments.o)
    print(report)
    if missing:
        print(f"\nNo contours of {', '.join(missing)}: predictions or nnUNet_raw are not there.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
