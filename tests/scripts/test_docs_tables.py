"""The tables in the docs are those of the committed measurements."""

import json

import docs_tables
import pandas as pd
import pytest


@pytest.mark.parametrize("page", docs_tables.PAGES)
def test_page_is_up_to_date(page):
    """Else run scripts/docs_tables.py."""
    assert docs_tables.page(page) == (docs_tables.DOCS / page).read_text()


def test_page_without_a_place_for_a_table_is_named():
    with pytest.raises(ValueError, match="there are 0 places for mine"):
        docs_tables.filled("<!-- other -->\n<!-- end -->", {"mine": "| |"})


def test_page_with_two_places_for_a_table_is_named():
    with pytest.raises(ValueError, match="there are 2 places for mine"):
        docs_tables.filled(2 * "<!-- mine -->\n<!-- end -->\n", {"mine": "| |"})


def rows(trainer: str, repetition: int, dice: dict[tuple[str, str], float]) -> pd.DataFrame:
    """Of cases and classes; the distances are 100 minus Dice."""
    values = [(case, label, value, value, 100 - value, 1.0) for (case, label), value in dice.items()]
    columns = ["case", "class", "dice", "jaccard", "hd95_mm", "asd_mm"]
    return pd.DataFrame(values, columns=columns).assign(trainer=trainer, fold=0, repetition=repetition)


@pytest.mark.parametrize("classes", [("a",), ("a", "b")])
def test_trials_in_the_order_of_their_titles_with_their_own_numbers(classes, monkeypatch):
    """Stock has 80 and 82, the trial 91 and 93, or in the second class 10 less each."""

    def run(trainer: str, repetition: int, first: float) -> tuple[pd.DataFrame, dict]:
        dice = {(f"{n}", label): first + 2 * n - 10 * k for n in (0, 1) for k, label in enumerate(classes)}
        learned = {"dice_per_class_or_region": [[0.1], [0.9]], "epoch_start_timestamps": [], "epoch_end_timestamps": []}
        return rows(trainer, repetition, dice), {"trainer": trainer, "repetition": repetition, "curves": learned}

    runs = [run("nnUNetTrainer", 1, 79), run("nnUNetTrainer", 2, 81), run("nnUNetTrainerMine", 1, 91)]
    read = pd.concat([cases for cases, _ in runs]), [result for _, result in runs]
    monkeypatch.setattr(docs_tables, "read_runs", lambda folder: read)
    titles = {"nnUNetTrainerMine": "mine", "nnUNetTrainerNever": "not run", "nnUNetTrainer": "stock"}
    _, _, mine, stock, first, second = docs_tables.of_trials("tiny-cpu", titles).splitlines()
    shift = 0 if len(classes) == 1 else 5
    assert mine == f"| mine | 1 | {92 - shift:.2f} | +11.00 | – | -11.00 | 2 |"
    assert stock == f"| stock | 2 | {81 - shift:.2f} ± 1.41 | – | – | – | 2 |"
    assert first.startswith("| stock, repetition 1 minus its others | – | – | -2.00 ")
    assert second.startswith("| stock, repetition 2 minus its others | – | – | +2.00 ")
    pair = ("nnUNetTrainer", "nnUNetTrainerMine")
    _, _, *with_pair = docs_tables.of_trials("tiny-cpu", titles, pair).splitlines()
    assert with_pair.pop(2) == "| stock minus mine | – | – | -11.00 | – | +11.00 | – |"
    assert with_pair == [mine, stock, first, second]
    assert (
        docs_tables.of_trials("tiny-cpu", titles, ("nnUNetTrainer", "nnUNetTrainerNever")).splitlines()[2:] == with_pair
    )


def test_steps_stand_beside_stocks_of_the_same_file(tmp_path, monkeypatch):
    def write(name: str, *rows: tuple[str, float, float]) -> None:
        (tmp_path / "results" / "steps").mkdir(parents=True, exist_ok=True)
        rows = [
            {"trainer": t, "seconds": s, "ratio": r, "ratio_quartiles": [r - 0.1, r + 0.1], "memory_ratio": 1.5}
            for t, s, r in rows
        ]
        (tmp_path / "results" / "steps" / f"{name}.json").write_text(json.dumps({"rows": rows}))

    write("compiled-a", ("nnUNetTrainer", 0.02, 1), ("A", 0.03, 1.5))
    write("eager", ("nnUNetTrainer", 0.04, 1), ("A", 0.06, 1.5), ("B", 0.08, 2))
    monkeypatch.setattr(docs_tables, "DOCS", tmp_path)
    assert docs_tables.of_steps("steps").splitlines()[2:] == [
        "| A | no | 60 | 40 | 1.50 (1.40–1.60) | 1.50 |",
        "| B | no | 80 | 40 | 2.00 (1.90–2.10) | 1.50 |",
        "| A | yes | 30 | 20 | 1.50 (1.40–1.60) | 1.50 |",
    ]
