"""What the runs of a protocol say: tables, the paired differences to stock nnU-Net, and figures.

    python -m nnunetv2_selfreg.benchmark.report runs/left-atrium-8-cpu -o report

Reads `result.json` and `metrics.csv` of each run that `benchmark.py` finished in the folder; these can be kept without
the models. Writes `report.md`, `cases.csv` (every case of every run), `differences.csv` (of each class too),
`differences.png`, `learning_curves.png` and `dice_against_time.png`; where the predictions are still there and the
images in `nnUNet_raw`, also the contours of the best, the median and the worst case, in `contours-TRAINER.png`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from nnunetv2_selfreg.benchmark.figures import (
    draw_contours,
    draw_dice_against_time,
    draw_differences,
    draw_learning_curves,
)
from nnunetv2_selfreg.benchmark.metrics import METRICS
from nnunetv2_selfreg.benchmark.statistics import (
    BOOTSTRAP_SEED,
    LEARNED,
    costs_of,
    difference_rows,
    incomplete_repetitions,
    middle,
    read_runs,
    summary,
)


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
        "In each cell: mean (95 % interval); better of all cases; Wilcoxon p.",
        "",
    ]
    lines += table_head("trainer minus stock", *METRICS.values())
    for trainer, of_trainer in rows[rows["class"] == "mean"].groupby("trainer", sort=False):
        cells = [
            f"{with_interval(row)}; {row['better']} of {row['cases']}; {row['p']:.2g}"
            for _, row in of_trainer.iterrows()
        ]
        lines.append(table_row(trainer, *cells))
    return lines


def cost_table(results: list[dict]) -> list[str]:
    """Medians over runs; a dash where no run has been measured."""
    about = ["trainer", "machine"]
    costs = pd.DataFrame([{name: result[name] for name in about} | costs_of(result) for result in results])
    lines = [
        "Medians over runs. A step is an epoch's time by its training steps, so its share of the online validation is "
        "in it (scripts/step_time.py compares steps alone); a prediction is one with mirroring. A trainer has learned "
        f"in the first epoch with a pseudo Dice of {LEARNED} in every class.",
        "",
    ]
    lines += table_head(*costs.columns)
    for key, row in costs.groupby(about).agg(middle).iterrows():
        lines.append(table_row(*key, *map(as_cost, row)))
    return lines


def with_interval(row: pd.Series) -> str:
    return f"{row['mean']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"


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
