"""Each variant of scripts/trials trains a step with the weights that it is named for."""

import os
from pathlib import Path

import pytest
from workspace import Run

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "trials"
LAMBDAS = {
    "ScrOnly": (0.015, 0),
    "IfdOnly": (0, 0.015),
    "Tenth": (0.0015, 0.0015),
    "Strong": (0.1, 0.1),
    "PaperIFD": (0.015, 0.015),
    "Warm": (0.015 * 0.0067379, 0.015 * 0.0067379),  # exp(-5) at the start
}


@pytest.mark.parametrize("variant", LAMBDAS)
def test_variant_of_selfreg(variant, data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([os.environ["nnUNet_extTrainer"], str(FOLDER)]))
    name = f"nnUNetTrainerSelfReg{variant}"
    trainer = Run(data_sets.name("labels"), "2d", name).build()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    outputs = trainer.train_step(next(trainer.dataloader_train))
    lambdas = LAMBDAS[variant]
    weighted = sum(weight * outputs.get(term, 0) for weight, term in zip(lambdas, ("scr", "ifd"), strict=True))
    assert outputs["loss"] == pytest.approx(outputs["segmentation"] + weighted, rel=1e-5)
    assert weighted > 0
    assert (trainer.loss.ifd_order, trainer.loss.ifd_stop_gradient) == (
        ("index", True) if variant == "PaperIFD" else ("activation", False)
    )
