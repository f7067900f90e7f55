"""What the runs of a protocol say: a table, the paired differences to stock nnU-Net, and figures.

    python scripts/benchmark_report.py runs/left-atrium-8-cpu -o report

Reads `result.json` and `metrics.csv` of each run that `benchmark.py` finished in the folder; nothing else is needed, so
these two can be kept without the models. Writes `report.md`, `cases.csv` (every case of every run), `differences.png`
and `learning_curves.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from batchgenerators.utilities.file_and_folder_operations import load_json
from scipy.stats import bootstrap, wilcoxon
from segmentation_metrics import METRICS

matplotlib.use("agg")
from matplotlib import pyplot as plt

STOCK = "nnUNetTrainer"
IN_PERCENT = ("dice", "jaccard")


def read_runs(folder: Path) -> tuple[pd.DataFrame, list[dict]]:
    """All rows of all finished runs, with `trainer`, `fold` and `repetition`, overlaps in percent; and their results.

    Raises:
        FileNotFoundError: no run is finished.
    """
    tables, results = [], []
    for file in sorted(folder.glob("*/result.json")):
        result = load_json(str(file))
        table = pd.read_csv(file.with_name("metrics.csv"))
        tables.append(table.assign(**{name: result[name] for name in ("trainer", "fold", "repetition")}))
        results.append(result)
    if not tables:
        raise FileNotFoundError(f"{folder} has no finished run (*/result.json)")
    cases = pd.concat(tables, ignore_index=True)
    cases[[*IN_PERCENT]] *= 100
    return cases, results


def summary(cases: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over runs of a run's mean over cases, for each trainer and class."""
    of_run = cases.groupby(["trainer", "class", "fold", "repetition"])[[*METRICS]].mean()
    return of_run.groupby(["trainer", "class"]).agg(["mean", "std", "count"])


def differences(cases: pd.DataFrame, metric: str) -> dict[str, pd.Series]:
    """Trainer minus stock of each case, averaged over repetitions and classes, for every other trainer."""
    of_case = cases.groupby(["trainer", "fold", "case"])[metric].mean().unstack(0)
    return {name: (of_case[name] - of_case[STOCK]).dropna() for name in of_case if STOCK in of_case and name != STOCK}


def interval(values: pd.Series, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval (BCa) of the mean over cases."""
    found = bootstrap((values.to_numpy(),), np.mean, random_state=np.random.default_rng(seed)).confidence_interval
    return float(found.low), float(found.high)


def markdown(cases: pd.DataFrame, results: list[dict]) -> str:
    lines = [f"# {results[0]['protocol']}", "", *_summary_table(cases, results), "", *_difference_table(cases), ""]
    machines = sorted({result["machine"] for result in results})
    versions = sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results})
    commands = dict.fromkeys(result["command"] for result in results)
    return "\n".join([*lines, *machines, "", *versions, "", "```bash", *commands, "```", ""])


def _summary_table(cases: pd.DataFrame, results: list[dict]) -> list[str]:
    columns = ["trainer", "class", "runs", *METRICS.values(), "parameters", "epoch, s"]
    lines = ["Mean over cases; ± is the standard deviation over runs.", "", _row(columns), _row(["---"] * len(columns))]
    for (trainer, name), row in summary(cases).iterrows():
        mine = [result for result in results if result["trainer"] == trainer]
        numbers = [_with_spread(row[metric]) for metric in METRICS]
        cost = [f"{mine[0]['parameters'] / 1e6:.2f} M", f"{np.median([epoch_seconds(r) for r in mine]):.1f}"]
        lines.append(_row([trainer, name, int(row[("dice", "count")]), *numbers, *cost]))
    return lines


def _difference_table(cases: pd.DataFrame) -> list[str]:
    columns = ["trainer minus stock", "metric", "cases", "mean", "95 % interval", "better cases", "Wilcoxon p"]
    lines = ["Paired over cases, each averaged over its runs.", "", _row(columns), _row(["---"] * len(columns))]
    for metric, title in METRICS.items():
        for trainer, values in differences(cases, metric).items():
            low, high = interval(values)
            better = (values > 0).sum() if metric in IN_PERCENT else (values < 0).sum()
            numbers = [f"{values.mean():+.2f}", f"{low:+.2f} to {high:+.2f}", better, f"{wilcoxon(values).pvalue:.2g}"]
            lines.append(_row([trainer, title, len(values), *numbers]))
    return lines


def epoch_seconds(result: dict) -> float:
    """Median time of an epoch."""
    curves = result["curves"]
    return float(np.median(np.subtract(curves["epoch_end_timestamps"], curves["epoch_start_timestamps"])))


def _with_spread(values: pd.Series) -> str:
    return f"{values['mean']:.2f}" + ("" if np.isnan(values["std"]) else f" ± {values['std']:.2f}")


def _row(cells: list) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def draw_differences(cases: pd.DataFrame, file: Path) -> None:
    """Dice of each trainer minus stock, a dot for each case, the mean with its interval."""
    values = differences(cases, "dice")
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
    """Moving average of the pseudo Dice by epoch, a line for each run."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(result["trainer"] for result in results))}
    for result in results:
        label = result["trainer"] if result["trainer"] not in axes.get_legend_handles_labels()[1] else None
        axes.plot(result["curves"]["ema_fg_dice"], color=colors[result["trainer"]], label=label)
    axes.set(xlabel="epoch", ylabel="pseudo Dice, moving average")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    cases, results = read_runs(arguments.runs)
    arguments.o.mkdir(parents=True, exist_ok=True)
    (arguments.o / "report.md").write_text(markdown(cases, results))
    cases.to_csv(arguments.o / "cases.csv", index=False)
    draw_differences(cases, arguments.o / "differences.png")
    draw_learning_curves(results, arguments.o / "learning_curves.png")
    print((arguments.o / "report.md").read_text())


if __name__ == "__main__":
    main()
