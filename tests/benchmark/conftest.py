"""A protocol on a copy of a tiny preprocessed data set."""

import os
import shutil
from pathlib import Path

import pytest
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from workspace import ForkedCommand

from nnunetv2_selfreg.benchmark import commands, protocols


@pytest.fixture
def protocol(data_sets, tmp_path, monkeypatch):
    """A protocol with a split of its own, on a copy of the preprocessed data set."""
    name = data_sets.name("labels")
    shutil.copytree(Path(os.environ["nnUNet_preprocessed"]) / name, tmp_path / "preprocessed" / name)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    plans = load_json(str(tmp_path / "preprocessed" / name / "nnUNetPlans.json"))
    stages = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_stages"]
    scale = {
        "device": "cpu",
        "plans": "nnUNetPlans",
        "configuration": "3d_tiny",
        "base": "3d_fullres",
        "settings": {"batch_size": 3},
        "architecture": {"features_per_stage": [2] * stages},
        "epochs": 1,
        "iterations": 1,
    }
    content = {"dataset": name, "split": {"labeled": 2, "val": 2, "in_order": True}, "scales": {"cpu": scale}}
    (tmp_path / "protocols").mkdir()
    save_json(content, str(tmp_path / "protocols" / "tiny.json"))
    monkeypatch.setattr(protocols, "FOLDER", tmp_path / "protocols")
    return tmp_path


@pytest.fixture
def quick_commands(monkeypatch):
    """nnU-Net's commands without the time of their imports, where no test depends on how they are started."""
    monkeypatch.setattr(commands, "Popen", ForkedCommand)
