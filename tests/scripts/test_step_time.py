"""The benchmark runs and its arithmetic is right; how long a step takes is not tested."""

import json
import sys

import step_time


def test_table_of_stock_ours_and_the_straight_port(data_sets, tmp_path, monkeypatch, capsys):
    trainers = ["nnUNetTrainer", "nnUNetTrainerSelfReg", "nnUNetTrainerSelfRegStraightPort"]
    output = tmp_path / "table.json"
    arguments = [data_sets.name("labels"), "3d_fullres", "-tr", *trainers, "-device", "cpu", "--rounds", "3"]
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "untouched"))
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments, "-o", str(output)])
    step_time.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["trainer"] for row in rows] == trainers
    assert rows[0]["ratio"] == rows[0]["memory_ratio"] == 1
    assert all(row["seconds"] > 0 and row["memory_mib"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| nnUNetTrainer") == 3
    assert not (tmp_path / "untouched").exists()


def test_ratio_is_taken_round_by_round():
    """The machine slows down threefold; the ratio of neighbours does not notice."""
    rows = step_time.summary({"a": [1.0, 3.0, 3.0], "b": [1.5, 4.5, 4.5]}, {"a": 100, "b": 110})
    assert rows[1]["ratio"] == 1.5
    assert rows[1]["seconds"] == 4.5
    assert rows[1]["memory_ratio"] == 1.1
