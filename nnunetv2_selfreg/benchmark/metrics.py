"""Overlap and surface distances of predicted segmentations, for each case and class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from tqdm import tqdm

from nnunetv2_selfreg.benchmark import METRICS
from nnunetv2_selfreg.data.datasets import read_json
from nnunetv2_selfreg.errors import UserError

if find_spec("monai") is None:  # it is imported late, but missed early
    raise ModuleNotFoundError("No module named 'monai'", name="monai")

# MONAI warns of an argument that it passes itself.
warnings.filterwarnings("ignore", r"monai\.metrics\.utils get_mask_edges", FutureWarning)


def mask_metrics(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Dice, Jaccard, 95 % Hausdorff and symmetric average surface distance of two boolean masks of any dimension.

    The 95 % Hausdorff distance is the larger of the two directed 95th percentiles of the distances between the
    surfaces; the average surface distance is over the surface voxels of both. MONAI computes them, in mm.

    Our decision: where one mask is empty both distances are the diagonal of the image, so that a missed structure is
    not left out of a mean; where both are empty nothing can be said, and all are NaN, as nnU-Net's Dice is.
    """
    both, either = np.sum(prediction & reference), np.sum(prediction | reference)
    if either == 0:
        return dict.fromkeys(METRICS, math.nan)
    overlap = {"dice": float(2 * both / (both + either)), "jaccard": float(both / either)}
    masks, spacing = _without_flat_axes([prediction, reference], spacing)
    if not prediction.any() or not reference.any():
        diagonal = math.hypot(*np.multiply(masks[0].shape, spacing))
        return {**overlap, "hd95_mm": diagonal, "asd_mm": diagonal}
    # Imported here, after nnU-Net has looked for trainers: MONAI loads transformers where it is installed. Its modules
    # import others when they are looked at, and nnU-Net's search would end with "dictionary changed size".
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    batch = [mask[None, None] for mask in masks]
    hausdorff = compute_hausdorff_distance(*batch, include_background=True, percentile=95, spacing=spacing)
    average = compute_average_surface_distance(*batch, include_background=True, symmetric=True, spacing=spacing)
    return {**overlap, "hd95_mm": float(hausdorff), "asd_mm": float(average)}


def _without_flat_axes(masks: list[np.ndarray], spacing: Sequence[float]) -> tuple[list[np.ndarray], list[float]]:
    """nnU-Net reads a 2D image with a first axis of one voxel, on which everything would be surface."""
    flat = tuple(axis for axis, length in enumerate(masks[0].shape) if length == 1)
    return [mask.squeeze(flat) for mask in masks], [s for axis, s in enumerate(spacing) if axis not in flat]


def folder_metrics(predictions: Path, references: Path, dataset_json: dict) -> Iterator[dict]:
    """A row for each case and class or region of a folder: `case`, `class` and the METRICS.

    Raises:
        UserError: there is no prediction, or one has no reference or a reference of another shape.
    """
    ending = dataset_json["file_ending"]
    files = sorted(predictions.glob(f"*{ending}"))
    if not files:
        raise UserError(f"{predictions} has no {ending} file. Give a folder of predicted segmentations.")
    reader = determine_reader_writer_from_dataset_json(dataset_json, str(files[0]), verbose=False)()
    classes = {name: label for name, label in dataset_json["labels"].items() if name not in ("background", "ignore")}
    ignored = dataset_json["labels"].get("ignore")
    for file in tqdm(files, desc=predictions.parent.name, disable=None):
        if not (references / file.name).is_file():
            raise UserError(
                f"{file} has no reference {references / file.name}. Give the folder of the references first."
            )
        prediction, _ = reader.read_seg(str(file))
        reference, properties = reader.read_seg(str(references / file.name))
        if prediction.shape != reference.shape:
            shapes = f"{prediction.shape[1:]}, its reference {reference.shape[1:]}"
            raise UserError(f"{file} has the shape {shapes}. Compare segmentations of the same images.")
        prediction[reference == ignored] = 0
        for name, label in classes.items():
            masks = (region_or_label_to_mask(segmentation[0], label) for segmentation in (prediction, reference))
            metrics = mask_metrics(*masks, properties["spacing"])
            yield {"case": file.name.removesuffix(ending), "class": name, **metrics}


def write_metrics(references: Path, predictions: Sequence[Path], description: Path, table: Path) -> None:
    """Writes a CSV with a row for each folder of predictions, case and class; prints the means.

    Args:
        references: for each file of a folder of predictions, one of that name.
        predictions: folders.
        description: the data set's dataset.json.
        table: to be written.

    Raises:
        UserError: as `folder_metrics`, or `description` is not JSON.
    """
    dataset_json = read_json(description)
    if lacking := [name for name in ("file_ending", "labels") if name not in dataset_json]:
        raise UserError(f"{description} has no {' and no '.join(lacking)}. Give the data set's dataset.json.")
    table.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for folder in predictions:
        found = list(folder_metrics(folder, references, dataset_json))
        print_means(folder, found)
        rows += [{"folder": folder, **row} for row in found]
    pd.DataFrame(rows).to_csv(table, index=False)


def print_means(folder: Path, rows: list[dict]) -> None:
    print(f"\n{folder}\n| class | cases | {' | '.join(METRICS.values())} |")
    print(f"| --- | --- |{' --- |' * len(METRICS)}")
    for name in dict.fromkeys(row["class"] for row in rows):
        mine = [row for row in rows if row["class"] == name]
        means = (f"{np.nanmean([row[metric] for row in mine]):.4f}" for metric in METRICS)
        print(f"| {name} | {len(mine)} | {' | '.join(means)} |")
