"""How good pseudo-labels are, and what perfect ones would be.

    python scripts/measure/pseudo_labels.py dice -d 4 -c 2d -f 5            # Dice of each case, real labels needed
    python scripts/measure/pseudo_labels.py perfect -d 4 -c 2d -f 5         # a set `perfect` of the real labels

With the second one, a student whose `pseudo_label_set` is "perfect" says what the best of all teachers would give.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.stats import spearmanr

from nnunetv2_selfreg.data.datasets import preprocessed_folder, read_json
from nnunetv2_selfreg.data.pseudo_labels import Description, folder_of, store_case
from nnunetv2_selfreg.data.splits import folds_of
from nnunetv2_selfreg.data.storage import open_array
from nnunetv2_selfreg.data.unlabeled import recipe
from nnunetv2_selfreg.errors import UserError

PERFECT = {"trainer": "reference", "fold": "all", "checkpoint": "", "sha256": "reference"}


def dice(labels: np.ndarray, reference: np.ndarray) -> float:
    """Mean Dice of the classes that are in either; NaN if none is."""
    classes = [label for label in np.union1d(labels, reference) if label > 0]
    masks = [(labels == label, reference == label) for label in classes]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in masks])) if masks else float("nan")


def measure(cases: Path, folder: Path) -> None:
    """Prints each case's Dice and disagreement, then what both have to do with each other."""
    description = Description.read(folder)
    if description is None:
        raise UserError(f"There are no pseudo-labels in {folder}.")
    rows = []
    for case, disagreement in description.disagreement.items():
        value = dice(open_array(folder / f"{case}.b2nd")[0], open_array(cases / f"{case}_seg.b2nd")[0])
        rows.append((value, disagreement, case in description.dropped))
        print(f"{case:30s} Dice {100 * value:5.1f}  disagreement {disagreement}  {description.dropped.get(case, '')}")
    for name, chosen in (
        ("all", rows),
        ("kept", [r for r in rows if not r[2]]),
        ("left out", [r for r in rows if r[2]]),
    ):
        if chosen:
            print(f"{name}: {len(chosen)} cases, Dice {100 * statistics.mean(row[0] for row in chosen):.2f}")
    if all(row[1] is not None for row in rows):
        print(f"Spearman's rank correlation of Dice and disagreement: {correlation(rows):.2f}")


def correlation(rows: list[tuple]) -> float:
    """Spearman's, of Dice and disagreement."""
    values, disagreements, _ = zip(*rows, strict=True)
    return spearmanr(values, disagreements)[0]


def write_perfect(cases: Path, folder: Path, unlabeled: list[str], plans: PlansManager, configuration: str) -> None:
    """Writes the real labels of the unlabelled cases as pseudo-labels."""
    dataset_json = read_json(cases.parent / "dataset.json")
    planned, manager = plans.get_configuration(configuration), plans.get_label_manager(dataset_json)
    folder.mkdir(parents=True, exist_ok=True)
    description = Description([PERFECT], recipe(plans, planned), dataset_json["labels"], "nothing")
    for case in unlabeled:
        labels = open_array(cases / f"{case}_seg.b2nd")[0]
        store_case(folder, case, labels, manager, None, description.made_by, planned.patch_size)
    description.disagreement = dict.fromkeys(unlabeled)
    description.save(folder)
    print(f"{len(unlabeled)} cases in {folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["dice", "perfect"])
    parser.add_argument("-d", required=True)
    parser.add_argument("-c", required=True)
    parser.add_argument("-f", required=True, type=int)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("--name", default="")
    options = parser.parse_args()
    folder = preprocessed_folder(options.d)
    plans = PlansManager(str(folder / f"{options.p}.json"))
    cases = folder / plans.get_configuration(options.c).data_identifier
    if options.what == "dice":
        measure(cases, folder_of(cases, options.f, options.name))
    else:
        unlabeled = folds_of(folder)[options.f]["unlabeled"]
        write_perfect(cases, folder_of(cases, options.f, "perfect"), unlabeled, plans, options.c)
    return 0


if __name__ == "__main__":
    sys.exit(main())
