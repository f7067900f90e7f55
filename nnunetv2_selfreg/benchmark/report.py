"""What the runs of a protocol say: tables, the paired differences to stock nnU-Net, and figures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from nnunetv2_selfreg.benchmark import METRICS
from nnunetv2_selfreg.benchmark.figures import (
    draw_contours,
    draw_dice_against_time,
    draw_differences,
    draw_learning_curves,
)
from nnunetv2_selfreg.benchmark.statistics import (
    BOOTSTRAP_SEED,
    FEWEST_CASES,
    LEARNED,
    costs_of,
    difference_rows,
    incomplete_repetitions,
    middle,
    read_runs,
    summary,
)
from nnunetv2_selfreg.errors import UserError


def write_report(folder: Path, output: Path) -> None:
    """Writes the report's files to `output` and prints its text.

    Of each finished run `result.json` and `metrics.csv` are read; these can be kept without the models. Contours are
    drawn where the predictions are still there, and the images in `nnUNet_raw`.

    Args:
        folder: of a protocol's runs, or the one above it if that holds the runs of this protocol only.
        output: is made; gets `report.md`, `cases.csv` (every case of every run), `differences.csv` (of each class too),
            `differences.png`, `learning_curves.png`, `dice_against_time.png` and `contours-TRAINER.png`.

    Raises:
        UserError: no run is finished or all failed, or there are the runs of several protocols.
    """
    cases, results = read_runs(folder_of_runs(folder))
    output.mkdir(parents=True, exist_ok=True)
    rows = difference_rows(cases)
    report = markdown(cases, rows, results)
    (output / "report.md").write_text(report + "\n", encoding="utf-8")
    cases.to_csv(output / "cases.csv", index=False)
    rows.to_csv(output / "differences.csv", index=False)
    finished = [result for result in results if result["failure"] is None]
    draw_differences(cases, output / "differences.png")
    draw_learning_curves(finished, output / "learning_curves.png")
    draw_dice_against_time(cases, finished, output / "dice_against_time.png")
    print(report)
    missing = draw_contours(cases, finished, output)
    if missing:
        print(f"\nNo contours of {', '.join(missing)}: predictions or nnUNet_raw are not there.", file=sys.stderr)


def folder_of_runs(folder: Path) -> Path:
    """The folder itself, or the only one in it that has finished runs.

    Raises:
        UserError: there are several.
    """
    if any(folder.glob("*/result.json")):
        return folder
    below = sorted({file.parents[1] for file in folder.glob("*/*/result.json")})
    if len(below) > 1:
        raise UserError(f"{folder} has the runs of {', '.join(f.name for f in below)}. Give one of these folders.")
    return below[0] if below else folder


def markdown(cases: pd.DataFrame, rows: pd.DataFrame, results: list[dict]) -> str:
    """The report; `rows` are those of :func:`difference_rows`."""
    tables = [summary_table(cases), difference_table(rows), cost_table(results)]
    machines = sorted({result["machine"] for result in results})
    commits = sorted({result.get("commit") or "unknown" for result in results})
    variables = {" ".join(f"{k}={v}" for k, v in result.get("environment", {}).items()) for result in results}
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
            "Environment: " + ("; ".join(sorted(variables - {""})) or "nothing noted"),
            "Versions: " + "; ".join(versions),
            "Commits: " + ", ".join(commits),
            f"Seeds: trainings are not seeded, as in nnU-Net; bootstrap {BOOTSTRAP_SEED}.",
            "\n".join(["```bash", *dict.fromkeys(result["command"] for result in results), "```"]),
        ]
    )


def summary_table(cases: pd.DataFrame) -> list[str]:
    lines = ["Mean over cases; ± is the standard deviation over repetitions.", ""]
    lines += table_head("trainer", "class", "repetitions", *METRICS.values())
    for (trainer, name), row in summary(cases).iterrows():
        numbers = [with_spread(row[metric]) for metric in METRICS]
        lines.append(table_row(trainer, name, int(row[("dice", "count")]), *numbers))
    return lines


def difference_table(rows: pd.DataFrame) -> list[str]:
    """Of the mean over classes; differences.csv has each class."""
    if rows.empty:
        return []
    lines = [
        "Paired over cases, each averaged over its repetitions and classes (each class: differences.csv). A repetition "
        "of stock is compared with the others of stock: no trainer needs to be better for differences of that size. "
        f"In each cell: mean (95 % interval); better of all cases; Wilcoxon p. Of fewer than {FEWEST_CASES} cases "
        "there is no interval and no p.",
        "",
    ]
    lines += table_head("trainer minus stock", *METRICS.values())
    for trainer, of_trainer in rows[rows["class"] == "mean"].groupby("trainer", sort=False):
        lines.append(table_row(trainer, *(difference_cell(row) for _, row in of_trainer.iterrows())))
    return lines


def cost_table(results: list[dict]) -> list[str]:
    """Medians over runs; a dash where no run has been measured."""
    about = ["trainer", "machine"]
    costs = pd.DataFrame([{name: result[name] for name in about} | costs_of(result) for result in results])
    lines = [
        "Medians over runs. A step is an epoch's time by its training steps, so its share of the online validation is "
        "in it (scripts/measure/step_time.py of the repository compares steps alone); a prediction is one with "
        f"mirroring. A trainer has learned in the first epoch with a pseudo Dice of {LEARNED} in every class.",
        "",
    ]
    lines += table_head(*costs.columns)
    for key, row in costs.groupby(about).agg(middle).iterrows():
        lines.append(table_row(*key, *map(as_cost, row)))
    return lines


def difference_cell(row: pd.Series) -> str:
    p = "" if np.isnan(row["p"]) else f"; {row['p']:.2g}"
    return f"{with_interval(row)}; {row['better']} of {row['cases']}{p}"


def with_interval(row: pd.Series) -> str:
    interval = "" if np.isnan(row["low"]) else f" ({row['low']:+.2f} to {row['high']:+.2f})"
    return f"{row['mean']:+.2f}{interval}"


def with_spread(values: pd.Series, digits: int = 2) -> str:
    return f"{values['mean']:.{digits}f}" + ("" if np.isnan(values["std"]) else f" ± {values['std']:.{digits}f}")


def as_cost(value: float) -> str:
    if np.isinf(value):
        return "never"
    return "–" if np.isnan(value) else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def table_row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*titles: str) -> list[str]:
    return [table_row(*titles), table_row(*["---"] * len(titles))]
