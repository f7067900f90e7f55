"""The report's arithmetic on runs of known numbers, and its files."""

import re
import shutil

import numpy as np
import pandas as pd
import phantom
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from scipy.stats import wilcoxon

from nnunetv2_selfreg import cli
from nnunetv2_selfreg.benchmark import METRICS, figures, statistics
from nnunetv2_selfreg.benchmark.report import markdown
from nnunetv2_selfreg.errors import UserError

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
        learned = [[0.1 * epoch * repetition] for epoch in range(1, 5)]
        times = {"epoch_start_timestamps": start, "epoch_end_timestamps": [t + repetition for t in start]}
        result = {
            "protocol": "tiny-cpu",
            "trainer": trainer,
            "fold": 5,
            "repetition": repetition,
            "parameters": 1_500_000,
            "curves": {"mean_fg_dice": [0.1, 0.2, 0.3, 0.4], "dice_per_class_or_region": learned, **times},
            "machine": "2 cores",
            "versions": {"torch": "2.15.0"},
            "command": f"nnUNetv2_train {trainer}",
        }
        if repetition == 2:
            result |= {"commit": "abc1234", "environment": {"OMP_NUM_THREADS": "1"}}
        save_json(result, str(run / "result.json"))
    (folder / "nnUNetTrainer-fold5-3").mkdir()
    return folder


def test_mean_over_cases_and_deviation_over_runs(runs):
    cases, results = statistics.read_runs(runs)
    dice = statistics.summary(cases).loc[("nnUNetTrainer", "organ"), "dice"]
    means = [100 * np.mean(DICE["nnUNetTrainer", repetition]) for repetition in (1, 2)]
    assert dice["mean"] == pytest.approx(np.mean(means))
    assert dice["std"] == pytest.approx(np.std(means, ddof=1))
    assert dice["count"] == 2
    assert sorted(statistics.epoch_seconds(result).sum() for result in results) == [4, 4, 8]


def test_differences_are_paired_by_case(runs):
    cases, _ = statistics.read_runs(runs)
    (table,) = statistics.differences(cases, "dice").values()
    values = table["organ"]
    stock = np.mean([DICE["nnUNetTrainer", 1], DICE["nnUNetTrainer", 2]], 0)
    np.testing.assert_allclose(values, 100 * (np.array(DICE["nnUNetTrainerMine", 1]) - stock))


def test_interval_is_the_usual_one_where_that_is_right():
    """Of normal values, of which there are many: mean ± 1.96 standard errors."""
    values = pd.Series(np.random.default_rng(1).normal(3, 2, 2000))
    low, high = statistics.interval(values)
    error = 1.96 * values.std() / len(values) ** 0.5
    assert low == pytest.approx(values.mean() - error, abs=0.05 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.05 * error)


