"""The numbers against a comparison of every pair of surface voxels, the tables against nnU-Net's own evaluation."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_json
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2
from scipy.ndimage import binary_erosion
from workspace import Run

from nnunetv2_selfreg import cli
from nnunetv2_selfreg.benchmark.metrics import folder_metrics, mask_metrics
from nnunetv2_selfreg.errors import UserError


def by_all_pairs(prediction, reference, spacing) -> tuple[float, float]:
    """95 % Hausdorff and average surface distance."""
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing) for mask in (prediction, reference)]
    distances = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=-1)
    there, back = distances.min(1), distances.min(0)
    return max(np.percentile(there, 95), np.percentile(back, 95)), np.concatenate((there, back)).mean()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(7, 9), (5, 8, 6), (1, 7, 8)]))
def test_distances_in_mm_equal_all_pairs(seed, shape):
    generator = np.random.default_rng(seed)
    spacing = generator.uniform(0.5, 3, len(shape))
    prediction, reference = generator.random((2, *shape)) > generator.uniform(0.2, 0.9)
    prediction[(0, *[2] * (len(shape) - 1))] = reference[(0, *[4] * (len(shape) - 1))] = True
    metrics = mask_metrics(prediction, reference, spacing)
    flat = (prediction[0], reference[0], spacing[1:]) if shape[0] == 1 else (prediction, reference, spacing)
    np.testing.assert_allclose([metrics["hd95_mm"], metrics["asd_mm"]], by_all_pairs(*flat), rtol=1e-5)


@pytest.mark.parametrize(("shape", "spacing"), [((3, 4), (2, 2)), ((1, 3, 4), (999, 2, 2))])
def test_a_missed_structure_counts_with_the_diagonal_and_nothing_at_all_with_nan(shape, spacing):
    mask = np.zeros(shape, bool)
    nothing = mask_metrics(mask, mask, spacing)
    assert all(math.isnan(value) for value in nothing.values())
    one = mask.copy()
    one[..., 1, 1] = True
    for pair in ((mask, one), (one, mask)):
        missed = mask_metrics(*pair, spacing)
        assert missed == {"dice": 0, "jaccard": 0, "hd95_mm": 10, "asd_mm": 10}


@pytest.mark.parametrize("variant", ["labels", "regions", "regions_ignore"])
def test_table_has_nnunets_own_dice(variant, data_sets, tmp_path, capsys):
    raw = Run(data_sets.name(variant), "3d_fullres", "nnUNetTrainer").raw
    predictions, references, description = tmp_path / "predictions", raw / "labelsTr", raw / "dataset.json"
    predictions.mkdir()
    for file in sorted(references.iterdir())[:3]:
        image = sitk.ReadImage(str(file))
        sitk.WriteImage(sitk.CyclicShift(image, [2, 1, 0]), str(predictions / file.name))
    plans = Path(os.environ["nnUNet_preprocessed"], raw.name, "nnUNetPlans.json")
    summary = tmp_path / "summary.json"
    compute_metrics_on_folder2(*map(str, (references, predictions, description, plans, summary)), chill=True)
    cases = load_json(str(summary))["metric_per_case"]
    theirs = [metrics["Dice"] for case in cases for metrics in case["metrics"].values()]

    table = tmp_path / "new" / "metrics.csv"
    arguments = [str(references), str(predictions), "-djfile", str(description), "-o", str(table)]
    assert cli.main(["benchmark", "metrics", *arguments]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["dice"]) for row in rows], theirs, rtol=1e-6)
    assert min(theirs) < 0.99
    assert "95 % Hausdorff, mm" in capsys.readouterr().out


def test_prediction_without_reference_and_empty_folder_are_named(tmp_path):
    dataset_json = {"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    with pytest.raises(UserError, match=str(tmp_path)):
        next(folder_metrics(tmp_path, tmp_path, dataset_json))
