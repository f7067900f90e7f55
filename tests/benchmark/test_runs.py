"""A protocol on a tiny data set through nnU-Net's commands: prepared, run, skipped, repeated, printed as jobs."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from tqdm import tqdm
from workspace import wait_until

from nnunetv2_selfreg import cli
from nnunetv2_selfreg.benchmark import commands, runs
from nnunetv2_selfreg.benchmark.protocol import Protocol
from nnunetv2_selfreg.errors import UserError

TRAINERS_THAT_FAIL = """
import time

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class nnUNetTrainerNaN(nnUNetTrainer):
    def train_step(self, batch):
        return {"loss": super().train_step(batch)["loss"] * float("nan")}


class nnUNetTrainerSelfRegNaN(SelfRegularized, nnUNetTrainer):
    def optimise(self, batch):
        return {"loss": super().optimise(batch)["loss"] * float("nan")}


class nnUNetTrainerFullDisk(nnUNetTrainer):
    def save_checkpoint(self, filename):
        super().save_checkpoint("/dev/full")


class nnUNetTrainerSlow(nnUNetTrainer):
    def on_epoch_end(self):
        super().on_epoch_end()
        time.sleep(3)
"""


@pytest.fixture
def failing_trainers(protocol, monkeypatch):
    (protocol / "trainers").mkdir()
    (protocol / "trainers" / "failing.py").write_text(TRAINERS_THAT_FAIL)
    folders = os.pathsep.join([os.environ["nnUNet_extTrainer"], str(protocol / "trainers")])
    monkeypatch.setenv("nnUNet_extTrainer", folders)


def run(folder: Path, *options: str) -> int:
    return main("tiny", "-o", str(folder / "runs"), *options)


def main(*arguments: str) -> int:
    return cli.main(["benchmark", "run", *arguments])


def test_run_from_the_raw_data_set_is_measured_then_skipped_then_repeated_when_its_checkpoint_is_broken(
    protocol, data_sets, quick_commands, monkeypatch, capsys, shown_bars
):
    monkeypatch.setenv("nnUNet_preprocessed", str(protocol / "new"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner sets so many threads
    content = load_json(str(protocol / "protocols" / "tiny.json"))
    content["scales"]["cpu"] |= {"plans": "Coarse", "spacing": [3.5, 3, 3], "architecture": {}}
    save_json(content, str(protocol / "protocols" / "tiny.json"))
    assert run(protocol) == 0
    assert shown_bars == [(1, 1)]
    told = capsys.readouterr().out
    assert f"The results are in {protocol / 'runs' / 'tiny-cpu'}." in told
    assert f"nnUNetv2_selfreg benchmark report {protocol / 'runs' / 'tiny-cpu'} -o report" in told
    data_set = protocol / "new" / data_sets.name("labels")
    configurations = load_json(str(data_set / "Coarse.json"))["configurations"]
    assert configurations["3d_fullres"]["spacing"] == [3.5, 3, 3]
    assert configurations["3d_tiny"]["batch_size"] == 3
    splits = load_json(str(data_set / "splits_final.json"))
    assert [len(splits[5][part]) for part in ("train", "val")] == [2, 2]  # after nnU-Net's own folds

    folder = protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold5-1"
    result = load_json(str(folder / "result.json"))
    checkpoint = torch.load(folder / result["validation"] / "../checkpoint_final.pth", weights_only=False)
    parts = [t for name, t in checkpoint["network_weights"].items() if not name.startswith("decoder.encoder.")]
    parts = [t for t in parts if t.ndim > 0]
    assert result["parameters"] == sum({t.data_ptr(): t.numel() for t in parts}.values())
    assert len(result["curves"]["train_losses"]) == 1
    assert "nnUNetTrainer_1epochs_1iters" in result["command"]
    assert result["peak_memory_mib"] > 50
    assert 0 < result["prediction_seconds"] < 600
    assert result["failure"] is None
    assert result["environment"]["nnUNet_n_proc_DA"] == "1"
    assert result["commit"] is None or re.fullmatch(r"[0-9a-f]{7,}\+?", result["commit"])
    with (folder / "metrics.csv").open(newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == set(splits[5]["val"])
    predictions = {file.name for file in (folder / result["validation"]).glob("*.nii.gz")}
    assert predictions == {f"{case}.nii.gz" for case in splits[5]["val"]}

    before = (folder / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(protocol) == 0
    out, errors = capsys.readouterr()
    assert "1 of 1 runs are finished" in out
    assert "epoch" not in errors  # no bar for nothing
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert len(load_json(str(data_set / "splits_final.json"))) == 6

    (folder / "result.json").unlink()
    halves = [data_set / "dataset_fingerprint.json", data_set / "Coarse.json"]
    for file in [*folder.rglob("checkpoint_*.pth"), *halves]:
        os.truncate(file, file.stat().st_size // 2)
    assert run(protocol) == 0
    assert "checkpoint_final.pth is broken and removed" in capsys.readouterr().err
    assert load_json(str(folder / "result.json"))["curves"]["train_losses"] != result["curves"]["train_losses"]


def test_runs_that_diverge_are_results_and_the_rest_goes_on(
    protocol, failing_trainers, quick_commands, monkeypatch, capsys
):
    assert run(protocol, "-tr", "nnUNetTrainerNaN", "nnUNetTrainerSelfRegNaN") == 1
    errors = capsys.readouterr().err
    for trainer, reason in (
        ("nnUNetTrainerNaN", "it diverged: the training loss of the last epoch is nan"),
        ("nnUNetTrainerSelfRegNaN", "it diverged: Training stopped in epoch 0: loss is nan"),
    ):
        folder = protocol / "runs" / "tiny-cpu" / f"{trainer}-fold2-1"
        assert load_json(str(folder / "result.json"))["failure"].startswith(reason)
        assert not (folder / "metrics.csv").exists()
        assert f"{trainer}-fold2-1: {reason}" in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_named_and_ends_the_benchmark(protocol, failing_trainers, quick_commands, monkeypatch, capsys):
    assert run(protocol, "-tr", "nnUNetTrainerFullDisk", "--repetitions", "2") == 1
    errors = capsys.readouterr().err
    assert "No space left on device" in errors
    assert "Make room and start again: finished runs are kept." in errors
    assert not list(protocol.rglob("result.json"))
    assert not (protocol / "runs" / "tiny-cpu" / "nnUNetTrainerFullDisk-fold2-2" / "log.txt").exists()


@pytest.mark.matrix
def test_killed_benchmark_then_killed_training_with_workers(protocol, failing_trainers, monkeypatch):
    """The next benchmark waits for the training that was left behind; when that is killed too, its workers are ended,
    and the training goes on from its last checkpoint."""
    content = load_json(str(protocol / "protocols" / "tiny.json"))
    content["scales"]["cpu"]["epochs"] = 4
    save_json(content, str(protocol / "protocols" / "tiny.json"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    own = ["--protocol", str(protocol / "protocols" / "tiny.json"), "-o", str(protocol / "runs")]
    start = [sys.executable, "-m", "nnunetv2_selfreg.cli", "benchmark", "run", *own, "-tr", "nnUNetTrainerSlow"]
    folder = protocol / "runs" / "tiny-cpu" / "nnUNetTrainerSlow-fold2-1"

    first = subprocess.Popen(start)
    wait_until(lambda: list(folder.rglob("checkpoint_latest.pth")))
    trainer = int((folder / "lock").read_text().split()[1])
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.Popen(start, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "was left behind and still works" in second.stderr.readline())
    workers = psutil.Process(trainer).children(recursive=True)
    assert workers
    os.kill(trainer, signal.SIGKILL)
    threading.Thread(target=second.stderr.read).start()
    assert second.wait(timeout=240) == 0
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    curves = load_json(str(folder / "result.json"))["curves"]
    assert len(curves["train_losses"]) == 4
    assert (folder / "log.txt").read_text().count("Epoch 0") == 1
    assert (folder / "lock").read_text() == ""


def change_a_protocol(protocol):
    content = load_json(str(protocol / "protocols" / "tiny.json"))
    content["scales"]["cpu"]["iterations"] = 7
    save_json(content, str(protocol / "protocols" / "tiny.json"))
    return "iterations"


def change_the_plan(protocol):
    (file,) = protocol.glob("preprocessed/*/nnUNetPlans.json")
    plans = load_json(str(file))
    plans["configurations"]["3d_fullres"]["spacing"] = [7.0, 7.0, 7.0]
    save_json(plans, str(file))
    return "configuration"


def add_an_unlabeled_case(protocol):
    folder = next(protocol.glob("preprocessed/*/nnUNetPlans_3d_fullres"))
    other = folder.with_name(f"{folder.name}_unlabeled")
    other.mkdir(exist_ok=True)
    (other / "new.pkl").touch()
    return "unlabeled"


@pytest.mark.parametrize("change", [change_a_protocol, change_the_plan, add_an_unlabeled_case])
def test_runs_that_would_differ_in_more_than_the_trainer_are_refused(change, protocol, monkeypatch, capsys):
    assert run(protocol, "-tr", "nnUNetTrainer", "--jobs") == 0
    name = change(protocol)
    assert run(protocol, "-tr", "nnUNetTrainerSelfReg", "--jobs") == 2
    error = capsys.readouterr().err
    assert f"setting-fold2.json says that the runs beside it were made with other {name}. Take another -o" in error


def test_run_whose_folder_cannot_be_made_does_not_end_the_others(protocol, quick_commands, monkeypatch, capsys):
    (protocol / "runs" / "tiny-cpu").mkdir(parents=True)
    (protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-1").touch()
    assert run(protocol, "--repetitions", "2", "-tr", "nnUNetTrainer") == 1
    assert "nnUNetTrainer-fold2-1: [Errno 17] File exists" in capsys.readouterr().err
    assert (protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-2" / "result.json").is_file()


def test_full_disk_in_the_preparation(protocol, monkeypatch, capsys):
    def fail(*_):
        raise commands.ExitStatusError("nnUNetv2_preprocess failed", "OSError: [Errno 28] No space left on device")

    monkeypatch.setattr(Protocol, "prepare", fail)
    assert run(protocol) == 1
    assert "Make room and start again" in capsys.readouterr().err


def test_failed_preparation_shows_what_nnunet_said(protocol, monkeypatch, capsys):
    def fail(*_):
        raise commands.ExitStatusError("nnUNetv2_preprocess failed:\nImageFileError: case_3", "")

    monkeypatch.setattr(Protocol, "prepare", fail)
    assert run(protocol) == 2
    *_, said, last = capsys.readouterr().err.splitlines()
    assert said == "ImageFileError: case_3"
    assert last.startswith("nnUNetv2_selfreg: nnU-Net's preparation of the data set failed; what it said is above")


def test_any_preprocessed_data_set_without_a_protocol(protocol, monkeypatch, capsys):
    (data_set,) = (protocol / "preprocessed").glob("*/")
    options = ["-d", data_set.name, "-c", "3d_fullres", "-f", "0", "1", "--epochs", "3", "-o", str(protocol / "runs")]
    assert main(*options, "-device", "cpu", "--jobs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert cli.main([*shlex.split(lines[1])[1:], "--jobs"]) == 0  # a job is a command like another
    assert capsys.readouterr().out.splitlines() == [lines[1]]


def test_jobs_of_a_protocol_of_ones_own_can_be_started_in_any_folder(protocol, monkeypatch, capsys, tmp_path):
    (protocol / "of my own").mkdir()
    (protocol / "protocols" / "tiny.json").rename(protocol / "of my own" / "mine.json")
    monkeypatch.chdir(protocol)
    assert main("--protocol", "of my own/mine.json", "--scale", "cpu", "-o", "my runs", "--jobs") == 0
    (line,) = capsys.readouterr().out.splitlines()
    monkeypatch.chdir(tmp_path.parent)
    assert cli.main([*shlex.split(line)[1:], "--jobs"]) == 0
    assert capsys.readouterr().out.splitlines() == [line]
    assert (protocol / "my runs" / "mine-cpu" / "setting-fold2.json").is_file()


class ShortRun:
    """Of 4 epochs, of which as many are left as it is told; some fail before the last one."""

    protocol = Protocol("p", "Dataset001_D", "plans", "3d_fullres", epochs=4, iterations=1)
    folder = Path("p/run")

    def __init__(self, left: int, error: Exception | None = None):
        self.left, self.error = left, error

    def execute(self, on_epoch):
        for left in reversed(range(1 if self.error else 0, self.left)):
            on_epoch(left)
        if self.error:
            raise self.error


def test_bar_counts_the_epochs_that_are_left(shown_bars, capsys):
    short = [ShortRun(2), ShortRun(3, UserError("broken")), ShortRun(4), ShortRun(0)]
    assert runs.execute(short) == 1
    assert shown_bars == [(1, 14), (2, 14), (3, 13), (4, 13), (5, 12), (6, 12), (7, 12), (8, 12)]
    errors = capsys.readouterr().err
    assert "8/8 [" in errors
    assert "run: broken" in errors


@pytest.fixture
def shown_bars(monkeypatch):
    """The epochs done and all of them, after each epoch."""
    shown = []

    class Bar(tqdm):
        def update(self, n=1):
            super().update(n)
            shown.append((self.n, self.total))

    monkeypatch.setattr(runs, "tqdm", Bar)
    return shown


def test_unknown_trainer_is_one_line_before_anything_is_made(protocol, monkeypatch, capsys):
    assert run(protocol, "-tr", "nnUNetTrainer", "nnUNetTrainerUnknown") == 2
    error = capsys.readouterr().err
    assert error.startswith("nnUNetv2_selfreg: -tr nnUNetTrainerUnknown: RuntimeError: Could not find requested")
    assert error.count("\n") == 1
    assert not (protocol / "runs").exists()


TRANSFORMERS = """
import sys, types

