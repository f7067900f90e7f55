"""How good pseudo-labels are, and the set of a perfect teacher."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pseudo_labels
import pytest
from workspace import Run, write_pseudo_labels

from nnunetv2_selfreg.data.storage import open_array


def test_dice_by_hand():
    labels, reference = np.array([0, 1, 1, 2, 2]), np.array([0, 1, 2, 2, 2])
    assert pseudo_labels.dice(labels, reference) == pytest.approx((2 * 1 / 3 + 2 * 2 / 5) / 2)
    assert pseudo_labels.dice(reference, reference) == 1
    assert np.isnan(pseudo_labels.dice(0 * labels, 0 * reference))


@pytest.fixture
def run(data_sets, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    trials = Path(pseudo_labels.__file__).parents[1] / "trials"
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([os.environ["nnUNet_extTrainer"], str(trials)]))
    run = Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerSelfTrainingPerfect")
    yield run
    shutil.rmtree(write_pseudo_labels(run).parent)


def call(monkeypatch, what: str, *further: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pseudo_labels.py", what, "-d", "901", "-c", "3d_fullres", "-f", "0", *further])
    assert pseudo_labels.main() == 0


def test_perfect_labels_are_the_real_ones(run, monkeypatch, capsys):
    call(monkeypatch, "perfect")
    folder = Path(run.build().preprocessed_dataset_folder)
    made = folder.with_name(f"{folder.name}_pseudo_labels") / "fold_0_perfect" / "phantom_003.b2nd"
    np.testing.assert_array_equal(open_array(made)[:], open_array(folder / "phantom_003_seg.b2nd")[:])
    call(monkeypatch, "dice", "--name", "perfect")
    assert "all: 1 cases, Dice 100.00" in capsys.readouterr().out


def test_student_takes_the_perfect_labels(run, monkeypatch):
    call(monkeypatch, "perfect")
    trainer = run.build()
    trainer.initialize()
    find = trainer.unlabeled_pool
    trainer.unlabeled_pool = lambda: pool_of_listed(find())  # those of preprocess_unlabeled have no labels
    trainer.get_dataloaders()
    assert "1 unlabelled cases with labels of reference (fold all)" in Path(trainer.log_file).read_text()


def pool_of_listed(pool):
    pool.identifiers = ["phantom_003"]
    return pool
