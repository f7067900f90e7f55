import json

import numpy as np
import pytest
from phantom import LABELS, phantom, write_dataset
from workspace import read_labels


def test_case_is_deterministic_and_cases_differ():
    image, labels = phantom(3)
    again, labels_again = phantom(3)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert not np.array_equal(image, phantom(4)[0])
    assert not np.array_equal(image, phantom(3, seed=1)[0])


@pytest.mark.parametrize("case", range(6))
def test_every_case_has_both_structures_brighter_than_the_tissue(case):
    image, labels = phantom(case)
    assert set(np.unique(labels)) == set(LABELS.values())
    assert (labels == LABELS["atrium"]).sum() > (labels == LABELS["veins"]).sum() > 100
    assert image[labels > 0].mean() > 1.5 * image[labels == 0].mean()


def test_intensity_alone_does_not_solve_it():
    """The ventricle is as bright: a threshold that takes the atrium takes much background."""
    image, labels = phantom(0)
    bright = image > np.median(image[labels == LABELS["atrium"]])
    assert (bright & (labels == 0)).sum() > 0.2 * bright.sum()


def test_data_set_is_in_nnunets_raw_format(tmp_path):
    folder = tmp_path / "Dataset002_Phantom"
    write_dataset(folder, train=2, test=1, shape=(8, 10, 12))
    content = json.loads((folder / "dataset.json").read_text())
    assert content["numTraining"] == len(list((folder / "imagesTr").iterdir())) == 2
    assert [p.name for p in (folder / "imagesTs").iterdir()] == ["phantom_002_0000.nii.gz"]
    assert read_labels(folder / "labelsTs" / "phantom_002.nii.gz").shape == (8, 10, 12)