class Alias(types.ModuleType):
    def __getattr__(self, name):  # as those of transformers 5, which import what they stand for when they are looked at
        sys.modules[f"transformers.loaded_{len(sys.modules)}"] = types.ModuleType(name)
        raise AttributeError(name)

sys.modules["transformers.alias"] = Alias("transformers.alias")
"""


def test_trainers_are_found_where_modules_import_others_when_they_are_looked_at(tmp_path):
    """MONAI loads transformers if it is there; nnU-Net's search iterates over sys.modules and looks at each."""
    (tmp_path / "transformers.py").write_text(TRANSFORMERS)
    find = "import nnunetv2_selfreg.benchmark.runs as runs; runs.discovery.require(['nnUNetTrainerSelfReg'])"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", find], env=environment, check=True, stdout=subprocess.DEVNULL)


def test_failed_run_is_reported_and_the_status_tells(protocol, quick_commands, monkeypatch, capsys):
    monkeypatch.setattr(runs.discovery, "require", lambda names: None)  # it is found here, and not by the command
    assert run(protocol, "-tr", "nnUNetTrainerUnknown") == 1
    error = capsys.readouterr().err
    assert "nnUNetTrainerUnknown-fold2-1: nnUNetv2_train" in error
    assert not list(protocol.rglob("result.json"))


