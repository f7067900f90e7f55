"""What is kept of a run, and what a run survives."""

import os
import shutil

import pytest
import torch

from nnunetv2_selfreg.benchmark import commands
from nnunetv2_selfreg.benchmark.run import (
    Memory,
    begun_epoch,
    is_full_disk,
    prediction_seconds,
    remove_broken_checkpoints,
    reported_divergence,
)


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


def test_prediction_time_is_the_median_between_cases():
    stamp = "2026-01-01 00:00:{:09.6f}: predicting case"
    assert prediction_seconds("\n".join(map(stamp.format, [1, 3, 6, 8]))) == 2
    assert prediction_seconds(stamp.format(1)) is None


def test_number_of_an_epoch_is_read_from_the_output():
    assert begun_epoch("2026-01-02 03:04:05.678901: Epoch 72 \n", 0) == 72
    for line in ("2026-01-02 03:04:05.678901: Epoch time: 45.15 s \n", "Epoch\n", "learned in Epoch 3 of 4\n"):
        assert begun_epoch(line, 7) == 7


def test_divergence_is_found_above_whatever_was_printed_later():
    output = "nnunetv2_selfreg: Training stopped in epoch 3: loss is nan.\n" + "a worker ended\n" * 30
    assert reported_divergence(output) == "it diverged: Training stopped in epoch 3: loss is nan."
    assert reported_divergence("a worker ended") is None


def test_full_disk_on_which_the_message_had_no_room_either(tmp_path, monkeypatch):
    error = commands.ExitStatusError("failed", "OSError: [Errno 28] No space le")
    assert not is_full_disk(error, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    assert is_full_disk(error, tmp_path)


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
