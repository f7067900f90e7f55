"""Checkpoints that survive a kill, and no training on nonsense."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from workspace import Run

SELFREG = "nnUNetTrainerSelfReg_2epochs_2iters"


@pytest.fixture
def run(data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return Run(data_sets.name("labels"), "2d", SELFREG)


def test_error_while_saving_leaves_the_last_checkpoint(run, monkeypatch):
    trainer = run.build()
    trainer.initialize()
    file = run.folder / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()

    def disk_full(_, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert not list(run.folder.glob("*.part"))


def test_disabled_checkpointing_writes_nothing(run):
    trainer = run.build()
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(run.folder / "checkpoint_latest.pth"))
    assert not list(run.folder.glob("checkpoint*"))


SAVE_FOR_EVER = """
import sys
sys.path[:0] = {path!r}
from workspace import Run
trainer = Run({data_set!r}, "2d", {trainer!r}).build()
trainer.initialize()
while True:
    trainer.save_checkpoint({file!r})
    print("saved", flush=True)
"""


def test_kill_while_a_checkpoint_is_written(run):
    """Killed at several moments of an endless series of saves, the checkpoint loads each time."""
    file = str(run.folder / "checkpoint_latest.pth")
    script = SAVE_FOR_EVER.format(path=sys.path, data_set=run.data_set, trainer=run.trainer, file=file)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("saved"):
                break
        process.send_signal(signal.SIGSTOP)  # wherever it is now, most likely while it writes
        for _ in range(5):
            torch.load(file, weights_only=False)
            process.send_signal(signal.SIGCONT)
            os.sched_yield()
            process.send_signal(signal.SIGSTOP)
        process.kill()
    trainer = run.build(continue_training=True)
    trainer.load_checkpoint(file)
    trainer.save_checkpoint(file)
    assert not list(run.folder.glob("*.part"))  # what the kill left was written over


def poison(batch: dict) -> dict:
    batch["data"][0, 0, 0, 0] = math.nan
    return batch


def test_non_finite_training_loss_stops_with_the_term_the_epoch_and_the_cases(run):
    trainer = run.build()
    trainer.on_train_start()
    batch = poison(next(trainer.dataloader_train))
    with pytest.raises(FloatingPointError) as error:
        trainer.train_step(batch)
    message = str(error.value)
    for name in ("epoch 0", "segmentation is nan", "scr is nan", "ifd is nan", *batch["keys"], str(run.folder)):
        assert name in message


def test_only_the_term_at_fault_is_named(run, monkeypatch):
    trainer = run.build()
    trainer.on_train_start()
    monkeypatch.setattr(trainer.loss, "_ifd", lambda features: math.inf * features[0].sum())
    with pytest.raises(FloatingPointError, match=r"epoch 0: ifd is -?(inf|nan)\."):
        trainer.train_step(next(trainer.dataloader_train))


def test_non_finite_loss_stops_the_run_before_anything_is_saved(run):
    """The weights break in the last step of an epoch: validation notices, and the checkpoint stays the good one."""
    trainer = run.build()
    trainer.on_train_start()
    trainer.save_checkpoint(str(run.folder / "checkpoint_latest.pth"))
    good = (run.folder / "checkpoint_latest.pth").read_bytes()
    step = trainer.optimise

    def last_step_breaks_the_weights(batch):
        outputs = step(batch)
        next(trainer.network.parameters()).data.fill_(math.nan)
        return outputs

    trainer.num_iterations_per_epoch = 1
    trainer.optimise = last_step_breaks_the_weights
    with pytest.raises(FloatingPointError, match="validation loss is nan"):
        trainer.run_training()
    assert (run.folder / "checkpoint_latest.pth").read_bytes() == good


def test_terms_are_means_over_the_epoch(run, monkeypatch):
    trainer = run.build()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(3)]
    trainer.on_train_epoch_end(outputs)
    for name in ("segmentation", "scr", "ifd"):
        assert trainer.logger.get_value(name, 0) == pytest.approx(np.mean([o[name] for o in outputs]))
    text = next(run.folder.glob("training_log*.txt")).read_text()
    assert "scr" in text
    assert "ifd" in text


def test_terms_reach_every_logger_that_nnunet_logs_to(run):
    """Weights & Biases is such a logger; this one writes to a list."""

    class ListLogger(list):
        def log(self, key, value, step):
            self.append((key, value, step))

    trainer = run.build()
    trainer.logger.loggers.append(ListLogger())
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train))])
    logged = {(key, step) for key, _, step in trainer.logger.loggers[0]}
    assert {("segmentation", 0), ("scr", 0), ("ifd", 0), ("train_losses", 0)} <= logged


def test_progress_picture_grows_by_the_panel_of_the_terms(run):
    from PIL import Image

    run.build().run_training()
    with Image.open(run.folder / "progress.png") as picture:
        assert picture.size == (3000, 5400 + 1800)
