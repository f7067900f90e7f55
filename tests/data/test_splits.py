"""`nnUNetv2_selfreg split`."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from batchgenerators.utilities.file_and_folder_operations import save_json
from hypothesis import given
from hypothesis import strategies as st
from workspace import Run

from nnunetv2_selfreg import cli
from nnunetv2_selfreg.data.splits import check_fold, near_misses, new_fold
from nnunetv2_selfreg.errors import UserError

CASES = [f"case_{i:02d}" for i in range(20)]


@st.composite
def sizes(draw):
    cases = draw(st.lists(st.text(min_size=1), min_size=2, max_size=40, unique=True))
    labeled = draw(st.integers(1, len(cases) - 1))
    return cases, labeled, draw(st.integers(1, len(cases) - labeled))


@given(sizes(), st.integers(), st.booleans())
def test_fold_divides_all_cases_in_the_sizes_asked_for(sizes, seed, in_order):
    cases, labeled, val = sizes
    fold = new_fold(cases, labeled, val, seed, in_order)
    assert (len(fold["train"]), len(fold["val"])) == (labeled, val)
    assert sorted(fold["train"] + fold["unlabeled"] + fold["val"]) == sorted(cases)  # complete, so disjoint
    assert all(part == sorted(part) for part in fold.values())
    assert fold == new_fold(cases[::-1], labeled, val, seed, in_order)


@given(st.integers(1, 15), st.integers(1, 15), st.integers())
def test_folds_of_a_seed_differ_in_the_number_of_labels_only(one, other, seed):
    few, many = (new_fold(CASES, labeled, 5, seed) for labeled in sorted((one, other)))
    assert few["val"] == many["val"]
    assert set(few["train"]) <= set(many["train"])


def test_seeds_differ():
    assert new_fold(CASES, 8, seed=0) != new_fold(CASES, 8, seed=1)


def test_in_order_the_first_are_labelled_and_the_last_validate():
    fold = new_fold(CASES[::-1], 8, 4, in_order=True)
    assert fold == {"train": CASES[:8], "unlabeled": CASES[8:16], "val": CASES[16:]}


@pytest.mark.parametrize(("labeled", "number"), [(0.1, 2), (0.01, 1), (0.5, 10), (16, 16)])
def test_fraction_is_rounded_to_at_least_one_case_and_a_fifth_validates(labeled, number):
    fold = new_fold(CASES, labeled)
    assert (len(fold["train"]), len(fold["val"])) == (number, 4)


@pytest.mark.parametrize("size", [0, -1, 21, 0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["labeled", "val"])
def test_impossible_size(option, size):
    with pytest.raises(UserError, match=rf"^--{option} {size} is .* Give"):
        new_fold(CASES, **{"labeled": 1, "val": 1, option: size})


def test_more_labelled_and_validating_than_there_are():
    with pytest.raises(UserError, match=r"--labeled 17 and --val 0\.2 are 17 \+ 4 cases, .* only 20"):
        new_fold(CASES, 17)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of six cases as far as `split` looks: descriptions and labels, no splits yet."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    folder = tmp_path / "Dataset005_Few"
    (folder / "gt_segmentations").mkdir(parents=True)
    save_json({"file_ending": ".nii.gz"}, str(folder / "dataset.json"))
    for case in CASES[:6]:
        (folder / "gt_segmentations" / f"{case}.nii.gz").touch()
    return folder


def read(folder: Path) -> list:
    return json.loads((folder / "splits_final.json").read_text())


def test_fold_is_appended_and_the_lines_to_train_are_printed(folder, capsys):
    own = [{"train": ["b", "a"], "val": ["c"], "remark": "kept"}, {"train": [], "val": []}]
    save_json(own, str(folder / "splits_final.json"))
    assert cli.main(["split", "-d", "5", "--labeled", "2", "--val", "1", "--sorted"]) == 0
    assert read(folder) == [*own, {"train": CASES[:2], "unlabeled": CASES[2:5], "val": CASES[5:6]}]
    printed = capsys.readouterr().out
    assert printed.startswith("Fold 2: 2 labelled, 3 unlabelled, 1 for validation")
    for trainer in ("nnUNetTrainer", "nnUNetTrainerCopyPaste"):
        assert f"nnUNetv2_train 5 3d_fullres 2 -tr {trainer}\n" in printed
    assert cli.main(["split", "-d", folder.name, "--labeled", "0.5", "--seed", "3"]) == 0
    assert read(folder)[:2] == own
    assert read(folder)[3] == new_fold(CASES[:6], 3, 1, seed=3)
    assert sorted(os.listdir(folder)) == ["dataset.json", "gt_segmentations", "splits_final.json"]


def test_first_come_the_five_folds_that_nnunet_makes(data_sets, tmp_path, monkeypatch):
    name = data_sets.name("labels")
    shutil.copytree(Path(os.environ["nnUNet_preprocessed"]) / name, tmp_path / name)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    file = tmp_path / name / "splits_final.json"
    file.unlink()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    Run(name, "2d", "nnUNetTrainer").build().do_split()
    nnunets = file.read_bytes()
    file.unlink()
    assert cli.main(["split", "-d", name, "--labeled", "2"]) == 0
    folds = read(tmp_path / name)
    assert folds[:5] == json.loads(nnunets)
    assert Run(name, "2d", "nnUNetTrainer", 5).build().do_split() == (folds[5]["train"], folds[5]["val"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[{", "is not JSON"),
        ("", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("{}", "is not a list of folds"),
        ("null", "is not a list of folds"),
        ('[{"train": [], "val": []}, {"train": []}]', "fold 1 has no lists 'train' and 'val'"),
        ('["train", "val"]', "fold 0 has no lists"),
        ('[{"train": [], "val": [], "unlabeled": null}]', "'unlabeled' of fold 0 is not a list of identifiers"),
        ('[{"train": [], "val": [], "unlabeled": "case"}]', "'unlabeled' of fold 0 is not a list of identifiers"),
    ],
)
def test_corrupt_file_is_left_as_it_is(folder, capsys, content, reason):
    file = folder / "splits_final.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    before = file.read_bytes()
    error = error_of(capsys, "split", "-d", "5", "--labeled", "2")
    assert str(file) in error
    assert reason in error
    assert "restore it" in error
    assert file.read_bytes() == before
    assert "splits_final.json.part" not in os.listdir(folder)


@pytest.mark.parametrize("labeled", ["0", "-1", "7", "6", "-0.5", "1.0"])
def test_impossible_size_writes_nothing(folder, capsys, labeled):
    error = error_of(capsys, "split", "-d", "5", "--labeled", labeled)
    assert f"Dataset005_Few: --labeled {labeled} " in error
    assert not (folder / "splits_final.json").exists()


@pytest.mark.parametrize("size", ["abc", "0,1"])
def test_size_that_is_no_number(size, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["split", "-d", "5", "--labeled", size])
    assert f"--labeled: {size} is no number: give one of cases, as 8, or a fraction" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["6", "Missing", "Dataset006_Missing", "-1"])
def test_unknown_data_set(folder, capsys, dataset):
    error = error_of(capsys, "split", f"-d={dataset}", "--labeled", "2")
    assert f"There is no data set {dataset} in nnUNet_raw" in error
    assert re.search(r"There are Dataset005_Few(, Dataset9\d\d_\w+)*: give the number or the name of one\.$", error)


@pytest.mark.parametrize("dataset", ["Few", "few", "Dataset05_Few", "Dataset005_few", "Dataset005_Fewer"])
def test_nearly_right_name_of_a_data_set(folder, capsys, dataset):
    error = error_of(capsys, "split", "-d", dataset, "--labeled", "2")
    assert error.endswith(f"There is no data set {dataset}. Give the whole name: is it Dataset005_Few?\n")


@pytest.mark.parametrize("name", ["Dataset1000_Big", "Dataset12_Short", "Dataset013"])
def test_unusual_names_that_are_there(name, folder, capsys):
    folder.rename(folder.with_name(name))
    number = name[7:].partition("_")[0]
    for argument in (name, number)[: 1 + ("_" in name)]:
        assert cli.main(["split", "-d", argument, "--labeled", "2"]) == 0


def test_two_data_sets_of_one_number(folder, capsys):
    folder.with_name("Dataset005_Other").mkdir()
    error = error_of(capsys, "split", "-d", "005", "--labeled", "2")
    assert error.endswith("Give the whole name: is it Dataset005_Few or Dataset005_Other?\n")


def test_fold_without_unlabelled_cases_says_what_is_missing(folder, capsys):
    assert cli.main(["split", "-d", "5", "--labeled", "5", "--val", "1"]) == 0
    assert "nnUNetTrainerCopyPaste    (after nnUNetv2_selfreg preprocess_unlabeled)" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["dataset.json", "gt_segmentations"])
def test_data_set_that_is_not_preprocessed(folder, capsys, missing):
    (folder / missing).rename(folder / "elsewhere")
    error = error_of(capsys, "split", "-d", "5", "--labeled", "2")
    assert str(folder) in error
    assert ("nnUNetv2_plan_and_preprocess" if missing == "dataset.json" else "nnUNetv2_preprocess for -d 5") in error


def test_data_set_without_labels(folder, capsys):
    shutil.rmtree(folder / "gt_segmentations")
    (folder / "gt_segmentations").mkdir()
    assert "has no .nii.gz file" in error_of(capsys, "split", "-d", "5", "--labeled", "2")


def test_with_too_few_cases_for_nnunets_five_folds_it_is_the_first(folder, capsys):
    for case in CASES[:4]:
        (folder / "gt_segmentations" / f"{case}.nii.gz").unlink()
    assert cli.main(["split", "-d", "5", "--labeled", "1", "--val", "1", "--sorted"]) == 0
    assert read(folder) == [{"train": [CASES[4]], "unlabeled": [], "val": [CASES[5]]}]
    assert capsys.readouterr().out.startswith("Fold 0: 1 labelled, 0 unlabelled, 1 for validation")


def test_the_same_fold_again_is_named_and_not_appended(folder, capsys):
    for start in ("Fold 5: ", "Fold 5 (there already): "):
        assert cli.main(["split", "-d", "5", "--labeled", "2"]) == 0
        assert capsys.readouterr().out.startswith(start + "2 labelled")
        assert len(read(folder)) == 6


def test_printed_lines_can_be_pasted_into_a_shell(folder, capsys):
    folder.rename(folder.with_name("Dataset005_Few (new)"))
    assert cli.main(["split", "-d", "Dataset005_Few (new)", "--labeled", "2"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "nnUNetTrainerCopyPaste" in line)
    assert shlex.split(line)[1:3] == ["nnUNetv2_train", "Dataset005_Few (new)"]


def test_folder_variable_that_is_not_set(capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed" in error_of(capsys, "split", "-d", "Dataset005_Few", "--labeled", "2")


def test_too_few_cases_for_nnunets_folds_is_said_before_it_fails(tmp_path):
    with pytest.raises(
        UserError, match=r"2 cases are too few for nnU-Net's five folds. Make a fold with nnUNetv2_selfr"
    ):
        check_fold(tmp_path / "splits_final.json", 0, CASES[:2])
    check_fold(tmp_path / "splits_final.json", 4, CASES[:5])


def test_near_misses_of_many_cases_take_no_time():
    missing = [f"scan_{number:05d}" for number in range(5000)]
    there = [f"{number:05d}_mri" for number in range(5000)]
    assert near_misses(missing, there) == ""
    assert near_misses(["00003_mri_0000.nii.gz"], there) == " Is 00003_mri meant by 00003_mri_0000.nii.gz?"


def error_of(capsys, *arguments: str) -> str:
    """What a command says that ends with status 2: a line."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err
