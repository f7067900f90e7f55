"""Contours on slices of a case: of predicted labels, and of the reference where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

REFERENCE, PREDICTION = "#2ca02c", "#e6550d"
COLOURS = {"reference": REFERENCE, "prediction": PREDICTION}


@dataclass(frozen=True)
class Case:
    """A case to draw: arrays of one shape, `(z, y, x)`, or `(1, y, x)` in 2D; spacing in mm in the same order."""

    title: str
    image: np.ndarray
    reference: np.ndarray | None
    prediction: np.ndarray
    spacing: Sequence[float]

    @property
    def label_maps(self) -> dict[str, np.ndarray]:
        """Those that there are, by name."""
        both = {"reference": self.reference, "prediction": self.prediction}
        return {name: label_map for name, label_map in both.items() if label_map is not None}


def contour_figure(cases: Sequence[Case], path: Path, slices: int = 3) -> None:
    """Writes a PNG: a row for each case with `slices` slices that hold the most of its foreground (of its reference's,
    if it has one), from bottom to top, and the contours of every label in the reference (green) and in the prediction
    (orange)."""
    figure = Figure(figsize=(3 * slices, 3.2 * len(cases) + 0.5), dpi=100, layout="constrained")
    grid = figure.subplots(len(cases), slices, squeeze=False)
    for case, row in zip(cases, grid, strict=True):
        for axes in row:
            axes.set_axis_off()
        first = next(iter(case.label_maps.values()))
        for z, axes in zip(_slices_with_foreground(first, slices), row, strict=False):
            _draw_slice(axes, case, z)
        row[0].set_title(case.title, loc="left", fontsize=10)
    names = dict.fromkeys(name for case in cases for name in case.label_maps)
    lines = [Line2D([], [], color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi="figure", format="png")  # whatever the user's matplotlibrc says


def _slices_with_foreground(label_map: np.ndarray, count: int) -> list[int]:
    """Slices spread evenly over those that have at least half of the fullest slice's foreground."""
    area = (label_map > 0).sum((1, 2))
    candidates = np.flatnonzero(area >= area.max() / 2)
    return sorted({int(candidates[i]) for i in np.linspace(0, len(candidates) - 1, count).round().astype(int)})


def _draw_slice(axes, case: Case, z: int) -> None:
    low, high = np.percentile(case.image, (1, 99.5))
    aspect = case.spacing[1] / case.spacing[2]
    axes.imshow(case.image[z], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, origin="lower")
    for name, label_map in case.label_maps.items():
        for label in np.unique(label_map[z]):
            mask = label_map[z] == label
            if label > 0 and not mask.all():
                axes.contour(mask, levels=[0.5], colors=COLOURS[name], linewidths=1.2)
