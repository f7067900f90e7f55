"""Pseudo-labels as a picture: people look before they trust."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunetv2_selfreg.analysis.contours import Case, contour_figure
from nnunetv2_selfreg.data.pseudo_labels import OVERVIEW, Description
from nnunetv2_selfreg.data.storage import open_array
from nnunetv2_selfreg.files import replacing
from nnunetv2_selfreg.labeling.label import Job

ROWS = 3  # of the most and of the least disputed cases


def draw_overview(job: Job, description: Description) -> Path:
    """Writes a picture beside the labels: the cases with the largest disagreement, then those with the smallest.

    Returns:
        The file.
    """
    known = {case: value for case, value in description.disagreement.items() if value is not None}
    ranked = sorted(known or description.disagreement, key=lambda case: (-(known.get(case) or 0), case))
    shown = dict.fromkeys([*ranked[:ROWS], *ranked[-ROWS:]])
    file = job.folder / OVERVIEW
    with replacing(file) as part:
        contour_figure([_drawn(job, description, case) for case in shown], part)
    return file


def _drawn(job: Job, description: Description, case: str) -> Case:
    value, reason = description.disagreement[case], description.dropped.get(case)
    title = f"{case}: disagreement {'unknown' if value is None else f'{value:.3f}'}"
    image = np.asarray(job.pool.load_image(case)[0])
    labels = open_array(job.folder / f"{case}.b2nd")[0]
    spacing = [1.0, *job.configuration.spacing][-3:]  # in 2D the slices stand apart
    return Case(title + (f", left out: {reason}" if reason else ""), image, None, labels, spacing)
