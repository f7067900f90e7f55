"""The numbers of a benchmark's report: means over repetitions, paired differences to stock nnU-Net, costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, wilcoxon

from nnunetv2_selfreg.benchmark import METRICS
from nnunetv2_selfreg.data.datasets import read_json
from nnunetv2_selfreg.errors import UserError

STOCK = "nnUNetTrainer"
IN_PERCENT = ("dice", "jaccard")
LEARNED = 0.7  # pseudo Dice in every class
BOOTSTRAP_SEED = 0
FEWEST_CASES = 4  # resampling three has ten outcomes, and the smallest p of a signed-rank test is 0.25


def read_runs(folder: Path) -> tuple[pd.DataFrame, list[dict]]:
    """All rows of all finished runs, with `trainer`, `fold` and `repetition`, overlaps in percent; and all results with
    their `folder`, also of runs that diverged.

    Raises:
        UserError: no run is finished, or all failed.
    """
    tables, results = [], []
    for file in sorted(folder.glob("*/result.json")):
        result = {"failure": None, **read_json(file), "folder": file.parent}
        results.append(result)
        if result["failure"] is None:
            table = pd.read_csv(file.with_name("metrics.csv"))
            tables.append(table.assign(**{name: result[name] for name in ("trainer", "fold", "repetition")}))
    if not results:
        raise UserError(f"{folder} has no finished run (*/result.json). Give the folder of a benchmark's runs.")
    if not tables:
        failures = "; ".join(f"{result['folder'].name}: {result['failure']}" for result in results)
        raise UserError(f"all runs of {folder} failed: {failures}. Remove them and run the benchmark again.")
    cases = pd.concat(tables, ignore_index=True)
    cases[[*IN_PERCENT]] *= 100
    return cases, results


def incomplete_repetitions(cases: pd.DataFrame) -> list[tuple[str, int]]:
    """Trainer and number of the repetitions that lack folds which another repetition has, of whatever trainer: a mean
    over other folds is of other cases."""
    folds = cases.groupby(["trainer", "repetition"])["fold"].nunique()
    return folds[folds < cases["fold"].nunique()].index.tolist()


def summary(cases: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the complete repetitions of the mean over cases (of all folds), by trainer and
    class; the mean of the classes is a last class, `mean`."""
    repetitions = pd.MultiIndex.from_frame(cases[["trainer", "repetition"]])
    tables = [cases[~repetitions.isin(incomplete_repetitions(cases))]]
    if tables[0]["class"].nunique() > 1:
        tables.append(tables[0].assign(**{"class": "mean"}))
    of_repetition = [table.groupby(["trainer", "class", "repetition"])[[*METRICS]].mean() for table in tables]
    classes = pd.concat(of_repetition).groupby(["trainer", "class"], sort=False).agg(["mean", "std", "count"])
    return classes.sort_index(level="trainer", sort_remaining=False, kind="stable")


def differences(cases: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
    """Trainer minus stock, for every other trainer: a row for each case, a column for each class.

    Each side is averaged over its repetitions first. Where one of them has no value, since neither the reference nor
    that repetition's prediction has the class, there is none of the pair.
    """
    keys = ["trainer", "fold", "case", "class"]
    of_pair = cases.groupby(keys)[metric].apply(lambda values: values.mean(skipna=False)).unstack("trainer")
    if STOCK not in of_pair:
        return {}
    others = of_pair.drop(columns=STOCK).sub(of_pair[STOCK], axis=0)
    return {name: others[name].unstack("class").dropna(how="all") for name in others}


def stock_against_itself(cases: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
    """Each repetition of stock minus its others, as in :func:`differences`: what chance does between runs, which no
    interval over cases knows of. Nothing without a second repetition."""
    stock = cases[cases["trainer"] == STOCK]
    tables = {}
    for number in sorted(stock["repetition"].unique()):
        name = f"{STOCK}, repetition {number}"
        tables |= differences(stock.assign(trainer=np.where(stock["repetition"] == number, name, STOCK)), metric)
    return tables


def comparisons(cases: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
    """The differences of every trainer to stock, then those of each repetition of stock to its others."""
    return {**differences(cases, metric), **stock_against_itself(cases, metric)}


def interval(values: pd.Series) -> tuple[float, float]:
    """95 % bootstrap interval (BCa) of the mean over cases; NaN where all are equal, and of fewer than FEWEST_CASES."""
    if values.nunique() < 2 or len(values) < FEWEST_CASES:
        return np.nan, np.nan
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    found = bootstrap((values.to_numpy(),), np.mean, random_state=generator).confidence_interval
    return float(found.low), float(found.high)


def wilcoxon_p(values: pd.Series) -> float:
    """Two-sided Wilcoxon signed-rank test over cases; NaN where nothing differs, and of fewer than FEWEST_CASES."""
    return float(wilcoxon(values).pvalue) if values.any() and len(values) >= FEWEST_CASES else np.nan


def difference_rows(cases: pd.DataFrame) -> pd.DataFrame:
    """A row for each trainer (and each repetition of stock), metric and class, and for the mean of the classes."""
    rows = []
    for metric, title in METRICS.items():
        for trainer, table in comparisons(cases, metric).items():
            for name, values in [("mean", table.mean(axis=1)), *table.items()]:
                values = values.dropna()
                low, high = interval(values)
                better = (values > 0).sum() if metric in IN_PERCENT else (values < 0).sum()
                numbers = {"mean": values.mean(), "low": low, "high": high, "better": better, "p": wilcoxon_p(values)}
                about = {"trainer": trainer, "metric": title, "class": name, "cases": len(values)}
                rows.append({**about, **numbers})
    return pd.DataFrame(rows)


def costs_of(result: dict) -> dict[str, float]:
    """What a run took; NaN for what was not measured."""
    seconds = epoch_seconds(result)
    return {
        "parameters, M": result.get("parameters", np.nan) / 1e6,
        "step, s": np.median(seconds) / result.get("iterations", np.nan) if len(seconds) else np.nan,
        "training, min": seconds.sum() / 60 if len(seconds) else np.nan,
        "peak memory, MiB": result.get("peak_memory_mib") or np.nan,
        "prediction of a case, s": result.get("prediction_seconds") or np.nan,
        "learned in epoch": first_epoch_with(result.get("curves", {}).get("dice_per_class_or_region", [])),
    }


def middle(values: pd.Series) -> float:
    """The median; the lower of two middle values if the other is infinite, as that of a run that never learned."""
    median = values.median()
    return values.quantile(interpolation="lower") if np.isinf(median) else median


def first_epoch_with(dice: list[list[float]], enough: float = LEARNED) -> float:
    """The first epoch, counted from 1, in which every class has so much; infinite if none has, NaN without epochs."""
    epochs = (number for number, classes in enumerate(dice, 1) if min(classes) >= enough)
    return next(epochs, np.inf if dice else np.nan)


def epoch_seconds(result: dict) -> np.ndarray:
    """The time of each epoch; none if the run left no curves."""
    curves = result.get("curves", {"epoch_end_timestamps": [], "epoch_start_timestamps": []})
    return np.subtract(curves["epoch_end_timestamps"], curves["epoch_start_timestamps"])
