"""Writes the tables in docs/ between `<!-- NAME -->` and `<!-- end -->`, from the measurements in docs/results.

python scripts/docs_tables.py
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pandas as pd

from nnunetv2_selfreg.benchmark.report import (
    as_cost,
    cost_table,
    difference_table,
    summary_table,
    table_head,
    table_row,
    with_interval,
    with_spread,
)
from nnunetv2_selfreg.benchmark.statistics import STOCK, costs_of, difference_rows, middle, read_runs, summary

DOCS = Path(__file__).resolve().parents[1] / "docs"
MEAN_TEACHER = "nnUNetTrainerMeanTeacher"
SELFREG = "nnUNetTrainerSelfReg"
COPY_PASTE = "nnUNetTrainerCopyPaste"
# What the trials are called in the docs, in the order of the table.
SELFREG_TRIALS = {
    STOCK: "stock nnU-Net",
    SELFREG: "default: both terms, 0.015",
    f"{SELFREG}Tenth": "both, 0.0015",
    f"{SELFREG}Strong": "both, 0.1",
    f"{SELFREG}ScrOnly": "SCR alone",
    f"{SELFREG}IfdOnly": "IFD alone",
    f"{SELFREG}PaperIFD": "paper's IFD (index order, one way)",
    f"{SELFREG}Warm": "weights ramped up over 40 % of the steps",
    f"{SELFREG}Unit": "every feature map divided by its root mean square",
    f"{SELFREG}AllBlocks": "every convolution block, as released",
    f"{SELFREG}IntoFinal": "SCR's gradient into the last stage too",
    f"{SELFREG}StraightPort": "the straight port that the cost is compared with",
}
MEAN_TEACHER_TRIALS = {
    STOCK: "stock nnU-Net",
    f"{MEAN_TEACHER}Weight0": "weight 0: the average alone",
    MEAN_TEACHER: "weight 0.1: published, the default",
    f"{MEAN_TEACHER}Weight1": "weight 1",
    f"{MEAN_TEACHER}Weight10": "weight 10",
    f"{MEAN_TEACHER}Weight100": "weight 100",
    f"{MEAN_TEACHER}Weight1000": "weight 1000",
    f"{MEAN_TEACHER}NoRamp": "weight 10, no ramp",
    f"{MEAN_TEACHER}LongRamp": "weight 100, ramp to the end, as published",
    f"{MEAN_TEACHER}OneView": "weight 10, the student sees the teacher's view, as published",
    f"{MEAN_TEACHER}Slow": "weight 100, decay 0.999",
    f"{MEAN_TEACHER}Double": "weight 100, twice as many unlabelled samples",
}
COPY_PASTE_TRIALS = {
    STOCK: "stock nnU-Net",
    "nnUNetTrainerTriple": "stock with as many samples a step",
    MEAN_TEACHER: "mean teacher",
    COPY_PASTE: "copy-paste, the default",
    f"{COPY_PASTE}SmallBox": "box of a third of each side",
    f"{COPY_PASTE}HalfBox": "box of half of each side",
    f"{COPY_PASTE}LargeBox": "box of five sixths of each side",
    f"{COPY_PASTE}Unlabeled0": "unlabelled part without weight",
    f"{COPY_PASTE}Unlabeled1": "unlabelled part with weight 1",
    f"{COPY_PASTE}Mixture1": "mixtures with weight 1",
    f"{COPY_PASTE}MixturesOnly": "mixtures alone, with weight 1: two thirds of the samples a step",
    f"{COPY_PASTE}NoWarmUp": "no warm-up",
    f"{COPY_PASTE}LongWarmUp": "warm-up of 40 %, ramp until 70 %",
    f"{COPY_PASTE}LabeledOnly": "warm-up to the end: labelled samples alone",
    f"{COPY_PASTE}Unmixed": "labelled samples alone, repeated instead of mixed",
    f"{COPY_PASTE}NoRamp": "no ramp, as published",
    f"{COPY_PASTE}NoTeacher": "no teacher: the network labels, and predicts",
    f"{COPY_PASTE}OwnLabels": "the network labels, its average predicts",
    f"{COPY_PASTE}Largest": "largest component, as published",
    f"{COPY_PASTE}OneView": "the teacher reads the strong view, as published",
    f"{COPY_PASTE}WeakViews": "unlabelled parts of weak views",
}
NETWORKS = {
    STOCK: "stock nnU-Net",
    "nnUNetTrainerAdamW": "stock network: AdamW, 5e-4",
    "nnUNetTrainerUXNetNarrow": "UX-Net: AdamW, 5e-4 (the default)",
    "nnUNetTrainerUXNetNarrowFast": "UX-Net: AdamW, 2e-3",
    "nnUNetTrainerUXNetNarrowSlow": "UX-Net: AdamW, 1e-4, as published",
    "nnUNetTrainerUXNetNarrowSGD": "UX-Net: nnU-Net's SGD, 1e-2",
    "nnUNetTrainerSelfRegUXNetNarrow": "UX-Net with SelfReg",
    "nnUNetTrainerKMaxUXNetNarrow": "k-means UX-Net: AdamW, 5e-4 (the default)",
    "nnUNetTrainerKMaxUXNetNarrowSGD": "k-means UX-Net: nnU-Net's SGD, 1e-2",
    "nnUNetTrainerSwinUNETRNarrow": "SwinUNETR: AdamW, 5e-4 (the default)",
    "nnUNetTrainerSwinUNETRNarrowSGD": "SwinUNETR: nnU-Net's SGD, 1e-2",
    "nnUNetTrainerSelfRegSwinUNETRNarrow": "SwinUNETR with SelfReg",
}
COPY_PASTE_PAIR = COPY_PASTE, "nnUNetTrainerTriple"
TRIALS = {  # all of them, since they are no rows of results.md
    name
    for file in (Path(__file__).parent / "trials").glob("*.py")
    for name in re.findall(r"^class (nnUNetTrainer\w+)", file.read_text(), re.MULTILINE)
}
MEASURED_TRAINERS = (STOCK, SELFREG, MEAN_TEACHER, COPY_PASTE)
MEASURED = {
    "hippocampus-2d-cpu": "hippocampus in 2D, 5,000 steps",
    "hippocampus-cpu": "hippocampus in 3D, 1,000 steps",
    "hippocampus-2d-20-cpu": "hippocampus in 2D, 20 labelled and 140 unlabelled scans, 5,000 steps",
    "left-atrium-8-cpu": "left atrium, 8 labelled and 56 unlabelled scans, 2,000 steps",
}
PROTOCOLS = ("left-atrium-8-cpu", "hippocampus-cpu", "hippocampus-long", "hippocampus-2d-cpu", "hippocampus-2d-20-cpu")


def filled(text: str, tables: dict[str, str]) -> str:
    """A page with its tables.

    Raises:
        ValueError: the page has no place for one of them, or several.
    """
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"there are {count} places for {name}")
    return text


def page(name: str) -> str:
    """A page of the docs as it should be."""
    return filled((DOCS / name).read_text(), {place: table() for place, table in PAGES[name].items()})


def overall_dice(cases: pd.DataFrame) -> pd.DataFrame:
    """By trainer: of the mean of the classes, or of the only one."""
    return summary(cases)["dice"].groupby("trainer").tail(1).droplevel("class")


def of_protocol(name: str) -> str:
    """The report's tables without its rows of variants."""
    cases, results = read_runs(DOCS / "results" / name)
    cases = cases[~cases["trainer"].isin(TRIALS)]
    results = [result for result in results if result["trainer"] not in TRIALS]
    tables = [summary_table(cases), difference_table(difference_rows(cases)), cost_table(results)]
    return "\n\n".join(map(without_notes, tables))


