"""A phantom data set with a configuration for each patch, preprocessed: what `gpu_check.sh` measures on.

    python scripts/gpu_check_data.py 128,128,128 80,112,112

Batches are of two; the networks are the ones that nnU-Net plans for such a patch, with 32 to 320 features.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import phantom
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunetv2_selfreg.benchmark.commands import add_configuration, call
from nnunetv2_selfreg.data.splits import append_fold

NAME = "Dataset997_GPUCheck"


def main() -> None:
    patches = [[int(side) for side in argument.split(",")] for argument in sys.argv[1:]]
    raw, preprocessed = (Path(os.environ[name]) / NAME for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    phantom.write_dataset(raw, train=6, shape=[max(sides) + 8 for sides in zip(*patches, strict=True)])
    log = raw.parent / "preparation.txt"
    call("nnUNetv2_plan_and_preprocess", "-d", NAME[7:10], "-c", "3d_fullres", "-np", "6", log=log)
    for patch in patches:
        name = f"3d_{'x'.join(map(str, patch))}"
        settings = {"patch_size": patch, "batch_size": 2}
        add_configuration(preprocessed / "nnUNetPlans.json", name, "3d_fullres", settings, architecture(patch))
    append_fold(NAME, labeled=3, val=1)


def architecture(patch: list[int]) -> dict:
    """Arguments of nnU-Net's network for a patch."""
    _, strides, kernel_sizes, *_ = get_pool_and_conv_props(phantom.SPACING, patch, 4, 999)
    stages = len(strides)
    return {
        "n_stages": stages,
        "features_per_stage": [min(32 * 2**stage, 320) for stage in range(stages)],
        "strides": strides,
        "kernel_sizes": kernel_sizes,
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }


if __name__ == "__main__":
    main()