def test_jobs_are_one_command_for_each_unfinished_run(protocol, monkeypatch, capsys):
    finished = protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-1"
    finished.mkdir(parents=True)
    (finished / "result.json").touch()
    assert run(protocol, "-tr", "nnUNetTrainer", "nnUNetTrainerSelfReg", "--repetitions", "2", "--jobs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    start = f"nnUNetv2_selfreg benchmark run tiny -o {protocol / 'runs'} -tr"
    assert lines[0] == f"{start} nnUNetTrainerSelfReg -f 2 --only 1 -device cpu"
    assert lines[1] == f"{start} nnUNetTrainer -f 2 --only 2 -device cpu"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["nothing"], "there is no protocol nothing; there are tiny"),
        (["tiny", "--scale", "x"], "has no scale x; it has cpu"),
        (["tiny", "-d", "99"], "There is no data set 99 in nnUNet_raw"),
        (["tiny", "-f", "0"], "-f: tiny-cpu has a split of its own, which is fold 2 here"),
        (
            ["-d", "NAME", "-c", "3d_fullres", "-f", "9", "-device", "cpu"],
            "splits_final.json has no fold 9; it has 0 to 1",
        ),
        (["-d", "NAME", "-c", "3d_fullres", "-f", "-1", "-device", "cpu"], "splits_final.json has no fold -1"),
        (["tiny", "-o", "/dev/null/runs"], "Not a directory"),
        (["tiny", "-c", "2d"], "has its own configuration"),
        (["--protocol", "nowhere/mine.json"], "nowhere/mine.json is no file. Give the path"),
        (["tiny", "--protocol", "mine.json"], "tiny and --protocol are two protocols. Give one of them."),
        (["--protocol", "mine.json", "--epochs", "3"], "has its own configuration"),
        (["-c", "2d"], "name a protocol (tiny), or a data set"),
        (["-d", "NAME", "-c", "2d", "--scale", "full"], "--scale is one of a protocol's"),
        (["-d", "NAME", "-c", "unknown", "-device", "cpu"], "nnUNetPlans.json has no configuration unknown; it has"),
        (["-d", "NAME", "-c", "2d", "-p", "Other", "-device", "cpu"], "Other.json does not exist. Run nnUNetv2_plan"),
    ],
)
def test_wrong_options_are_one_line_that_names_what_there_is(options, reason, protocol, monkeypatch, capsys):
    (data_set,) = (protocol / "preprocessed").glob("*/")
    options = [data_set.name if option == "NAME" else option for option in options]
    assert main("-o", str(protocol / "runs"), *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnUNetv2_selfreg: ")
    assert error.count("\n") == 1
    assert reason in error


def test_repetitions_are_counted_from_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        main("tiny", "-o", "runs", "--repetitions", "0")
    assert "0 is no whole number from 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(protocol, monkeypatch, capsys):
    assert run(protocol, "-device", "cuda") == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_configuration_of_another_content_is_left_alone(protocol, monkeypatch, capsys):
    assert run(protocol, "--jobs") == 0
    (file,) = (protocol / "preprocessed").glob("*/nnUNetPlans.json")
    plans = load_json(str(file))
    plans["configurations"]["3d_tiny"]["batch_size"] = 4
    save_json(plans, str(file))
    assert run(protocol) == 2
    assert "has a configuration 3d_tiny with other content" in capsys.readouterr().err