def without_notes(table: list[str]) -> str:
    """A table of the report without the words around it."""
    return "\n".join(line for line in table if line.startswith("|"))


def of_trials(name: str, titles: dict[str, str], pair: tuple[str, str] | None = None) -> str:
    """A line for each trial that was run, for the difference of a pair of them, and for each run of stock against its
    others."""
    cases, results = read_runs(DOCS / "results" / name)
    dice = overall_dice(cases)
    titles = {trainer: title for trainer, title in titles.items() if trainer in dice.index}
    differences = difference_rows(cases)
    compared = {
        trainer: trainer.replace(STOCK, "stock") + " minus its others"
        for trainer in differences["trainer"].unique()
        if trainer.startswith(f"{STOCK}, ")
    }
    if pair and titles.keys() >= {*pair}:
        trainer, reference = pair
        of_pair = cases[cases["trainer"].isin(pair)]
        of_pair = of_pair.assign(trainer=of_pair["trainer"].map({trainer: "pair", reference: STOCK}))
        compared = {"pair": f"{titles[trainer]} minus {titles[reference]}", **compared}
        differences = pd.concat([differences, difference_rows(of_pair).query("trainer == 'pair'")])
    differences = differences.query("`class` == 'mean'").set_index(["trainer", "metric"])
    lines = table_head(
        "trial",
        "runs",
        "Dice, %",
        "minus stock (95 % interval over cases)",
        "Wilcoxon p",
        "95 % Hausdorff minus stock, mm",
        "learned in epoch",
    )
    for trainer, title in {**titles, **compared}.items():
        learned = [costs_of(result)["learned in epoch"] for result in results if result["trainer"] == trainer]
        lines.append(
            table_row(
                title,
                *(
                    (int(dice.loc[trainer, "count"]), with_spread(dice.loc[trainer]))
                    if trainer in titles
                    else ("–", "–")
                ),
                *_difference(differences, trainer, "Dice"),
                _difference(differences, trainer, "95 % Hausdorff, mm")[0],
                as_cost(middle(pd.Series(learned))) if learned else "–",
            )
        )
    return "\n".join(lines)


