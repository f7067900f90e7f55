"""A protocol on a tiny data set through nnU-Net's commands: prepared, run, skipped, repeated, printed as jobs."""

import csv
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import benchmark
import protocol as protocols
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json

TRAINERS_THAT_DIVERGE = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerNaN(nnUNetTrainer):
    def train_step(self, batch):
        return {"loss": super().train_step(batch)["loss"] * float("nan")}


class nnUNetTrainerSelfRegNaN(SelfRegularized, nnUNetTrainer):
    def optimise(self, batch):
        return {"loss": super().optimise(batch)["loss"] * float("nan")}
"""


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
    monkeypatch.setattr(protocols, "PROTOCOLS", tmp_path / "protocols")
    return tmp_path


def run(monkeypatch, folder: Path, *options: str) -> int:
    return main(monkeypatch, "tiny", "-o", str(folder / "runs"), *options)


def main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    return benchmark.main()


def test_run_from_the_raw_data_set_is_measured_then_skipped_then_repeated_when_its_checkpoint_is_broken(
    protocol, data_sets, monkeypatch, capsys
):
    monkeypatch.setenv("nnUNet_preprocessed", str(protocol / "new"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner sets so many threads
    (protocol / "new").mkdir()
    content = load_json(str(protocol / "protocols" / "tiny.json"))
    content["scales"]["cpu"] |= {"plans": "Coarse", "spacing": [3.5, 3, 3], "architecture": {}}
    save_json(content, str(protocol / "protocols" / "tiny.json"))
    assert run(monkeypatch, protocol) == 0
    data_set = protocol / "new" / data_sets.name("labels")
    configurations = load_json(str(data_set / "Coarse.json"))["configurations"]
    assert configurations["3d_fullres"]["spacing"] == [3.5, 3, 3]
    assert configurations["3d_tiny"]["batch_size"] == 3
    splits = load_json(str(data_set / "splits_final.json"))
    assert [len(splits[5][part]) for part in ("train", "val")] == [2, 2]  # after nnU-Net's own folds

    folder = protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold5-1"
    result = load_json(str(folder / "result.json"))
    assert result["parameters"] > 0
    assert len(result["curves"]["train_losses"]) == 1
    assert "nnUNetTrainer_1epochs_1iters" in result["command"]
    assert result["peak_memory_mib"] > 50
    assert 0 < result["prediction_seconds"] < 600
    assert result["failure"] is None
    with (folder / "metrics.csv").open(newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == set(splits[5]["val"])
    predictions = {file.name for file in (folder / result["validation"]).glob("*.nii.gz")}
    assert predictions == {f"{case}.nii.gz" for case in splits[5]["val"]}

    before = (folder / "result.json").stat().st_mtime_ns
    assert run(monkeypatch, protocol) == 0
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert len(load_json(str(data_set / "splits_final.json"))) == 6

    (folder / "result.json").unlink()
    for checkpoint in folder.rglob("checkpoint_*.pth"):
        os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    assert run(monkeypatch, protocol) == 0
    assert "checkpoint_final.pth is broken and removed" in capsys.readouterr().err
    assert load_json(str(folder / "result.json"))["curves"]["train_losses"] != result["curves"]["train_losses"]


def test_runs_that_diverge_are_results_and_the_rest_goes_on(protocol, monkeypatch, capsys):
    (protocol / "trainers").mkdir()
    (protocol / "trainers" / "diverging.py").write_text(TRAINERS_THAT_DIVERGE)
    folders = os.pathsep.join([os.environ["nnUNet_extTrainer"], str(protocol / "trainers")])
    monkeypatch.setenv("nnUNet_extTrainer", folders)
    assert run(monkeypatch, protocol, "-tr", "nnUNetTrainerNaN", "nnUNetTrainerSelfRegNaN") == 1
    errors = capsys.readouterr().err
    for trainer, reason in (
        ("nnUNetTrainerNaN", "it diverged: the training loss of epoch 0 is nan"),
        ("nnUNetTrainerSelfRegNaN", "it diverged: FloatingPointError: Training stopped in epoch 0: loss is nan"),
    ):
        folder = protocol / "runs" / "tiny-cpu" / f"{trainer}-fold2-1"
        assert load_json(str(folder / "result.json"))["failure"].startswith(reason)
        assert not (folder / "metrics.csv").exists()
        assert f"{trainer}-fold2-1: {reason}" in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_one_line_and_ends_the_benchmark(protocol, monkeypatch, capsys):
    folder = protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-1"
    folder.mkdir(parents=True)
    (folder / "log.txt").symlink_to("/dev/full")
    assert run(monkeypatch, protocol, "--repetitions", "2") == 1
    assert "No space left on device. Make room and start again" in " ".join(capsys.readouterr().err.split())
    assert not list(protocol.rglob("result.json"))
    assert not (protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-2").exists()


def test_a_run_left_behind_by_a_killed_benchmark_holds_the_lock(tmp_path, capsys):
    with benchmark.locked(tmp_path / "lock") as descriptor:
        left_behind = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    entered = threading.Event()

    def second():
        with benchmark.locked(tmp_path / "lock"):
            entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not entered.wait(1)
    left_behind.communicate(b"\n")
    assert entered.wait(30)
    thread.join()
    assert f"{tmp_path.name} is being trained by another process" in capsys.readouterr().err


def test_broken_checkpoints_are_removed_and_whole_ones_kept(tmp_path):
    torch.save({"network_weights": torch.zeros(100)}, tmp_path / "checkpoint_best.pth")
    content = (tmp_path / "checkpoint_best.pth").read_bytes()
    (tmp_path / "checkpoint_latest.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "checkpoint_final.pth").touch()
    benchmark.remove_broken_checkpoints(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_best.pth"]


def test_interrupted_preprocessing_is_noticed(protocol):
    tiny = protocols.Protocol.load("tiny", "cpu")
    configurations = load_json(str(tiny.folder / "nnUNetPlans.json"))["configurations"]
    assert tiny._is_preprocessed(configurations, "3d_fullres")
    next((tiny.folder / "nnUNetPlans_3d_fullres").glob("*.pkl")).unlink()
    assert not tiny._is_preprocessed(configurations, "3d_fullres")


def test_any_preprocessed_data_set_without_a_protocol(protocol, monkeypatch, capsys):
    (data_set,) = (protocol / "preprocessed").iterdir()
    options = ["-d", data_set.name, "-c", "3d_fullres", "-f", "0", "1", "--epochs", "3", "-o", str(protocol / "runs")]
    assert main(monkeypatch, *options, "-device", "cpu", "--jobs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    words = lines[1].split()
    assert main(monkeypatch, *words[2:], "--jobs") == 0  # a job is a command that this script takes
    assert capsys.readouterr().out.splitlines() == [lines[1]]


def test_failed_run_is_reported_and_the_status_tells(protocol, monkeypatch, capsys):
    assert run(monkeypatch, protocol, "-tr", "nnUNetTrainerUnknown") == 1
    error = capsys.readouterr().err
    assert "nnUNetTrainerUnknown-fold2-1: nnUNetv2_train" in error
    assert not list(protocol.rglob("result.json"))


def test_jobs_are_one_command_for_each_unfinished_run(protocol, monkeypatch, capsys):
    finished = protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-1"
    finished.mkdir(parents=True)
    (finished / "result.json").touch()
    assert (
        run(monkeypatch, protocol, "-tr", "nnUNetTrainer", "nnUNetTrainerSelfReg", "--repetitions", "2", "--jobs") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    script = os.path.relpath(benchmark.__file__)
    start = f"python {script} tiny -o {protocol / 'runs'} -tr"
    assert lines[0] == f"{start} nnUNetTrainerSelfReg -f 2 --only 1 -device cpu"
    assert lines[1] == f"{start} nnUNetTrainer -f 2 --only 2 -device cpu"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["nothing"], "there is no protocol nothing; there are tiny"),
        (["tiny", "--scale", "x"], "has no scale x; it has cpu"),
        (["tiny", "-d", "99"], "99"),
        (["tiny", "-c", "2d"], "has its own configuration"),
        (["tiny", "--repetitions", "0"], "0 is not at least 1"),
        (["-c", "2d"], "name a protocol (tiny), or a data set"),
        (["-d", "NAME", "-c", "unknown"], "nnUNetPlans.json has no configuration unknown; it has"),
    ],
)
def test_wrong_options_are_one_line_that_names_what_there_is(options, reason, protocol, monkeypatch, capsys):
    (data_set,) = (protocol / "preprocessed").iterdir()
    options = [data_set.name if option == "NAME" else option for option in options]
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *options, "-o", str(protocol / "runs"))
    assert reason in capsys.readouterr().err


def test_configuration_of_another_content_is_left_alone(protocol, monkeypatch, capsys):
    assert run(monkeypatch, protocol, "--jobs") == 0
    file = next((protocol / "preprocessed").iterdir()) / "nnUNetPlans.json"
    plans = load_json(str(file))
    plans["configurations"]["3d_tiny"]["batch_size"] = 4
    save_json(plans, str(file))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, protocol)
    assert "has a configuration 3d_tiny with other content" in capsys.readouterr().err


@pytest.mark.parametrize("name", protocols.protocol_names())
def test_protocols_of_the_repository_load_at_every_scale(name):
    scales = load_json(str(protocols.PROTOCOLS / f"{name}.json"))["scales"]
    assert {"cpu", "full"} <= set(scales)
    for scale in scales:
        loaded = protocols.Protocol.load(name, scale)
        assert loaded.device == ("cpu" if scale == "cpu" else "cuda")
        assert bool(loaded.folds) != bool(loaded.split)


@pytest.mark.parametrize("name", ["left-atrium-8", "left-atrium-16"])
def test_published_patch_of_the_left_atrium(name):
    """112x112x80, in nnU-Net's order of axes, and a network that it divides."""
    published = protocols.Protocol.load(name, "published")
    assert published.settings == {"batch_size": 2, "patch_size": [80, 112, 112]}
    assert published.epochs * published.iterations == 6000
    factors = torch.tensor(published.architecture["strides"]).prod(0)
    assert (torch.tensor(published.settings["patch_size"]) % factors == 0).all()
    lengths = {key: len(value) for key, value in published.architecture.items() if isinstance(value, list)}
    assert lengths.pop("n_conv_per_stage_decoder") == published.architecture["n_stages"] - 1
    assert set(lengths.values()) == {published.architecture["n_stages"]}