def test_repetitions_of_stock_are_compared_with_each_other(runs):
    cases, _ = statistics.read_runs(runs)
    tables = statistics.stock_against_itself(cases, "dice")
    np.testing.assert_allclose(tables["nnUNetTrainer, repetition 2"]["organ"], [10, 0, 0, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(tables["nnUNetTrainer, repetition 1"]["organ"], [-10, 0, 0, 0, 0, 0], atol=1e-9)
    assert not statistics.stock_against_itself(cases[cases["repetition"] == 1], "dice")
    rows = statistics.difference_rows(cases)
    assert rows["trainer"].nunique() == 3


def test_two_cases_have_no_interval_and_no_p(runs, tmp_path):
    for file in runs.rglob("metrics.csv"):
        table = pd.read_csv(file)
        table[table["case"].isin(sorted(table["case"].unique())[:2])].to_csv(file, index=False)
    assert make_report(runs, tmp_path / "report") == 0
    report = (tmp_path / "report" / "report.md").read_text()
    (line,) = (line for line in report.splitlines() if line.startswith("| nnUNetTrainerMine | +"))
    assert re.fullmatch(r" \+\d+\.\d\d; \d of 2 ", line.split("|")[2])


def make_report(runs, folder) -> int:
    return cli.main(["benchmark", "report", str(runs), "-o", str(folder)])


def test_report_has_every_number_and_the_commands(runs, tmp_path, capsys):
    assert make_report(runs, tmp_path / "report") == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert "| nnUNetTrainer | organ | 2 | 55.83 ± 1.18 |" in report
    assert "| nnUNetTrainerMine | organ | 1 | 59.17 |" in report
    (line,) = (line for line in report.splitlines() if line.startswith("| nnUNetTrainerMine | +"))
    _, _, dice, _, hausdorff, *_ = line.split("|")
    p = wilcoxon([10, 2, 3, 4, -5, 6]).pvalue
    assert re.fullmatch(rf" \+3\.33 \(-.* to \+.*\); 5 of 6; {p:.2g} ", dice)
    assert "; 5 of 6;" in hausdorff  # smaller is better
    assert "nnUNetv2_train nnUNetTrainerMine" in report
    assert "torch 2.15.0" in report
    assert "Commits: abc1234, unknown" in report
    assert "Environment: OMP_NUM_THREADS=1" in report
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [
        "cases.csv",
        "dice_against_time.png",
        "differences.csv",
        "differences.png",
        "learning_curves.png",
        "report.md",
    ]
    assert len(pd.read_csv(tmp_path / "report" / "cases.csv")) == 18
    assert capsys.readouterr().out.strip() == report.strip()


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that are saved."""
    axes = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: axes.append(figure.axes[0]))
    return axes


def points(axes) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def test_figures_show_the_numbers(runs, tmp_path, drawn):
    cases, results = statistics.read_runs(runs)
    figures.draw_learning_curves(results, tmp_path / "curves.png")
    assert points(drawn.pop()) == [([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])] * 3
    figures.draw_dice_against_time(cases, results, tmp_path / "time.png")
    expected = {(4 / 60, 100 * np.mean(DICE["nnUNetTrainer", 1])), (8 / 60, 100 * np.mean(DICE["nnUNetTrainer", 2]))}
    expected |= {(4 / 60, 100 * np.mean(DICE["nnUNetTrainerMine", 1]))}
    found = {(round(float(x), 6), round(float(y), 6)) for (x,), (y,) in points(drawn.pop())}
    assert found == {(round(x, 6), round(float(y), 6)) for x, y in expected}
    figures.draw_differences(cases, tmp_path / "differences.png")
    axes = drawn.pop()
    stock = np.mean([DICE["nnUNetTrainer", 1], DICE["nnUNetTrainer", 2]], 0)
    difference = 100 * (np.array(DICE["nnUNetTrainerMine", 1]) - stock)
    np.testing.assert_allclose(points(axes)[0][0], difference)
    low, high = points(axes)[1][0]
    assert low < difference.mean() < high
    assert axes.get_yticklabels()[0].get_text() == "nnUNetTrainerMine"


def test_more_trainers_than_colours_are_drawn(runs, tmp_path):
    _, results = statistics.read_runs(runs)
    many = [{**results[0], "trainer": f"nnUNetTrainer{n}"} for n in range(22)]
    figures.draw_learning_curves(many, tmp_path / "curves.png")


def test_mean_of_the_classes_stands_last():
    dice = {"anterior": 90, "posterior": 60}
    cases = table({("nnUNetTrainer", 0, 1, case, label): dice[label] for case in "12" for label in dice})
    found = statistics.summary(cases)
    assert found.loc[("nnUNetTrainer", "mean"), ("dice", "mean")] == 75
    assert [*found.index.get_level_values("class")] == ["anterior", "posterior", "mean"]


def table(values: dict) -> pd.DataFrame:
    """Rows of (trainer, fold, repetition, case, class) with a Dice, the other metrics alike."""
    rows = [(*key, *[value] * 4) for key, value in values.items()]
    return pd.DataFrame(rows, columns=["trainer", "fold", "repetition", "case", "class", *METRICS])


def test_spread_is_over_repetitions_not_over_folds():
    stock = "nnUNetTrainer"
    cases = table({(stock, fold, rep, f"{fold}", "a"): 60 + 30 * fold for fold in (0, 1) for rep in (1, 2)})
    dice = statistics.summary(cases).loc[(stock, "a"), "dice"]
    assert (dice["mean"], dice["std"], dice["count"]) == (75, 0, 2)


def test_repetition_that_lacks_a_fold_is_named_and_no_part_of_the_spread(runs):
    folds = {1: (0, 1), 2: (0, 1), 3: (0,)}
    cases = table(
        {("nnUNetTrainer", fold, rep, f"{fold}", "a"): 90 - 20 * fold for rep in folds for fold in folds[rep]}
    )
    assert statistics.incomplete_repetitions(cases) == [("nnUNetTrainer", 3)]
    dice = statistics.summary(cases).loc[("nnUNetTrainer", "a"), "dice"]
    assert (dice["mean"], dice["std"], dice["count"]) == (80, 0, 2)
    _, results = statistics.read_runs(runs)
    report = markdown(cases, pd.DataFrame(), results)
    assert "Repetition 3 of nnUNetTrainer lacks folds and is not in the first table." in report


def test_trainer_that_lacks_a_fold_of_stock_is_not_compared_with_it_in_means():
    cases = table(
        {("nnUNetTrainer", fold, 1, f"{fold}", "a"): 90 - 40 * fold for fold in (0, 1)}
        | {("nnUNetTrainerMine", 0, 1, "0", "a"): 90}
    )
    assert statistics.incomplete_repetitions(cases) == [("nnUNetTrainerMine", 1)]
    assert statistics.summary(cases).index.tolist() == [("nnUNetTrainer", "a")]


def test_contours_without_a_class_in_any_case_are_none(tmp_path):
    cases = table({("nnUNetTrainer", 0, 1, "0", "a"): float("nan")})
    assert figures.draw_contours(cases, [{"dataset": "x"}], tmp_path) == []


def test_first_epoch_in_which_every_class_is_learned():
    assert statistics.first_epoch_with([[0.9, 0.6], [0.7, 0.7], [0.8, 0.8]]) == 2
    assert statistics.first_epoch_with([[0.9, 0.6]]) == np.inf
    assert np.isnan(statistics.first_epoch_with([]))


def test_only_pairs_that_both_sides_have_in_every_repetition_count():
    """`b` is nowhere in case 1; one repetition of one trainer sees it there all the same."""
    values = {("nnUNetTrainer", 0, rep, case, label): 80.0 for rep in (1, 2) for case in "12" for label in "ab"}
    values |= {("nnUNetTrainerMine", 0, rep, case, label): 90.0 for rep in (1, 2) for case in "12" for label in "ab"}
    for trainer in ("nnUNetTrainer", "nnUNetTrainerMine"):
        for repetition in (1, 2):
            values[trainer, 0, repetition, "1", "b"] = np.nan
    values["nnUNetTrainerMine", 0, 2, "1", "b"] = 0.0
    (found,) = statistics.differences(table(values), "dice").values()
    np.testing.assert_array_equal(found.to_numpy(), [[10, np.nan], [10, 10]])
    rows = statistics.difference_rows(table(values))
    dice = rows[(rows["metric"] == "Dice") & (rows["trainer"] == "nnUNetTrainerMine")].set_index("class")
    assert dice["cases"].to_dict() == {"mean": 2, "a": 2, "b": 1}
    assert dice["mean"].to_dict() == {"mean": 10, "a": 10, "b": 10}


@pytest.mark.filterwarnings("error")
def test_runs_that_do_not_differ_at_all():
    values = {(t, 0, 1, case, "a"): 80.0 for t in ("nnUNetTrainer", "nnUNetTrainerMine") for case in "12"}
    rows = statistics.difference_rows(table(values))
    assert (rows["mean"] == 0).all()
    assert rows[["low", "high", "p"]].isna().all(axis=None)


def test_diverged_runs_are_named_and_left_out(runs, tmp_path, monkeypatch):
    (failed,) = runs.glob("nnUNetTrainerMine*")
    result = load_json(str(failed / "result.json"))
    save_json({**result, "failure": "it diverged: nan"}, str(failed / "result.json"))
    (failed / "metrics.csv").unlink()
    cases, results = statistics.read_runs(runs)
    assert set(cases["trainer"]) == {"nnUNetTrainer"}
    report = markdown(cases, statistics.difference_rows(cases), results)
    assert f"{failed.name}: it diverged: nan" in report
    assert make_report(runs, tmp_path / "report") == 0
    for folder in runs.glob("nnUNetTrainer-*/result.json"):
        folder.unlink()
    with pytest.raises(UserError, match=r"all runs of .* failed: .*it diverged: nan"):
        statistics.read_runs(runs)


def test_costs_are_medians_over_runs(runs):
    for number, file in enumerate(sorted(runs.glob("nnUNetTrainer-*/result.json")), 1):
        measured = {"iterations": 10, "peak_memory_mib": 1000 * number, "prediction_seconds": 2 * number}
        save_json({**load_json(str(file)), **measured}, str(file))
    cases, results = statistics.read_runs(runs)
    lines = markdown(cases, statistics.difference_rows(cases), results).splitlines()
    # 4 epochs of 1 s and of 2 s; 1.5 million parameters; one of the two never learns, the other in epoch 4
    assert "| nnUNetTrainer | 2 cores | 1.5 | 0.15 | 0.1 | 1500 | 3 | 4 |" in lines
    assert "| nnUNetTrainerMine | 2 cores | 1.5 | – | 0.0667 | – | – | never |" in lines


def test_costs_of_different_machines_are_not_mixed(runs):
    (file,) = runs.glob("nnUNetTrainer-*-2/result.json")
    save_json({**load_json(str(file)), "machine": "1 core"}, str(file))
    cases, results = statistics.read_runs(runs)
    lines = markdown(cases, statistics.difference_rows(cases), results).splitlines()
    assert "| nnUNetTrainer | 1 core | 1.5 | – | 0.133 | – | – | 4 |" in lines
    assert "| nnUNetTrainer | 2 cores | 1.5 | – | 0.0667 | – | – | never |" in lines


def test_contours_of_the_best_the_median_and_the_worst_case(runs, tmp_path, monkeypatch):
    raw = tmp_path / "raw" / "Dataset001_Phantom"
    phantom.write_dataset(raw, train=6, shape=(8, 12, 12))
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    names = {f"case_{n}": f"phantom_{n:03d}" for n in range(6)}
    for file in runs.glob("*/metrics.csv"):
        pd.read_csv(file).replace({"case": names}).to_csv(file, index=False)
        result = load_json(str(file.with_name("result.json")))
        save_json({**result, "dataset": raw.name, "validation": "val"}, str(file.with_name("result.json")))
        if result["trainer"] == "nnUNetTrainer":
            shutil.copytree(raw / "labelsTr", file.with_name("val"))
    drawn = {}
    monkeypatch.setattr(figures, "contour_figure", lambda cases, file: drawn.update({file.name: cases}))
    cases, results = statistics.read_runs(runs)
    assert figures.draw_contours(cases, results, tmp_path) == ["nnUNetTrainerMine"]
    titles = [case.title for case in drawn["contours-nnUNetTrainer.png"]]
    assert titles == [
        "best: phantom_000, Dice 80.0 %",
        "median: phantom_001, Dice 60.0 %",
        "worst: phantom_005, Dice 30.0 %",
    ]
    first = drawn["contours-nnUNetTrainer.png"][0]
    assert first.image.shape == first.reference.shape == (8, 12, 12)
    np.testing.assert_array_equal(first.reference, first.prediction)
    for file in (raw / "imagesTr").glob("phantom_001*"):  # a case that has left the raw data set
        file.unlink()
    assert figures.draw_contours(cases, results, tmp_path) == ["nnUNetTrainer", "nnUNetTrainerMine"]


def test_report_of_the_folder_above_if_it_has_the_runs_of_one_protocol(runs, tmp_path, capsys):
    (tmp_path / "none-finished" / "nnUNetTrainer-fold0-1").mkdir(parents=True)
    assert make_report(tmp_path, tmp_path / "report") == 0
    assert "# tiny-cpu" in (tmp_path / "report" / "report.md").read_text()
    shutil.copytree(runs, tmp_path / "other-cpu")
    capsys.readouterr()
    assert make_report(tmp_path, tmp_path / "report") == 2
    error = f"nnUNetv2_selfreg: {tmp_path} has the runs of other-cpu, tiny-cpu. Give one of these folders.\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_folder_without_a_finished_run_is_named(folder, tmp_path, capsys):
    assert make_report(tmp_path / folder, tmp_path / "report") == 2
    assert f"nnUNetv2_selfreg: {tmp_path / folder} has no finished run" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
