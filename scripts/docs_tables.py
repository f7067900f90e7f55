"""Writes the tables in docs/ between `<!-- NAME -->` and `<!-- end -->`, from the measurements in docs/results.

python scripts/docs_tables.py
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pandas as pd
from label_efficiency import draw as draw_label_efficiency
from label_efficiency import overall_dice
from label_efficiency import table as label_efficiency
from trials.variants import TRIALS

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
from nnunetv2_selfreg.benchmark.statistics import STOCK, costs_of, difference_rows, middle, read_runs

DOCS = Path(__file__).resolve().parents[1] / "docs"
MEAN_TEACHER = "nnUNetTrainerMeanTeacher"
SELFREG = "nnUNetTrainerSelfReg"
COPY_PASTE = "nnUNetTrainerCopyPaste"


SELF_TRAINING_ENDINGS = ("Mixtures", "Half", "FromTeacher", "Second", "Perfect")


def titles_of(prefix: str, *endings: str) -> dict[str, str]:
    """What the trials of these names are called, by name."""
    return {f"{prefix}{ending}": TRIALS[f"{prefix}{ending}"].title for ending in endings}


# The rows of each page's table, in this order.
SELFREG_TRIALS = {
    STOCK: "stock nnU-Net",
    SELFREG: "default: both terms, 0.015",
    **titles_of(SELFREG, "Tenth", "Strong", "ScrOnly", "IfdOnly", "PaperIFD"),
    **titles_of(SELFREG, "Warm", "Unit", "AllBlocks", "IntoFinal", "StraightPort"),
}
MEAN_TEACHER_TRIALS = {
    STOCK: "stock nnU-Net",
    **titles_of(MEAN_TEACHER, "Weight0"),
    MEAN_TEACHER: "weight 0.1: published, the default",
    **titles_of(MEAN_TEACHER, "Weight1", "Weight10", "Weight100", "Weight1000"),
    **titles_of(MEAN_TEACHER, "NoRamp", "LongRamp", "OneView", "Slow", "Double"),
}
COPY_PASTE_TRIALS = {
    STOCK: "stock nnU-Net",
    **titles_of(STOCK, "Triple"),
    MEAN_TEACHER: "mean teacher",
    COPY_PASTE: "copy-paste, the default",
    **titles_of(COPY_PASTE, "SmallBox", "HalfBox", "LargeBox"),
    **titles_of(COPY_PASTE, "Unlabeled0", "Unlabeled1", "Mixture1", "MixturesOnly"),
    **titles_of(COPY_PASTE, "NoWarmUp", "LongWarmUp", "LabeledOnly", "Unmixed", "NoRamp"),
    **titles_of(COPY_PASTE, "NoTeacher", "Largest", "OneView"),
}
SELF_TRAINING = "nnUNetTrainerSelfTraining"
SELF_TRAINING_TRIALS = {
    STOCK: "stock nnU-Net",
    **titles_of(STOCK, "Triple"),
    "nnUNetTrainerLabeledCopyPaste": "labelled mixtures",
    COPY_PASTE: "copy-paste",
    SELF_TRAINING: "self-training, the teacher copy-paste",
    "nnUNetTrainerSelfTrainingCopyPaste": "self-training with copy-paste, the teacher copy-paste",
    **titles_of(SELF_TRAINING, *SELF_TRAINING_ENDINGS),
}
SELF_TRAINING_PAIR = f"{SELF_TRAINING}Mixtures", "nnUNetTrainerLabeledCopyPaste"
NETWORKS = {
    STOCK: "stock nnU-Net",
    **titles_of(STOCK, "AdamW"),
    **titles_of(STOCK, "UXNetNarrow", "UXNetNarrowFast", "UXNetNarrowSlow", "UXNetNarrowSGD", "SelfRegUXNetNarrow"),
    **titles_of(STOCK, "KMaxUXNetNarrow", "KMaxUXNetNarrowSGD"),
    **titles_of(STOCK, "SwinUNETRNarrow", "SwinUNETRNarrowSGD", "SelfRegSwinUNETRNarrow"),
}
COPY_PASTE_PAIR = COPY_PASTE, "nnUNetTrainerTriple"
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


def of_protocol(name: str) -> str:
    """The report's tables without its rows of trials."""
    cases, results = read_runs(DOCS / "results" / name)
    cases = cases[~cases["trainer"].isin([*TRIALS])]
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


def of_steps(name: str) -> str:
    """Steps of each trainer beside those of stock, not compiled and compiled, as scripts/measure/step_time.py stored
    them: the first row of each file is stock's."""
    folder = DOCS / "results" / name
    files = sorted(folder.glob("*.json"), key=lambda file: (file.stem.startswith("compiled"), file.stem))
    lines = table_head("trainer", "compiled", "step, ms", "stock's, ms", "ratio (quartiles)", "memory, ratio")
    for file in files:
        stock, *rows = json.loads(file.read_text())["rows"]
        for row in rows:
            quartiles = "–".join(f"{value:.2f}" for value in row["ratio_quartiles"])
            times = (f"{1000 * measured['seconds']:.0f}" for measured in (row, stock))
            compiled = "yes" if file.stem.startswith("compiled") else "no"
            ratios = f"{row['ratio']:.2f} ({quartiles})", f"{row['memory_ratio']:.2f}"
            lines.append(table_row(row["trainer"], compiled, *times, *ratios))
    return "\n".join(lines)


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
    return with_interval(found), "–" if pd.isna(found["p"]) else f"{found['p']:.2g}"


PAGES = {
    "results.md": {
        **{name: partial(of_protocol, name) for name in PROTOCOLS},
        "left-atrium-half-h200": partial(
            of_trials, "left-atrium-half-h200", {STOCK: "stock nnU-Net", SELFREG: "SelfReg"}
        ),
        "steps-h200": partial(of_steps, "steps-h200"),
    },
    "selfreg.md": {
        "trials": partial(of_trials, "hippocampus-2d-cpu", SELFREG_TRIALS),
        "trials in 3D": partial(of_trials, "hippocampus-cpu", SELFREG_TRIALS),
    },
    "unlabelled-data.md": {"label efficiency": label_efficiency},
    "mean-teacher.md": {
        "trials": partial(of_trials, "hippocampus-2d-20-cpu", MEAN_TEACHER_TRIALS),
        "trials on the left atrium": partial(of_trials, "left-atrium-8-cpu", MEAN_TEACHER_TRIALS),
    },
    "copy-paste.md": {
        "trials on the left atrium": partial(of_trials, "left-atrium-8-cpu", COPY_PASTE_TRIALS, COPY_PASTE_PAIR),
        "trials": partial(of_trials, "hippocampus-2d-20-cpu", COPY_PASTE_TRIALS, COPY_PASTE_PAIR),
    },
    "self-training.md": {
        "trials": partial(of_trials, "hippocampus-2d-4-short", SELF_TRAINING_TRIALS, SELF_TRAINING_PAIR),
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
    draw_label_efficiency(DOCS / "images" / "label-efficiency.png")


if __name__ == "__main__":
    main()
