"""The demo's reading of DATA; `make demo` itself takes minutes and is not run here."""

import json
import sys
from types import SimpleNamespace

import demo
import numpy as np
import phantom
import pytest


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "Dataset012_Mine"
    phantom.write_dataset(folder, train=9, shape=(8, 8, 8))
    return folder


def run_main(monkeypatch, capsys, data, *more):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data", str(data), *more])
    status = demo.main()
    return status, capsys.readouterr().err


def test_cases_of_a_data_set(data):
    cases = demo.raw_cases(data)
    assert len(cases) == 9
    assert cases["phantom_000"]["label"].endswith("labelsTr/phantom_000.nii.gz")


def break_nothing_there(data):
    return data.parent / "nowhere", "no such folder"


def break_name(data):
    return data.rename(data.parent / "mine"), "mine is not a data set's name"


def break_description(data):
    (data / "dataset.json").unlink()
    return data, "dataset.json"


def break_json(data):
    (data / "dataset.json").write_text("{")
    return data, "dataset.json"


def break_channels(data):
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "T1", "1": "T2"}}))
    return data, "case phantom_000 has 1 of 2 channels"


def break_label(data):
    (data / "labelsTr" / "phantom_004.nii.gz").unlink()
    return data, "phantom_004.nii.gz of case phantom_004 is missing"


def break_images(data):
    for image in (data / "imagesTr").iterdir():
        image.unlink()
    return data, "0 training cases"


@pytest.mark.parametrize(
    "damage",
    [
        break_nothing_there,
        break_name,
        break_description,
        break_json,
        break_channels,
        break_label,
        break_images,
    ],
)
def test_what_is_no_data_set_is_one_clear_error(damage, data, monkeypatch, capsys, tmp_path):
    broken, expected = damage(data)
    status, error = run_main(monkeypatch, capsys, broken, "--folder", str(tmp_path / "run"))
    assert status == 2
    assert error.startswith(f"DATA={broken}: ")
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stages(data, tmp_path):
    arguments = SimpleNamespace(data=data, folder=tmp_path / "run", cases=24, epochs=1, iterations=1)
    made = demo.Demo(arguments, demo.raw_cases(data))
    made.make_folder()
    made.write_raw()
    return made


def test_data_set_that_the_demo_would_empty_is_refused(data, monkeypatch, capsys):
    status, error = run_main(monkeypatch, capsys, data, "--folder", str(data.parent))
    assert status == 2
    assert "which the demo would empty" in error
    assert len(demo.raw_cases(data)) == 9


def test_folder_of_somebody_else_is_refused(data, monkeypatch, capsys, tmp_path):
    theirs = tmp_path / "run" / data.name / "thesis.tex"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("")
    status, error = run_main(monkeypatch, capsys, data, "--folder", str(tmp_path / "run"))
    assert status == 2
    assert "is not an earlier demo's" in error
    assert theirs.is_file()


@pytest.mark.parametrize("option", ["--epochs", "--iterations", "--cases"])
def test_too_small_a_number_is_an_error_before_anything_is_made(option, data, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, capsys, data, "--folder", str(tmp_path / "run"), option, "0")
    assert f"{option} must be at least {8 if option == '--cases' else 1}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_interrupt_is_one_line(data, monkeypatch, capsys, tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Demo, "run", interrupted)
    status, error = run_main(monkeypatch, capsys, data, "--folder", str(tmp_path / "run"))
    assert status == 130
    assert error.strip().startswith("Interrupted. What there is stays in")


def test_earlier_demo_is_replaced(stages):
    stages.make_folder()
    assert not stages.raw.exists()


def test_files_named_in_dataset_json_are_linked_under_nnunets_names(data, tmp_path):
    content = json.loads((data / "dataset.json").read_text())
    elsewhere = data / "somewhere"
    elsewhere.mkdir()
    content["dataset"] = {}
    for number, image in enumerate(sorted((data / "imagesTr").iterdir())):
        label = data / "labelsTr" / image.name.replace("_0000", "")
        image.rename(elsewhere / f"scan{number}.nii.gz")
        label.rename(elsewhere / f"mask{number}.nii.gz")
        files = {"images": [f"somewhere/scan{number}.nii.gz"], "label": f"somewhere/mask{number}.nii.gz"}
        content["dataset"][f"case{number}"] = files
    (data / "dataset.json").write_text(json.dumps(content))
    arguments = SimpleNamespace(data=data, folder=tmp_path / "run", cases=24, epochs=1, iterations=1)
    made = demo.Demo(arguments, demo.raw_cases(data))
    made.make_folder()
    made.write_raw()
    assert (made.raw / "imagesTs" / "case8_0000.nii.gz").resolve() == (elsewhere / "scan8.nii.gz").resolve()
    assert (made.raw / "labelsTs" / "case8.nii.gz").is_file()
    assert "dataset" not in made.description


def test_held_out_cases_are_not_among_the_training_cases(stages):
    train, held_out = ({p.name for p in (stages.raw / f"images{part}").iterdir()} for part in ("Tr", "Ts"))
    assert len(train) == 6
    assert held_out == {f"phantom_00{i}_0000.nii.gz" for i in (6, 7, 8)}
    assert stages.description["numTraining"] == 6


def test_large_images_are_coarsened_for_the_cpu(stages, monkeypatch):
    assert stages.coarse_spacing() is None
    monkeypatch.setattr(demo, "CPU_VOXELS", 4**3)
    np.testing.assert_allclose(stages.coarse_spacing(), 2 * np.array(phantom.SPACING), rtol=1e-6)
