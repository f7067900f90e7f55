"""A protocol on a tiny data set through nnU-Net's commands: prepared, run, skipped, repeated, printed as jobs."""

import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from tqdm import tqdm
from workspace import ForkedCommand

import nnunetv2_selfreg.benchmark.runs as benchmark
from nnunetv2_selfreg.benchmark import commands, locks
from nnunetv2_selfreg.benchmark import protocol as protocols
from nnunetv2_selfreg.benchmark.run import (
    Memory,
    begun_epoch,
    is_full_disk,
    prediction_seconds,
    remove_broken_checkpoints,
    reported_divergence,
)

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


@pytest.fixture
def quick_commands(monkeypatch):
    """nnU-Net's commands without the time of their imports, where no test depends on how they are started."""
    monkeypatch.setattr(commands, "Popen", ForkedCommand)


@pytest.fixture
def failing_trainers(protocol, monkeypatch):
    (protocol / "trainers").mkdir()
    (protocol / "trainers" / "failing.py").write_text(TRAINERS_THAT_FAIL)
    folders = os.pathsep.join([os.environ["nnUNet_extTrainer"], str(protocol / "trainers")])
    monkeypatch.setenv("nnUNet_extTrainer", folders)


def run(monkeypatch, folder: Path, *options: str) -> int:
    return main(monkeypatch, "tiny", "-o", str(folder / "runs"), *options)


def main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    return benchmark.main()


