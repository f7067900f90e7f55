"""A protocol on a tiny data set through nnU-Net's commands: prepared, run, skipped, repeated, printed as jobs."""

import csv
import os
import shutil
import sys
from pathlib import Path

import benchmark
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json

SCALE = {
    "plans": "nnUNetPlans",
    "configuration": "3d_tiny",
    "inherits_from": "3d_fullres",
    "batch_size": 3,
    "features_per_stage": [2, 4, 4],
    "epochs": 1,
    "iterations": 1,
}


@pytest.fixture
def protocol(data_sets, tmp_path, monkeypatch):
    """A protocol with a split of its own, on a copy of the preprocessed data set."""
    name = data_sets.name("labels")
    shutil.copytree(Path(os.environ["nnUNet_preprocessed"]) / name, tmp_path / "preprocessed" / name)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    plans = load_json(str(tmp_path / "preprocessed" / name / "nnUNetPlans.json"))
    stages = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_stages"]
    scale = {**SCALE, "features_per_stage": [2] * stages}
    content = {"dataset": name, "split": {"labeled": 2, "val": 1, "in_order": True}, "scales": {"cpu": scale}}
    (tmp_path / "protocols").mkdir()
    save_json(content, str(tmp_path / "protocols" / "tiny.json"))
    monkeypatch.setattr(benchmark, "PROTOCOLS", tmp_path / "protocols")
    return tmp_path


def run(monkeypatch, folder: Path, *options: str) -> int:
    arguments = ["benchmark.py", "tiny", "-o", str(folder / "runs"), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    return benchmark.main()


def test_run_is_measured_and_skipped_the_next_time(protocol, monkeypatch, capsys):
    assert run(monkeypatch, protocol) == 0
    folder = protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-1"
    result = load_json(str(folder / "result.json"))
    assert result["parameters"] > 0
    assert len(result["curves"]["train_losses"]) == 1
    assert "nnUNetTrainer_1epochs_1iters" in result["command"]
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (data_set,) = (protocol / "preprocessed").iterdir()
    splits = load_json(str(data_set / "splits_final.json"))
    assert [len(splits[2][part]) for part in ("train", "val")] == [2, 1]
    assert {row["case"] for row in rows} == set(splits[2]["val"])
    plans = load_json(str(data_set / "nnUNetPlans.json"))["configurations"]["3d_tiny"]
    assert (plans["batch_size"], plans["inherits_from"]) == (3, "3d_fullres")

    before = (folder / "result.json").stat().st_mtime_ns
    assert run(monkeypatch, protocol) == 0
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert len(load_json(str(data_set / "splits_final.json"))) == 3


def test_failed_run_is_reported_and_the_status_tells(protocol, monkeypatch, capsys):
    assert run(monkeypatch, protocol, "-tr", "nnUNetTrainerUnknown") == 1
    error = capsys.readouterr().err
    assert "nnUNetTrainerUnknown-fold2-1: nnUNetv2_train" in error
    assert not list(protocol.rglob("result.json"))


def test_jobs_are_one_command_for_each_unfinished_run(protocol, monkeypatch, capsys):
    finished = protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-1"
    finished.mkdir(parents=True)
    (finished / "result.json").touch()
    assert (
        run(monkeypatch, protocol, "-tr", "nnUNetTrainer", "nnUNetTrainerSelfReg", "--repetitions", "2", "--jobs") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    start = f"python scripts/benchmark.py tiny -o {protocol / 'runs'} -device cpu -tr"
    assert lines[0] == f"{start} nnUNetTrainerSelfReg -f 2 --only 1 --scale cpu"
    assert lines[1] == f"{start} nnUNetTrainer -f 2 --only 2 --scale cpu"


@pytest.mark.parametrize(
    ("options", "reason"), [(["nothing"], "there is no protocol nothing"), (["tiny", "--scale", "x"], "has no scale x")]
)
def test_unknown_protocol_names_what_there_is(options, reason, protocol, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options, "-o", "runs"])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert reason in capsys.readouterr().err


def test_protocols_of_the_repository_load():
    for name in benchmark.protocol_names():
        assert benchmark.Protocol.load(name, "cpu").epochs > 0
