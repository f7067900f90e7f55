"""`nnUNetv2_selfreg pseudo_label` as it is typed."""

import os
import re
import shutil
from pathlib import Path

import pytest
from workspace import Run

from nnunetv2_selfreg import cli

NAME = "nnUNetTrainer_1epochs_2iters"


@pytest.fixture
def run(data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    run = Run(data_sets.name("labels"), "2d", NAME)
    yield run
    for made in Path(os.environ["nnUNet_preprocessed"], run.data_set).glob("*_pseudo_labels"):
        shutil.rmtree(made)


def words(run: Run, *further: str) -> list[str]:
    dataset = str(int(run.data_set[7:10]))
    return ["pseudo_label", "-d", dataset, "-c", "2d", "-f", "0", "-tr", NAME, "-device", "cpu", *further]


def test_labels_then_tells_how_to_train(run, capsys):
    run.build().run_training()
    capsys.readouterr()
    assert cli.main(words(run, "--overview", "--keep_empty", "--drop", "0.5")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"2 of 2 cases are labelled in \S+nnUNetPlans_2d_pseudo_labels/fold_0\.\n", printed)
    assert re.search(r"Left out for disagreement: 1, phantom_00\d\.\n", printed)
    assert re.search(r"Disagreement: median [\d.]+, from [\d.]+ to [\d.]+\.\n", printed)
    assert "overview.png" in printed
    assert printed.endswith("Next: nnUNetv2_train 901 2d 0 -tr nnUNetTrainerSelfTraining\n")
    assert "Inspecting module" not in printed


def test_other_set_needs_a_trainer_that_reads_it(run, capsys):
    run.build().run_training()
    assert cli.main(words(run, "--name", "second", "--keep_empty")) == 0
    assert "-tr a trainer of yours with pseudo_label_set = 'second'" in capsys.readouterr().out


def test_part_without_a_share_tells_nothing_of_disagreement(run, capsys):
    run.build().run_training()
    capsys.readouterr()
    assert cli.main(words(run, "--overview", "-num_parts", "3", "-part_id", "2", "--name", "third")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("0 of 2 cases are labelled")
    assert "Disagreement" not in printed
    assert printed.endswith("The other cases are left: run the other parts, or this command again.\n")


WRONG = [
    (["-num_parts", "2", "-part_id", "2"], "-part_id 2 of -num_parts 2: give 0 to one less than that."),
    (["-device", "cuda"], "There is no CUDA GPU here. Give -device cpu, or mend the driver."),
    ([], "There is no trained model "),
    (["-d", "905"], "There is no data set 905"),
    (["-c", "3d"], "-c 3d: "),
]


@pytest.mark.parametrize(("further", "message"), WRONG)
def test_mistake_ends_with_one_line_and_status_2(further, message, run, capsys):
    assert cli.main(words(run, *further)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nnUNetv2_selfreg: {message}")
    assert error.count("\n") == 1


def test_teacher_has_to_be_named(run, capsys):
    assert cli.main(["pseudo_label", "-d", "901", "-c", "2d", "-f", "0", "-device", "cpu"]) == 2
    assert "No teacher is given. Name its trainer with -tr" in capsys.readouterr().err


def test_fold_is_a_number_or_all(run, capsys):
    with pytest.raises(SystemExit):
        cli.main(words(run, "-f", "first"))
    assert "first is no fold: give its number, or all" in capsys.readouterr().err