def test_run_from_the_raw_data_set_is_measured_then_skipped_then_repeated_when_its_checkpoint_is_broken(
    protocol, data_sets, quick_commands, monkeypatch, capsys, shown_bars
):
    monkeypatch.setenv("nnUNet_preprocessed", str(protocol / "new"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner sets so many threads
    content = load_json(str(protocol / "protocols" / "tiny.json"))
    content["scales"]["cpu"] |= {"plans": "Coarse", "spacing": [3.5, 3, 3], "architecture": {}}
    save_json(content, str(protocol / "protocols" / "tiny.json"))
    assert run(monkeypatch, protocol) == 0
    assert shown_bars == [(1, 1)]
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
    assert run(monkeypatch, protocol) == 0
    out, errors = capsys.readouterr()
    assert "1 of 1 runs are finished" in out
    assert "epoch" not in errors  # no bar for nothing
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert len(load_json(str(data_set / "splits_final.json"))) == 6

    (folder / "result.json").unlink()
    halves = [data_set / "dataset_fingerprint.json", data_set / "Coarse.json"]
    for file in [*folder.rglob("checkpoint_*.pth"), *halves]:
        os.truncate(file, file.stat().st_size // 2)
    assert run(monkeypatch, protocol) == 0
    assert "checkpoint_final.pth is broken and removed" in capsys.readouterr().err
    assert load_json(str(folder / "result.json"))["curves"]["train_losses"] != result["curves"]["train_losses"]


def test_runs_that_diverge_are_results_and_the_rest_goes_on(
    protocol, failing_trainers, quick_commands, monkeypatch, capsys
):
    assert run(monkeypatch, protocol, "-tr", "nnUNetTrainerNaN", "nnUNetTrainerSelfRegNaN") == 1
    errors = capsys.readouterr().err
    for trainer, reason in (
        ("nnUNetTrainerNaN", "it diverged: the training loss of the last epoch is nan"),
        ("nnUNetTrainerSelfRegNaN", "it diverged: FloatingPointError: Training stopped in epoch 0: loss is nan"),
    ):
        folder = protocol / "runs" / "tiny-cpu" / f"{trainer}-fold2-1"
        assert load_json(str(folder / "result.json"))["failure"].startswith(reason)
        assert not (folder / "metrics.csv").exists()
        assert f"{trainer}-fold2-1: {reason}" in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_named_and_ends_the_benchmark(protocol, failing_trainers, quick_commands, monkeypatch, capsys):
    assert run(monkeypatch, protocol, "-tr", "nnUNetTrainerFullDisk", "--repetitions", "2") == 1
    errors = capsys.readouterr().err
    assert "No space left on device" in errors
    assert "Make room and start again: finished runs are kept." in errors
    assert not list(protocol.rglob("result.json"))
    assert not (protocol / "runs" / "tiny-cpu" / "nnUNetTrainerFullDisk-fold2-2" / "log.txt").exists()


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.matrix
def test_killed_benchmark_then_killed_training_with_workers(protocol, failing_trainers, monkeypatch):
    """The next benchmark waits for the training that was left behind; when that is killed too, its workers are ended,
    and the training goes on from its last checkpoint."""
    content = load_json(str(protocol / "protocols" / "tiny.json"))
    content["scales"]["cpu"]["epochs"] = 4
    save_json(content, str(protocol / "protocols" / "tiny.json"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    script = f"import pathlib; from nnunetv2_selfreg.benchmark import protocol; protocol.PROTOCOLS = pathlib.Path({str(protocol / 'protocols')!r})\n"
    script += "import sys; from nnunetv2_selfreg.benchmark import runs as benchmark; sys.exit(benchmark.main())"
    arguments = ["tiny", "-tr", "nnUNetTrainerSlow", "-o", str(protocol / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(Path(benchmark.__file__).parents[2])}
    start = [sys.executable, "-c", script, *arguments]
    folder = protocol / "runs" / "tiny-cpu" / "nnUNetTrainerSlow-fold2-1"

    first = subprocess.Popen(start, env=environment)
    wait_until(lambda: list(folder.rglob("checkpoint_latest.pth")))
    trainer = int((folder / "lock").read_text().split()[1])
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, text=True)
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


def test_command_ends_though_its_workers_live_and_they_end_with_it(tmp_path):
    """A killed nnU-Net leaves loading processes that hold its output."""
    worker = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()']).pid, flush=True)"
    lines = []
    with pytest.raises(commands.ExitStatusError, match="status -9"):
        commands.call(
            "python",
            "-c",
            worker + "; import os; os.kill(os.getpid(), 9)",
            log=tmp_path / "log.txt",
            on_line=lines.append,
        )
    wait_until(lambda: not psutil.pid_exists(int(lines[0])) or psutil.Process(int(lines[0])).status() == "zombie", 20)


def test_sigterm_ends_the_command_too(tmp_path):
    script = f"""
import pathlib; from nnunetv2_selfreg.benchmark import commands
commands.call("python", "-c", "import time; print('up', flush=True); time.sleep(600)",
              log=pathlib.Path({str(tmp_path / "log.txt")!r}), on_start=lambda process: print(process, flush=True))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(commands.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as caller:
        process = int(caller.stdout.readline())
        wait_until(lambda: "up" in (tmp_path / "log.txt").read_text())
        caller.terminate()
        assert caller.wait(20) == 143
    assert not psutil.pid_exists(process)


def test_lock_is_waited_for_and_names_who_holds_it(tmp_path, capsys):
    entered = threading.Event()

    def second():
        with locks.locked(tmp_path / "lock"):
            entered.set()

    with locks.locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(1)
    assert entered.wait(30)
    thread.join()
    assert f"{tmp_path / 'lock'} is locked by another process" in capsys.readouterr().err


@pytest.mark.parametrize("note", ["{host} 1", "{host} 1 0.5", "elsewhere 1 2e10"])
def test_half_a_note_or_another_machines_or_an_older_one_is_not_waited_for(note, tmp_path, monkeypatch):
    (tmp_path / "lock").write_text(note.format(host=socket.gethostname()))
    monkeypatch.setattr(locks, "kill_group", lambda group: pytest.fail("a stranger's group is ended"))
    with locks.locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("leader_is_dead", [False, True])
def test_what_a_killed_process_left_behind_is_waited_for_and_its_workers_are_ended(leader_is_dead, tmp_path):
    """The leader of a group with a worker; a dead one stays a zombie, since nobody asks for its status."""
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    leader = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    worker = int(leader.stdout.readline())
    locks.Lock(tmp_path / "lock").works_under_it(leader.pid)
    if leader_is_dead:
        leader.kill()
        wait_until(lambda: psutil.Process(leader.pid).status() == psutil.STATUS_ZOMBIE, 20)
    entered = threading.Event()

    def second():
        with locks.locked(tmp_path / "lock"):
            entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    if not leader_is_dead:
        assert not entered.wait(1.5)
        leader.kill()
    assert entered.wait(20)
    thread.join()
    wait_until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, 20)
    leader.wait()


def test_memory_is_the_commands_own_whatever_this_process_took(tmp_path):
    ballast = torch.ones(2**27)  # half a GiB
    memory = Memory("cpu")

    def start(process):
        memory.process = process

    def look(line):
        memory.look()

    script = "x = bytearray(200 * 2**20); print('now', flush=True); import time; time.sleep(1)"
    commands.call("python", "-c", script, log=tmp_path / "log.txt", on_start=start, on_line=look)
    assert len(ballast)
    assert 200 < memory.highest / 2**20 < 400


def test_prediction_time_is_the_median_between_cases():
    stamp = "2026-01-01 00:00:{:09.6f}: predicting case"
    assert prediction_seconds("\n".join(map(stamp.format, [1, 3, 6, 8]))) == 2
    assert prediction_seconds(stamp.format(1)) is None


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
    assert run(monkeypatch, protocol, "-tr", "nnUNetTrainer", "--jobs") == 0
    name = change(protocol)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, protocol, "-tr", "nnUNetTrainerSelfReg", "--jobs")
    error = capsys.readouterr().err
    assert f"setting-fold2.json says that the runs beside it were made with other {name}. Take another -o" in error


def test_full_disk_on_which_the_message_had_no_room_either(tmp_path, monkeypatch):
    error = commands.ExitStatusError("failed", "OSError: [Errno 28] No space le")
    assert not is_full_disk(error, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    assert is_full_disk(error, tmp_path)


def test_divergence_is_found_above_whatever_was_printed_later():
    output = "FloatingPointError: loss is nan\n" + "a worker ended\n" * 30
    assert reported_divergence(output) == "it diverged: FloatingPointError: loss is nan"
    assert reported_divergence("a worker ended") is None


def test_broken_checkpoints_are_removed_and_whole_ones_kept(tmp_path):
    for name in ("best", "final"):
        torch.save({"network_weights": torch.zeros(100000)}, tmp_path / f"checkpoint_{name}.pth")
    content = (tmp_path / "checkpoint_best.pth").read_bytes()
    (tmp_path / "checkpoint_latest.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "checkpoint_other.pth").touch()
    remove_broken_checkpoints(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint_best.pth", "checkpoint_final.pth"]


def test_best_checkpoint_is_no_start(tmp_path):
    """It was chosen on the validation cases."""
    for name in ("best", "latest"):
        torch.save({"network_weights": torch.zeros(10)}, tmp_path / f"checkpoint_{name}.pth")
    remove_broken_checkpoints(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "checkpoint_latest.pth").unlink()
    remove_broken_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_whose_folder_cannot_be_made_does_not_end_the_others(protocol, quick_commands, monkeypatch, capsys):
    (protocol / "runs" / "tiny-cpu").mkdir(parents=True)
    (protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-1").touch()
    assert run(monkeypatch, protocol, "--repetitions", "2", "-tr", "nnUNetTrainer") == 1
    assert "nnUNetTrainer-fold2-1: [Errno 17] File exists" in capsys.readouterr().err
    assert (protocol / "runs" / "tiny-cpu" / "nnUNetTrainer-fold2-2" / "result.json").is_file()


def test_full_disk_in_the_preparation(protocol, monkeypatch, capsys):
    def fail(*_):
        raise commands.ExitStatusError("nnUNetv2_preprocess failed", "OSError: [Errno 28] No space left on device")

    monkeypatch.setattr(protocols.Protocol, "prepare", fail)
    assert run(monkeypatch, protocol) == 1
    assert "Make room and start again" in capsys.readouterr().err


def test_memory_of_a_gpu_is_what_the_driver_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/used\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    (tmp_path / "used").write_text("1000\n")
    memory = Memory("cuda")
    for used in ("1500\n", "1200\n"):
        (tmp_path / "used").write_text(used)
        memory.look()
    assert memory.highest == 500 * 2**20
    assert (tmp_path / "asked").read_text().splitlines()[0].endswith("-i 3")


@pytest.mark.parametrize("answer", [None, "[N/A]"])
def test_memory_of_a_gpu_is_unknown_where_nobody_tells(answer, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if answer:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    memory = Memory("cuda")
    memory.look()
    assert memory.highest == 0


def test_half_preprocessed_folder_is_made_anew_only_if_it_was_begun_here(protocol, quick_commands, tmp_path):
    tiny = protocols.Protocol.load("tiny", "cpu")
    folder = tiny.folder / "nnUNetPlans_3d_fullres"
    first, second = load_json(str(tiny.folder / "splits_final.json"))[0]["val"]
    images, label = folder / f"{first}.pkl", tiny.folder / "gt_segmentations" / f"{second}.nii.gz"
    whole = label.read_bytes()
    images.unlink()
    os.truncate(label, 10)
    with pytest.raises(ValueError, match=rf"lacks {first}, {second} \(of 2\). Run nnUNetv2_preprocess"):
        tiny.prepare(tmp_path / "log.txt")
    begun = tiny.folder / f"{folder.name}.preprocessing"
    begun.touch()
    images.touch()  # as a kill leaves it
    tiny.prepare(tmp_path / "log.txt")
    assert images.stat().st_size > 0
    assert label.read_bytes() == whole
    assert not begun.exists()


@pytest.mark.matrix
def test_killed_preparation_is_waited_for(protocol, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(protocol / "new"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner sets so many threads
    (protocol / "new").mkdir()
    script = f"import pathlib; from nnunetv2_selfreg.benchmark import protocol; protocol.PROTOCOLS = pathlib.Path({str(protocol / 'protocols')!r})\n"
    script += f"protocol.Protocol.load('tiny', 'cpu').prepare(pathlib.Path({str(protocol / 'log.txt')!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(benchmark.__file__).parents[2])}
    start = [sys.executable, "-c", script]
    first = subprocess.Popen(start, env=environment)
    wait_until(lambda: any(file.read_text() for file in (protocol / "new").glob("*.lock")))
    (lock,) = (protocol / "new").glob("*.lock")
    left_behind = int(lock.read_text().split()[1])
    os.kill(left_behind, signal.SIGSTOP)  # so that it does not end before the second one comes
    first.send_signal(signal.SIGKILL)
    first.wait()
    with subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, text=True) as second:
        wait_until(lambda: "was left behind and still works" in second.stderr.readline())
        commands.kill_group(left_behind)
        threading.Thread(target=second.stderr.read).start()
        assert second.wait(timeout=240) == 0  # goes on where the killed ones stopped


def test_any_preprocessed_data_set_without_a_protocol(protocol, monkeypatch, capsys):
    (data_set,) = (protocol / "preprocessed").glob("*/")
    options = ["-d", data_set.name, "-c", "3d_fullres", "-f", "0", "1", "--epochs", "3", "-o", str(protocol / "runs")]
    assert main(monkeypatch, *options, "-device", "cpu", "--jobs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    words = lines[1].split()
    assert main(monkeypatch, *words[2:], "--jobs") == 0  # a job is a command that this script takes
    assert capsys.readouterr().out.splitlines() == [lines[1]]


class ShortRun:
    """Of 4 epochs, of which as many are left as it is told; some fail before the last one."""

    protocol = protocols.Protocol("p", "Dataset001_D", "plans", "3d_fullres", epochs=4, iterations=1)
    folder = Path("p/run")

    def __init__(self, left: int, error: Exception | None = None):
        self.left, self.error = left, error

    def execute(self, on_epoch):
        for left in reversed(range(1 if self.error else 0, self.left)):
            on_epoch(left)
        if self.error:
            raise self.error


def test_bar_counts_the_epochs_that_are_left(shown_bars, capsys):
    runs = [ShortRun(2), ShortRun(3, ValueError("broken")), ShortRun(4), ShortRun(0)]
    assert benchmark.execute(runs) == 1
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

    monkeypatch.setattr(benchmark, "tqdm", Bar)
    return shown


def test_number_of_an_epoch_is_read_from_the_output():
    assert begun_epoch("2026-01-02 03:04:05.678901: Epoch 72 \n", 0) == 72
    for line in ("2026-01-02 03:04:05.678901: Epoch time: 45.15 s \n", "Epoch\n", "learned in Epoch 3 of 4\n"):
        assert begun_epoch(line, 7) == 7


def test_failed_run_is_reported_and_the_status_tells(protocol, quick_commands, monkeypatch, capsys):
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
        (["tiny", "-d", "99"], "-d 99: Could not find a dataset with the ID 99"),
        (["tiny", "-f", "0"], "-f: tiny-cpu has a split of its own, which is fold 2 here"),
        (
            ["-d", "NAME", "-c", "3d_fullres", "-f", "9", "-device", "cpu"],
            "splits_final.json has no fold 9; it has 0 to 1",
        ),
        (["-d", "NAME", "-c", "3d_fullres", "-f", "-1", "-device", "cpu"], "splits_final.json has no fold -1"),
        (["tiny", "-o", "/dev/null/runs"], "Not a directory"),
        (["tiny", "-c", "2d"], "has its own configuration"),
        (["tiny", "--repetitions", "0"], "0 is not at least 1"),
        (["-c", "2d"], "name a protocol (tiny), or a data set"),
        (["-d", "NAME", "-c", "unknown", "-device", "cpu"], "nnUNetPlans.json has no configuration unknown; it has"),
    ],
)
def test_wrong_options_are_one_line_that_names_what_there_is(options, reason, protocol, monkeypatch, capsys):
    (data_set,) = (protocol / "preprocessed").glob("*/")
    options = [data_set.name if option == "NAME" else option for option in options]
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "-o", str(protocol / "runs"), *options)
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(protocol, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, protocol, "-device", "cuda")
    assert "there is no GPU here" in capsys.readouterr().err


def test_configuration_of_another_content_is_left_alone(protocol, monkeypatch, capsys):
    assert run(monkeypatch, protocol, "--jobs") == 0
    (file,) = (protocol / "preprocessed").glob("*/nnUNetPlans.json")
    plans = load_json(str(file))
    plans["configurations"]["3d_tiny"]["batch_size"] = 4
    save_json(plans, str(file))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, protocol)
    assert "has a configuration 3d_tiny with other content" in capsys.readouterr().err


@pytest.mark.parametrize("name", protocols.protocol_names())
def test_protocols_of_the_repository_load_at_every_scale(name):
    scales = protocols.scales_of(name)
    assert {"cpu", "full"} <= set(scales)
    for scale in scales:
        loaded = protocols.Protocol.load(name, scale)
        assert loaded.device == ("cpu" if scale in ("cpu", "long") else "cuda")
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
