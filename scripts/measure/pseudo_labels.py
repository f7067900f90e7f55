"""How good pseudo-labels are, and what perfect ones would be.

    python scripts/measure/pseudo_labels.py dice -d 4 -c 2d -f 5            # Dice of each case, real labels needed
    python scripts/measure/pseudo_labels.py perfect -d 4 -c 2d -f 5         # a set `perfect` of the real labels

With the second one, a student whose `pseudo_label_set` is "perfect" says what the best of all teachers would give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_selfreg.data.datasets import preprocessed_folder, read_json
from nnunetv2_selfreg.data.pseudo_labels import Description, folder_of, store_case
from nnunetv2_selfreg.data.splits import folds_of
from nnunetv2_selfreg.data.storage import open_array
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool, recipe
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
    table = pd.DataFrame({"disagreement": description.disagreement})
    table["Dice, %"] = [
        100 * dice(open_array(folder / f"{case}.b2nd")[0], open_array(cases / f"{case}_seg.b2nd")[0])
        for case in table.index
    ]
    table["left out"] = [description.dropped.get(case, "") for case in table.index]
    print(table.to_string())
    is_out = table["left out"] != ""
    for name, part in (("all", table), ("kept", table[~is_out]), ("left out", table[is_out])):
        print(f"{name}: {len(part)} cases, Dice {part['Dice, %'].mean():.2f}")
    correlation = table[["disagreement", "Dice, %"]].astype(float).corr("spearman").iloc[0, 1]
    print(f"Spearman's rank correlation of Dice and disagreement: {correlation:.2f}")


def write_perfect(cases: Path, fold: int, unlabeled: list[str], plans: PlansManager, configuration: str) -> None:
    """Writes the real labels of the fold's listed unlabelled cases as pseudo-labels. (Those of `preprocess_unlabeled`
    have none.)"""
    folder = folder_of(cases, fold, "perfect")
    dataset_json = read_json(cases.parent / "dataset.json")
    planned, manager = plans.get_configuration(configuration), plans.get_label_manager(dataset_json)
    folder.mkdir(parents=True, exist_ok=True)
    current, labels = recipe(plans, planned), dataset_json["labels"]
    description = Description(fold, [PERFECT], [], current, labels, "nothing")
    pool = UnlabeledPool({case: cases / f"{case}.b2nd" for case in unlabeled})
    for case in unlabeled:
        real = open_array(cases / f"{case}_seg.b2nd")[0]
        image = pool.fingerprint(case)
        store_case(folder, case, real, manager, None, description.made_by, image, planned.patch_size)
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
        write_perfect(cases, options.f, unlabeled, plans, options.c)
    return 0


if __name__ == "__main__":
    sys.exit(main())
