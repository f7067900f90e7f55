"""Time of a signed distance map, beside the recipe of the published dual-task programs, on one thread.

    python scripts/signed_distance_time.py

The recipe, as Luo et al., AAAI 2021, describe it: two of SciPy's Euclidean transforms of the whole mask and a search
for its inner boundary (scikit-image), which becomes 0; isotropic voxels. Here: `signed_distance_map`. On three masks of
112x112x80 voxels: a blob of an organ's size, half of the volume, and noise. In turn, in one process; medians of the
times and of the ratios round by round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import find_boundaries

from nnunetv2_selfreg.benchmark.machine import machine
from nnunetv2_selfreg.data.signed_distance import signed_distance_map

SHAPE = (112, 112, 80)


def published_recipe(mask: np.ndarray) -> np.ndarray:
    """Signed distances of an occupied mask, the published way."""
    inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
    distance = _to_one(outside) - _to_one(inside)
    distance[find_boundaries(mask, mode="inner")] = 0
    return distance


def _to_one(distance: np.ndarray) -> np.ndarray:
    return (distance - distance.min()) / (distance.max() - distance.min())


def masks() -> dict[str, np.ndarray]:
    """By name."""
    place = np.indices(SHAPE) - np.reshape(SHAPE, (3, 1, 1, 1)) / 2
    radii = np.reshape((30, 25, 20), (3, 1, 1, 1))
    noise = np.random.default_rng(0).random(SHAPE) < 0.5
    return {"blob": ((place / radii) ** 2).sum(0) < 1, "half": place[0] < 0, "noise": noise}


def seconds(function: Callable[[np.ndarray], np.ndarray], mask: np.ndarray) -> float:
    begin = time.perf_counter()
    function(mask)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"{machine('cpu')}, one thread, {rounds} rounds\n")
    print("| mask | published recipe, ms | here, ms | times as fast (quartiles) |\n| --- | --- | --- | --- |")
    for name, mask in masks().items():
        pairs = [(seconds(published_recipe, mask), seconds(signed_distance_map, mask)) for _ in range(rounds)]
        theirs, ours = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        print(f"| {name} | {theirs:.0f} | {ours:.0f} | {middle:.1f} ({low:.1f}–{high:.1f}) |")


if __name__ == "__main__":
    main()
