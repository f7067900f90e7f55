"""What every trainer owes its users, as one test class to inherit: set `trainer`, and what differs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from workspace import CASES, LABELS, SHAPE, Commands, InProcess, Run, command, read_labels

CELLS = [(v, c) for v in ("labels", "regions", "ignore", "regions_ignore") for c in ("2d", "3d_fullres")]
TWO_CELLS = [("labels", "3d_fullres"), ("regions_ignore", "2d")]
ONE_CELL = TWO_CELLS[1:]
NNUNET_KEYS = {"mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses", "lrs"}


class Cells:
    """The cells of a trainer, each run once: a short training, interrupted, resumed and validated."""

    def __init__(self, trainer: str, data_sets, runner, prepare: Callable[[Run], object]) -> None:
        self.trainer = trainer
        self.prepare = prepare
        self.data_sets = data_sets
        self.runner = runner
        self._done: set[Run] = set()

    def trained(self, variant: str, configuration: str, fold: int | str = 0) -> Run:
        run = Run(self.data_sets.name(variant), configuration, f"{self.trainer}_2epochs_2iters", fold)
        if run not in self._done:
            self.prepare(run)
            self.runner.train_and_interrupt(run)
            self.runner.resume(run)
            self._done.add(run)
        return run


class TrainerMatrix:
    """{labels, regions, ignore label, both} x {2d, 3d_fullres} and the cascade: train, resume, validate, predict."""

    trainer: str
    terms: tuple[str, ...] = ()
    """Names of the logged terms."""
    network_is_stock = True
    """Whether the planned network is trained, so that stock nnU-Net can use the weights."""
    trains_cascades = True
    """Whether a cascade trains, or NotImplementedError says that it does not."""
    chosen = CELLS
    """The cells that run without --commands: fewer for a trainer that shares nearly all with one that runs them all."""
    cascade_is_chosen = True
    """Whether the cascade runs without --commands."""

    @staticmethod
    def prepare(run: Run) -> None:
        """Makes what a training needs beside nnU-Net's files."""

    @pytest.mark.parametrize(("variant", "configuration"), CELLS)
    def test_trains_resumes_validates_and_predicts(self, variant, configuration, cells, tmp_path, only_if_chosen):
        only_if_chosen((variant, configuration) in self.chosen)
        run = cells.trained(variant, configuration)
        self.check_training(run)
        cells.runner.predict(run, run.raw / "imagesTs", tmp_path)
        self.check_prediction(tmp_path)
        if self.network_is_stock:
            self.check_stock_prediction(run, tmp_path, tmp_path / "stock")

    def test_cascade(self, cells, tmp_path, only_if_chosen):
        only_if_chosen(self.cascade_is_chosen)
        if not self.trains_cascades:
            run = Run(cells.data_sets.name("labels"), "3d_cascade_fullres", self.trainer)
            with pytest.raises(NotImplementedError, match="3d_cascade_fullres"):
                run.build().initialize()
            return
        low = cells.trained("labels", "3d_lowres", "all")  # so that all cases are predicted for the next stage
        cells.runner.predict(low, low.raw / "imagesTs", tmp_path / "low")
        run = cells.trained("labels", "3d_cascade_fullres")
        self.check_training(run)
        cells.runner.predict(run, run.raw / "imagesTs", tmp_path / "full", tmp_path / "low")
        self.check_prediction(tmp_path / "full")

    def check_training(self, run: Run) -> None:
        checkpoint = run.load()
        assert checkpoint["trainer_name"] == run.trainer
        assert checkpoint["current_epoch"] == 2
        curves = checkpoint["logging"]
        assert set(self.terms) | NNUNET_KEYS <= set(curves)
        for name in self.terms:
            assert len(curves[name]) == 2, name
            assert np.isfinite(curves[name]).all(), name
        assert not list(run.folder.glob("*.part"))
        assert not (run.folder / "checkpoint_latest.pth").exists()
        assert (run.folder / "progress.png").is_file()
        summary = load_json(str(run.folder / "validation" / "summary.json"))
        assert len(summary["metric_per_case"]) == 2
        assert len(list((run.folder / "validation").glob("*.npz"))) == 2

    def check_prediction(self, folder: Path) -> None:
        (file,) = folder.glob("*.nii.gz")
        labels = read_labels(file)
        assert labels.shape == SHAPE
        assert set(np.unique(labels)) <= set(LABELS.values())

    def check_stock_prediction(self, run: Run, prediction: Path, output: Path) -> None:
        """The checkpoint under the name of plain nnUNetTrainer predicts the same."""
        stock = Run(run.data_set, run.configuration, "nnUNetTrainer", run.fold)
        shutil.rmtree(stock.model_folder, ignore_errors=True)
        shutil.copytree(run.model_folder, stock.model_folder, ignore=shutil.ignore_patterns("validation"))
        torch.save({**run.load(), "trainer_name": "nnUNetTrainer"}, stock.folder / "checkpoint_final.pth")
        InProcess().predict(stock, stock.raw / "imagesTs", output)
        shutil.rmtree(stock.model_folder)
        (mine,) = prediction.glob("*.nii.gz")
        np.testing.assert_array_equal(read_labels(mine), read_labels(output / mine.name))


