"""Checkpoints that survive a kill, and no training on nonsense."""

import errno
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from workspace import InProcess, Run, command, initialised, start

from nnunetv2_selfreg.errors import FullDiskError, UserError
from nnunetv2_selfreg.files import replacing
from nnunetv2_selfreg.training.selfreg import SelfRegularized

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


def nnunetv2_train(run, *options: str) -> subprocess.CompletedProcess:
    arguments = [run.data_set, run.configuration, str(run.fold), "-tr", run.trainer, "-device", "cpu", *options]
    start = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    return subprocess.run([sys.executable, "-c", start, *arguments], capture_output=True, text=True)


def test_users_error_stands_alone_and_last_and_the_log_has_its_traceback(run):
    missing = Run(run.data_set, run.configuration, run.trainer, 99)
    ended = nnunetv2_train(missing)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("nnunetv2_selfreg: There is no fold 99: ")
    assert "Traceback" not in ended.stderr + ended.stdout
    log = next(missing.folder.glob("training_log*.txt")).read_text()
    assert "Traceback" in log
    assert "nnunetv2_selfreg.errors.UserError: There is no fold 99: " in log


@pytest.mark.matrix
def test_near_miss_of_a_trainer_stands_alone_and_last(run):
    ended = nnunetv2_train(Run(run.data_set, run.configuration, "nnUNetTrainerSelfreg"))
    assert ended.returncode == 1
    said = "nnunetv2_selfreg: There is no trainer nnUNetTrainerSelfreg. Did you mean nnUNetTrainerSelfReg?"
    assert ended.stderr.splitlines()[-1] == said
    assert "Traceback" not in ended.stderr


def test_errors_that_are_not_the_users_keep_their_traceback(run):
    script = "from nnunetv2_selfreg import errors; errors.show_alone(); errors.show_alone(); 1 / 0"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.count("ZeroDivisionError") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("epoch", [0, 1])
def test_full_disk_is_named_with_what_is_kept(epoch, run, monkeypatch):
    """Torch writes a checkpoint to a device that is always full, in the first or the second epoch."""
    trainer = run.build()
    save, end_of_epoch = torch.save, trainer.on_epoch_end

    def fill_the_disk():
        if trainer.current_epoch == epoch:
            monkeypatch.setattr(torch, "save", lambda content, _: save(content, "/dev/full"))
        end_of_epoch()

    trainer.on_epoch_end = fill_the_disk
    with pytest.raises(FullDiskError) as error:
        trainer.run_training()
    message = str(error.value)
    assert re.search(r"checkpoint_(latest|best|final)\.pth could not be written: No space left .* MiB free", message)
    if epoch == 0:
        assert message.endswith(f"There is no checkpoint in {run.folder} yet: start again.")
    else:
        assert f"--c continues from checkpoint_latest.pth in {run.folder}" in message
        assert run.load("checkpoint_latest.pth")["current_epoch"] == 1


def test_full_disk_of_another_place_is_not_blamed_on_the_results(run):
    """As a container's shared memory, through which workers hand over batches."""
    trainer = run.build()

    def fail():
        raise RuntimeError("unable to write to file </torch_12_345_0>: No space left on device (28)")

    trainer.on_train_start = fail
    with pytest.raises(FullDiskError, match=r"^unable to write to file </torch_12_345_0>: No .* Make room there"):
        trainer.run_training()


def test_quota_that_is_told_when_the_file_is_closed(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fail)

    def write():
        with replacing(tmp_path / "file") as part:
            Path(part).write_text("content")

    with pytest.raises(FullDiskError, match=f"{tmp_path / 'file'} could not be written"):
        write()


