"""The report's arithmetic on runs of known numbers, and its files."""

import sys

import benchmark_report
import numpy as np
import pandas as pd
import pytest
from batchgenerators.utilities.file_and_folder_operations import save_json
from scipy.stats import wilcoxon

DICE = {
    ("nnUNetTrainer", 1): [0.80, 0.60, 0.70, 0.50, 0.40, 0.30],
    ("nnUNetTrainer", 2): [0.90, 0.60, 0.70, 0.50, 0.40, 0.30],
    ("nnUNetTrainerMine", 1): [0.95, 0.62, 0.73, 0.54, 0.35, 0.36],
}


@pytest.fixture
def runs(tmp_path):
    """Three finished runs and one that is not."""
    folder = tmp_path / "tiny-cpu"
    for (trainer, repetition), values in DICE.items():
        run = folder / f"{trainer}-fold5-{repetition}"
        run.mkdir(parents=True)
        rows = [(f"case_{n}", "organ", dice, dice / (2 - dice), 10 - 10 * dice, 1) for n, dice in enumerate(values)]
        columns = ["case", "class", "dice", "jaccard", "hd95_mm", "asd_mm"]
        pd.DataFrame(rows, columns=columns).to_csv(run / "metrics.csv", index=False)
        start = list(range(0, 40, 10))
        times = {"epoch_start_timestamps": start, "epoch_end_timestamps": [t + repetition for t in start]}
        result = {
            "protocol": "tiny-cpu",
            "trainer": trainer,
            "fold": 5,
            "repetition": repetition,
            "parameters": 1_500_000,
            "curves": {"mean_fg_dice": [0.1, 0.2, 0.3, 0.4], **times},
            "machine": "2 cores",
            "versions": {"torch": "2.15.0"},
            "command": f"nnUNetv2_train {trainer}",
        }
        save_json(result, str(run / "result.json"))
    (folder / "nnUNetTrainer-fold5-3").mkdir()
    return folder


def test_mean_over_cases_and_deviation_over_runs(runs):
    cases, results = benchmark_report.read_runs(runs)
    dice = benchmark_report.summary(cases).loc[("nnUNetTrainer", "organ"), "dice"]
    means = [100 * np.mean(DICE["nnUNetTrainer", repetition]) for repetition in (1, 2)]
    assert dice["mean"] == pytest.approx(np.mean(means))
    assert dice["std"] == pytest.approx(np.std(means, ddof=1))
    assert dice["count"] == 2
    assert sorted(benchmark_report.epoch_seconds(result).sum() for result in results) == [4, 4, 8]


def test_differences_are_paired_by_case(runs):
    cases, _ = benchmark_report.read_runs(runs)
    (values,) = benchmark_report.differences(cases, "dice").values()
    stock = np.mean([DICE["nnUNetTrainer", 1], DICE["nnUNetTrainer", 2]], 0)
    np.testing.assert_allclose(values, 100 * (np.array(DICE["nnUNetTrainerMine", 1]) - stock))
    low, high = benchmark_report.interval(values)
    assert low < values.mean() < high
    assert low > values.min()


def test_report_has_every_number_and_the_commands(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_report.py", str(runs), "-o", str(tmp_path / "report")])
    benchmark_report.main()
    report = (tmp_path / "report" / "report.md").read_text()
    assert "| nnUNetTrainer | organ | 2 | 55.83 ± 1.18 |" in report
    assert "| nnUNetTrainerMine | organ | 1 | 59.17 |" in report
    (line,) = (line for line in report.splitlines() if line.startswith("| nnUNetTrainerMine | Dice"))
    p = wilcoxon([10, 2, 3, 4, -5, 6]).pvalue
    assert "| 6 | +3.33 |" in line
    assert line.endswith(f"| 5 | {p:.2g} |")
    (line,) = (line for line in report.splitlines() if line.startswith("| nnUNetTrainerMine | 95 % Hausdorff"))
    assert "| 5 |" in line  # smaller is better
    assert "nnUNetv2_train nnUNetTrainerMine" in report
    assert "torch 2.15.0" in report
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [
        "cases.csv",
        "dice_against_time.png",
        "differences.png",
        "learning_curves.png",
        "report.md",
    ]
    assert len(pd.read_csv(tmp_path / "report" / "cases.csv")) == 18
    assert capsys.readouterr().out.strip() == report.strip()


def test_folder_without_a_finished_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        benchmark_report.read_runs(tmp_path)