def of_costs(name: str, titles: dict[str, str]) -> str:
    """The report's table of costs, for these trainers."""
    _, results = read_runs(DOCS / "results" / name)
    return without_notes(cost_table([result for result in results if result["trainer"] in titles]))


def measured() -> str:
    """The Dice of the trainers that were run several times."""
    lines = table_head("", "stock nnU-Net", *(f"`{trainer}`" for trainer in MEASURED_TRAINERS[1:]))
    for name, title in MEASURED.items():
        dice = overall_dice(read_runs(DOCS / "results" / name)[0])
        numbers = (dice.loc[trainer] if trainer in dice.index else None for trainer in MEASURED_TRAINERS)
        cells = ("–" if row is None else with_spread(row, digits=1) for row in numbers)
        lines.append(table_row(title, *cells))
    return "\n".join(lines)


def _difference(differences: pd.DataFrame, trainer: str, metric: str) -> tuple[str, str]:
    """With its interval, and the p-value."""
    if (trainer, metric) not in differences.index:
        return "–", "–"
    found = differences.loc[trainer, metric]
    return with_interval(found), f"{found['p']:.2g}"


PAGES = {
    "results.md": {name: partial(of_protocol, name) for name in PROTOCOLS},
    "selfreg.md": {
        "trials": partial(of_trials, "hippocampus-2d-cpu", SELFREG_TRIALS),
        "trials in 3D": partial(of_trials, "hippocampus-cpu", SELFREG_TRIALS),
    },
    "unlabelled-data.md": {
        "trials": partial(of_trials, "hippocampus-2d-20-cpu", MEAN_TEACHER_TRIALS),
        "trials on the left atrium": partial(of_trials, "left-atrium-8-cpu", MEAN_TEACHER_TRIALS),
    },
    "copy-paste.md": {
        "trials on the left atrium": partial(of_trials, "left-atrium-8-cpu", COPY_PASTE_TRIALS, COPY_PASTE_PAIR),
        "trials": partial(of_trials, "hippocampus-2d-20-cpu", COPY_PASTE_TRIALS, COPY_PASTE_PAIR),
    },
    "networks.md": {
        "trials": partial(of_trials, "hippocampus-cpu", NETWORKS),
        "costs": partial(of_costs, "hippocampus-cpu", NETWORKS),
        "trials in 2D": partial(of_trials, "hippocampus-2d-cpu", NETWORKS),
        "costs in 2D": partial(of_costs, "hippocampus-2d-cpu", NETWORKS),
    },
    "../README.md": {"measured": measured},
}


def main() -> None:
    for name in PAGES:
        (DOCS / name).write_text(page(name))


if __name__ == "__main__":
    main()
