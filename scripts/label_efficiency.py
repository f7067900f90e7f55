"""Draws docs/images/label-efficiency.png, Dice over the number of labelled scans, from the runs in docs/results.

python scripts/label_efficiency.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nnunetv2_selfreg.benchmark.report import table_head, table_row, with_spread
from nnunetv2_selfreg.benchmark.statistics import STOCK, read_runs, summary

DOCS = Path(__file__).resolve().parents[1] / "docs"
CURVES = {
    "hippocampus in 2D, 160 scans": {
        4: "hippocampus-2d-4-short",
        8: "hippocampus-2d-8-short",
        20: "hippocampus-2d-20-short",
        160: "hippocampus-2d-160-short",
    },
    "left atrium at 2.5 mm, 64 scans": {
        4: "left-atrium-4-cpu",
        8: "left-atrium-8-cpu",
        16: "left-atrium-16-cpu",
        64: "left-atrium-64-cpu",
    },
}
"""Protocols by the number of labelled scans, for each data set; the other scans are unlabelled."""
TRAINERS = {
    STOCK: ("stock nnU-Net", "#555555"),
    "nnUNetTrainerTriple": ("stock, three times the samples a step", "#aaaaaa"),
    "nnUNetTrainerLabeledCopyPaste": ("labelled mixtures", "#1f77b4"),
    "nnUNetTrainerCopyPaste": ("copy-paste with unlabelled scans", "#2ca02c"),
    "nnUNetTrainerSelfTrainingMixtures": ("self-training, its teacher labelled mixtures", "#e6550d"),
}
"""Title and colour of each line."""


def curve_of(protocols: dict[int, str]) -> pd.DataFrame:
    """Dice in percent by trainer and number of labelled scans: `mean`, `std` and `count` of the repetitions of the mean
    over cases and classes. Protocols that were not run are left out."""
    folders = {labeled: DOCS / "results" / name for labeled, name in protocols.items()}
    tables = {labeled: overall_dice(read_runs(folder)[0]) for labeled, folder in folders.items() if folder.is_dir()}
    curve = pd.concat(tables, names=["labeled"]).swaplevel()
    return curve[curve.index.get_level_values("trainer").isin([*TRAINERS])]


def overall_dice(cases: pd.DataFrame) -> pd.DataFrame:
    """By trainer: of the mean of the classes, or of the only one."""
    return summary(cases)["dice"].groupby("trainer").tail(1).droplevel("class")


def draw(file: Path) -> None:
    """A panel for each data set, a line for each trainer, bars of a standard deviation over repetitions."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    for axes, (title, protocols) in zip(figure.subplots(1, len(CURVES), squeeze=False)[0], CURVES.items(), strict=True):
        _draw_panel(axes, curve_of(protocols), title, [*protocols])
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=130)


def _draw_panel(axes: Axes, curve: pd.DataFrame, title: str, ticks: list[int]) -> None:
    for trainer, (name, color) in TRAINERS.items():
        if trainer in curve.index:
            line = curve.loc[trainer].sort_index()
            axes.errorbar(line.index, line["mean"], line["std"], color=color, marker="o", capsize=3, label=name)
    axes.set(title=title, xscale="log", xlabel="labelled scans", ylabel="Dice, %", xticks=ticks, xticklabels=ticks)
    axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)


def table() -> str:
    """The numbers of the picture, a row for each number of labelled scans, runs in brackets."""
    lines = table_head("data set", "labelled", *(name for name, _ in TRAINERS.values()))
    for title, protocols in CURVES.items():
        curve = curve_of(protocols)
        for labeled in protocols:
            rows = [curve.loc[key] if (key := (trainer, labeled)) in curve.index else None for trainer in TRAINERS]
            cells = ("–" if row is None else f"{with_spread(row)} ({row['count']:.0f})" for row in rows)
            if any(row is not None for row in rows):
                lines.append(table_row(title.partition(",")[0], labeled, *cells))
    return "\n".join(lines)


if __name__ == "__main__":
    draw(DOCS / "images" / "label-efficiency.png")
