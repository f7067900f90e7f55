"""The picture of Dice over labelled scans."""

import label_efficiency
import pandas as pd
import pytest


@pytest.fixture
def curve(monkeypatch):
    index = pd.MultiIndex.from_tuples(
        [("nnUNetTrainer", 4), ("nnUNetTrainer", 8), ("nnUNetTrainerSelfTrainingMixtures", 8)],
        names=["trainer", "labeled"],
    )
    table = pd.DataFrame({"mean": [70.0, 75.0, 80.0], "std": [1.0, 2.0, float("nan")], "count": [3, 3, 1]}, index)
    monkeypatch.setattr(label_efficiency, "curve_of", lambda protocols: table)
    monkeypatch.setattr(label_efficiency, "CURVES", {"mine, of 9 scans": {4: "a", 8: "b", 160: "c"}})


def test_each_trainer_has_a_line_of_its_runs(curve, monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(
        "matplotlib.axes.Axes.errorbar",
        lambda axes, x, y, bars, label, **_: drawn.update({label: ([*x], [*y], [*bars.fillna(0)])}) or axes.plot(x, y),
    )
    label_efficiency.draw(tmp_path / "mine.png")
    assert drawn == {
        "stock nnU-Net": ([4, 8], [70.0, 75.0], [1.0, 2.0]),
        "self-training, its teacher labelled mixtures": ([8], [80.0], [0.0]),
    }
    assert (tmp_path / "mine.png").read_bytes()[:4] == b"\x89PNG"


def test_table_has_a_row_for_each_number_that_was_run(curve):
    _, _, four, eight = label_efficiency.table().splitlines()
    assert four == "| mine | 4 | 70.00 ± 1.00 (3) | – | – | – | – |"
    assert eight == "| mine | 8 | 75.00 ± 2.00 (3) | – | – | – | 80.00 (1) |"


def test_committed_runs_are_read():
    curve = label_efficiency.curve_of({8: "left-atrium-8-cpu", 999: "never run"})
    assert curve.loc[("nnUNetTrainer", 8), "count"] == 3