def test_who_watches_for_failures_hears_of_them_too():
    """As Weights & Biases, which marks the run."""
    script = (
        "import sys; sys.excepthook = lambda *_: print('watched', file=sys.stderr)\n"
        "from nnunetv2_selfreg import errors; errors.show_alone(); raise errors.UserError('mine')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stderr.splitlines() == ["watched", "nnunetv2_selfreg: mine"]


def test_split_of_the_users_own_is_left_alone(run, splits):
    splits(lambda folds: folds.clear())

    class OwnSplit(nnUNetTrainer):
        def do_split(self):
            return ["phantom_000"], ["phantom_001"]

    class Composed(SelfRegularized, OwnSplit):
        pass

    assert initialised(Composed, run).do_split() == (["phantom_000"], ["phantom_001"])


def test_disabled_checkpointing_writes_nothing(run):
    trainer = run.build()
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(run.folder / "checkpoint_latest.pth"))
    assert not list(run.folder.glob("checkpoint*"))


HALF_A_CHECKPOINT = """
import sys, time
sys.path[:0] = {path!r}
import torch
from workspace import InProcess, Run, command

whole, saves = torch.save, []

def save(checkpoint, file):
    saves.append(file)
    if len(saves) == {number}:
        whole(checkpoint, file)
        with open(file, "r+b") as half:
            half.truncate(1000)
        print("half", file, flush=True)
        time.sleep(600)
    whole(checkpoint, file)

torch.save = save
Run({data_set!r}, "2d", {trainer!r}).build().run_training()
"""


@pytest.mark.parametrize(
    ("number", "left"), [pytest.param(1, [], marks=pytest.mark.matrix), (2, ["checkpoint_latest.pth"])]
)
def test_kill_while_a_checkpoint_is_written(run, number, left):
    """Killed with half of the first or second checkpoint written; nnUNetv2_train --c goes on to the end."""
    script = HALF_A_CHECKPOINT.format(path=sys.path, data_set=run.data_set, trainer=run.trainer, number=number)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("half") for line in process.stdout)
        process.kill()
    assert [file.name for file in run.folder.glob("checkpoint*.pth")] == left
    assert len(list(run.folder.glob("*.part"))) == 1
    for name in left:
        assert run.load(name)["current_epoch"] == 1
    command("nnUNetv2_train", run.data_set, run.configuration, "0", "-tr", run.trainer, "-device", "cpu", "--c")
    assert run.load()["current_epoch"] == 2
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
    for name in ("epoch 0", "segmentation is nan", "scr is nan", "ifd is nan", *batch["keys"]):
        assert name in message
    assert message.endswith(f"There is no checkpoint in {run.folder} yet: start again.")
    assert message in next(run.folder.glob("training_log*.txt")).read_text()


def test_only_the_term_at_fault_is_named(run, monkeypatch):
    trainer = run.build()
    trainer.on_train_start()
    monkeypatch.setattr(trainer.loss, "_ifd", lambda features: math.inf * features[0].sum())
    with pytest.raises(FloatingPointError, match=r"epoch 0: ifd is -?(inf|nan)\."):
        trainer.train_step(next(trainer.dataloader_train))


def test_non_finite_loss_stops_the_run_before_anything_is_saved(run):
    """The weights break in the last step of an epoch: validation notices, the checkpoint stays the good one, and the
    training goes on from it."""
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
    with pytest.raises(FloatingPointError, match=r"validation loss is nan.*--c continues from checkpoint_latest\.pth"):
        trainer.run_training()
    assert (run.folder / "checkpoint_latest.pth").read_bytes() == good
    InProcess().resume(run)
    assert run.load()["current_epoch"] == 2


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
    trainer.on_train_start()
    trainer.logger.loggers.append(ListLogger())
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train))])
    logged = {(key, step) for key, _, step in trainer.logger.loggers[0]}
    assert {("segmentation", 0), ("scr", 0), ("ifd", 0), ("train_losses", 0)} <= logged


def test_curves_of_others_are_left_alone(run, capsys):
    """A mixin that logs its own curve later in the epoch, after the terms."""
    trainer = run.build()
    end = trainer.on_validation_epoch_end

    def with_a_curve_of_its_own(outputs):
        end(outputs)
        trainer._log("teacher_dice", 0.5)

    trainer.on_validation_epoch_end = with_a_curve_of_its_own
    trainer.run_training()
    assert trainer.logger.get_value("teacher_dice", None) == [0.5, 0.5]
    assert "logging issue" not in capsys.readouterr().out


