"""What is measured; how long anything takes is not tested."""

import sys
import time

import loading_wait
import pytest


class Trainer:
    """Loads in 20 ms, steps in 5."""

    def get_dataloaders(self):
        return Loader(), Loader()

    def train_step(self, batch):
        time.sleep(0.005)


class Loader:
    finished = 0

    def __next__(self):
        time.sleep(0.02)
        return {}

    def _finish(self):
        Loader.finished += 1


def test_waits_and_steps_are_told_apart():
    Loader.finished = 0
    waits, steps = loading_wait.measure(Trainer(), 4)
    assert len(waits) == len(steps) == 4
    assert min(waits) >= 0.02
    assert min(steps) >= 0.005
    assert Loader.finished == 2


def test_row_of_each_trainer_through_real_workers(data_sets, monkeypatch, capsys):
    trainers = ["nnUNetTrainer", "nnUNetTrainerDualTask"]
    arguments = [data_sets.name("labels"), "2d", "--workers", "1", "--steps", "2", "-device", "cpu"]
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_results", "")
    monkeypatch.setattr(sys, "argv", ["loading_wait.py", *arguments, "-tr", *trainers])
    loading_wait.main()
    assert capsys.readouterr().out.count("| nnUNetTrainer") == 2


def test_without_workers_there_is_nothing_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loading_wait.py", "1", "2d", "--workers", "0"])
    with pytest.raises(SystemExit):
        loading_wait.main()
    assert "--workers must be at least 1" in capsys.readouterr().err