class TrainerContract(TrainerMatrix):
    """The matrix, then nnU-Net's tools on the result, and a cell through nnU-Net's commands."""

    tools_are_chosen = True
    """Whether tools and commands run without --commands: not for a trainer whose files are like another's."""

    def test_tools_after_training(self, cells, tmp_path, monkeypatch, only_if_chosen):
        only_if_chosen(self.tools_are_chosen)
        flat, full = (cells.trained("labels", configuration) for configuration in ("2d", "3d_fullres"))
        found = command(
            "nnUNetv2_find_best_configuration", flat.data_set, "-c", "2d", "3d_fullres", "-tr", flat.trainer, "-f", "0"
        )
        assert "ensemble" in found
        for run in (flat, full):
            InProcess().predict(run, run.raw / "imagesTs", tmp_path / run.configuration)
        folders = [str(tmp_path / c) for c in ("2d", "3d_fullres")]
        command("nnUNetv2_ensemble", "-i", *folders, "-o", str(tmp_path / "ensemble"), "-np", "1")
        self.check_prediction(tmp_path / "ensemble")
        self.check_export_and_import(full, tmp_path, monkeypatch)

    def test_one_cell_through_the_commands(self, data_sets, tmp_path, only_if_chosen):
        """Killed and resumed, validated again, predicted; trained on all cases from these weights."""
        only_if_chosen(self.tools_are_chosen)
        runner = Commands()
        run = Run(data_sets.name("labels"), "3d_fullres", f"{self.trainer}_2epochs_3iters")
        self.prepare(run)
        runner.train_and_interrupt(run)
        runner.resume(run)
        self.check_training(run)
        shutil.rmtree(run.folder / "validation")
        command("nnUNetv2_train", run.data_set, run.configuration, "0", "-tr", run.trainer, "-device", "cpu", "--val")
        assert (run.folder / "validation" / "summary.json").is_file()
        runner.predict(run, run.raw / "imagesTs", tmp_path)
        self.check_prediction(tmp_path)
        weights = ["-pretrained_weights", str(run.folder / "checkpoint_final.pth")]
        whole = Run(run.data_set, run.configuration, f"{self.trainer}_1epochs_1iters", "all")
        self.prepare(whole)
        command(
            "nnUNetv2_train", run.data_set, run.configuration, "all", "-tr", whole.trainer, "-device", "cpu", *weights
        )
        assert len(list((whole.folder / "validation").glob("*.nii.gz"))) == CASES

    def check_export_and_import(self, run: Run, folder: Path, monkeypatch) -> None:
        archive = str(folder / "model.zip")
        model = ["-d", run.data_set, "-c", run.configuration, "-tr", run.trainer, "-f", "0"]
        command("nnUNetv2_export_model_to_zip", *model, "-o", archive)
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        command("nnUNetv2_install_pretrained_model_from_zip", archive, nnUNet_results=str(elsewhere))
        monkeypatch.setenv("nnUNet_results", str(elsewhere))
        InProcess().predict(run, run.raw / "imagesTs", folder / "imported")
        self.check_prediction(folder / "imported")