def test_further_outputs_of_a_step_and_a_missing_picture_do_no_harm(run):
    trainer = run.build()
    step = trainer.optimise
    trainer.optimise = lambda batch: {**step(batch), "names": list(batch["keys"])}
    trainer.logger.plot_progress_png = lambda folder: None
    trainer.run_training()
    assert run.load()["current_epoch"] == 2


@pytest.mark.parametrize("count", [1, 4, 10])
def test_legend_of_the_terms_is_whole(count, monkeypatch):
    """With the large letters that nnU-Net sets."""
    import seaborn
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from nnunetv2_selfreg.training import progress

    figures, draw = [], FigureCanvasAgg.draw
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda canvas: figures.append(canvas.figure) or draw(canvas))
    with seaborn.plotting_context(font_scale=2.5):
        progress._panel({f"segmentation_consistency_{number}": [1.0, 2.0] for number in range(count)})
    legend = figures[0].axes[0].get_legend().get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= 3000
    assert legend.y1 <= 1800


def test_progress_picture_grows_by_the_panel_of_the_terms(run, monkeypatch):
    import matplotlib
    from PIL import Image

    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", "figure")  # nnU-Net's size
    run.build().run_training()
    with Image.open(run.folder / "progress.png") as picture:
        assert picture.size == (3000, 5400 + 1800)


FAMILIES = ("SelfReg", "MeanTeacher", "DualTask", "DualTaskMutual", "CopyPaste", "TinyUXNet", "TinyKMaxUXNet")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", [3, 7, -1])
def test_label_that_the_data_set_does_not_have_is_named_with_its_case(family, label, run):
    trainer = start(Run(run.data_set, "2d", f"nnUNetTrainer{family}_2epochs_2iters").build())
    batch = next(trainer.dataloader_train)
    batch["target"][0][1, 0, 0, 0] = label
    found = f"Not among the data set's labels: {label} in {batch['keys'][1]}, of {trainer.preprocessed_dataset_folder}"
    for step in (trainer.train_step, trainer.validation_step):
        with pytest.raises(ValueError, match=re.escape(found)):
            step(batch)
    assert Path(trainer.log_file).read_text().count(found) == 2


@pytest.mark.parametrize("family", ["SelfReg", "MeanTeacher", "TinyUXNet"])
def test_labels_with_a_gap_are_an_error_before_anything_starts(family, run):
    trainer = Run(run.data_set, "2d", f"nnUNetTrainer{family}").build()
    trainer.dataset_json["labels"] = {"background": 0, "atrium": 1, "veins": 3}
    trainer.label_manager = trainer.plans_manager.get_label_manager(trainer.dataset_json)
    with pytest.raises(UserError, match=f"dataset.json of {run.data_set} has the labels 0, 1, 3. .*: 0 to 2. Renumber"):
        trainer.initialize()


@pytest.fixture
def splits(run, tmp_path, monkeypatch):
    """Writes the folds of a copy of the data set."""
    source = Path(run.build().preprocessed_dataset_folder_base)
    shutil.copytree(source, tmp_path / "preprocessed" / source.name)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    file = tmp_path / "preprocessed" / source.name / "splits_final.json"

    def write(change):
        folds = load_json(str(file))
        change(folds)
        save_json(folds, str(file))

    return write


def test_damaged_checkpoint_is_named(run):
    """As stock trainers leave one when they are killed while writing."""
    trainer = run.build()
    trainer.initialize()
    file = run.folder / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"{file} is damaged\. Remove it: --c goes on from the checkpoint before it"):
        run.build(continue_training=True).load_checkpoint(str(file))


@pytest.fixture
def copied(data_sets, tmp_path, monkeypatch):
    """The folder of a copy of the preprocessed data set, which a test may damage."""
    name = data_sets.name("labels")
    copy = tmp_path / "preprocessed" / name
    shutil.copytree(Path(os.environ["nnUNet_preprocessed"]) / name, copy)
    monkeypatch.setenv("nnUNet_preprocessed", str(copy.parent))
    return copy


