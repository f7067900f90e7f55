"""The panel that shows the terms of the loss below nnU-Net's own panels of `progress.png`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from nnunetv2_selfreg.files import replacing

WIDTH, HEIGHT = 30, 18  # inches at 100 dpi: one panel of nnU-Net's figure
LEGEND_COLUMNS = 3


def add_terms_panel(output_folder: str, curves: dict[str, list[float]]) -> None:
    """Appends a panel with `curves`, one value an epoch, to the `progress.png` that nnU-Net just wrote in the folder.

    nnU-Net draws and saves its figure in one function, so the panel is pasted below. Nothing happens without curves or
    without that file, as with trainers that draw nothing.
    """
    path = Path(output_folder) / "progress.png"
    if not curves or not path.is_file():
        return
    panel = _panel(curves)
    with Image.open(path) as figure:
        combined = Image.new("RGB", (figure.width, figure.height + panel.height), "white")
        combined.paste(figure.convert("RGB"), (0, 0))
    combined.paste(panel, (0, combined.height - panel.height))
    with replacing(path) as part:
        combined.save(part, format="PNG", compress_level=1)  # the default level would take a second of every epoch


def _panel(curves: dict[str, list[float]]) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global figure is left open

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=100)
    rows = -(-len(curves) // LEGEND_COLUMNS)
    # Above it is the legend. A layout that adapts would draw everything twice.
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.08, top=0.98 - 0.04 * rows)
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(range(len(values)), values, linewidth=4, label=name)
    axes.set(xlabel="epoch", ylabel="terms of the training loss, without their weights")
    axes.legend(loc=(0, 1), ncols=LEGEND_COLUMNS)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