def test_ignore_label_of_later_than_the_preprocessing_is_named(run, copied):
    """Stock ends in "background workers are no longer alive"."""
    description = load_json(str(copied / "dataset.json"))
    description["labels"]["ignore"] = 3
    save_json(description, str(copied / "dataset.json"))
    trainer = run.build()
    trainer.initialize()
    with pytest.raises(UserError, match=r"2d was preprocessed before dataset.json had this ignore label"):
        trainer.get_dataloaders()


def test_missing_labels_of_the_final_validation_are_named_before_the_training(run, copied):
    shutil.rmtree(copied / "gt_segmentations")
    trainer = run.build()
    trainer.initialize()
    with pytest.raises(UserError, match=r"has no gt_segmentations, which the final validation needs"):
        trainer.get_dataloaders()


@pytest.mark.parametrize("family", ["SelfReg", "MeanTeacher", "TinyUXNet"])
def test_fold_that_does_not_exist_is_an_error_that_names_those_there_are(family, run):
    """Stock trains on a random 80 % of all labels, which would ruin a comparison with few."""
    trainer = Run(run.data_set, "2d", f"nnUNetTrainer{family}", 99).build()
    trainer.initialize()
    with pytest.raises(UserError, match=r"no fold 99: .*splits_final.json has 0 to 1. .*nnUNetv2_selfreg split"):
        trainer.get_dataloaders()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folds: folds[0].update(train=[]), "'train' of fold 0 is empty"),
        (lambda folds: folds[0].update(val=[]), "'val' of fold 0 is empty"),
        (
            lambda folds: folds[0]["train"].append("phantom_000_0000.nii.gz"),
            "lists phantom_000_0000.nii.gz, and no such case is preprocessed. Is phantom_000 meant by",
        ),
        (lambda folds: folds[0]["val"].append("Phantom_001"), "Is phantom_001 meant by Phantom_001[?]"),
        (
            lambda folds: folds[0]["train"].append("elsewhere"),
            "lists elsewhere, and no such case is preprocessed. C",
        ),
        (lambda folds: folds[1].update(train="phantom_000"), "fold 1 has no lists 'train' and 'val'"),
        (lambda folds: folds[0].update(unlabelled=["x"]), "has 'unlabelled'. Rename it: 'unlabeled' is what"),
        (lambda folds: folds[0].update(UNLABELED=["x"]), "has 'UNLABELED'. Rename it: 'unlabeled' is what"),
        (lambda folds: folds[0].update(unlabeled="x"), "'unlabeled' of fold 0 is not a list"),
        (lambda folds: folds[0].update(train=folds[0]["train"] * 2), "'train' of fold 0 has .* more than once"),
    ],
)
@pytest.mark.parametrize("family", ["SelfReg", "MeanTeacher"])
def test_fold_that_cannot_be_used_is_an_error_before_workers_start(family, change, message, run, splits):
    splits(change)
    trainer = Run(run.data_set, "2d", f"nnUNetTrainer{family}").build()
    trainer.initialize()
    with pytest.raises(UserError, match=message):
        trainer.get_dataloaders()


def test_entries_of_others_in_a_fold_are_left_alone(run, splits):
    splits(lambda folds: folds[0].update(comment="made by hand", labeled=["x"], enabled=1))
    trainer = run.build()
    trainer.initialize()
    assert len(trainer.do_split()[0]) == 3


@pytest.mark.parametrize("family", ["CopyPaste", "SelfReg", "TinyUXNet"])
def test_patch_that_the_strides_do_not_divide_is_named(family, run):
    trainer = Run(run.data_set, "3d_fullres", f"nnUNetTrainer{family}").build()
    trainer.configuration_manager.configuration["patch_size"] = [17, 23, 26]
    with pytest.raises(ValueError, match=r"patch size \[17, 23, 26\] is not divisible by the product of the strides"):
        trainer.initialize()
