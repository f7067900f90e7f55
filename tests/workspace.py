"""Tiny preprocessed data sets, and a training run on them through nnU-Net's Python interface or its commands."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO
from unittest.mock import patch

import numpy as np
import phantom
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from filelock import FileLock

SHAPE = (16, 24, 24)
CASES, TEST_CASES = 6, 1
LABELS = {"background": 0, "atrium": 1, "veins": 2}
REGIONS = {"background": 0, "heart": [1, 2], "veins": [2]}
VARIANTS = {
    "labels": (901, {"labels": LABELS}),
    "regions": (902, {"labels": REGIONS, "regions_class_order": [1, 2]}),
    "ignore": (903, {"labels": {**LABELS, "ignore": 3}}),
    "regions_ignore": (904, {"labels": {**REGIONS, "ignore": 3}, "regions_class_order": [1, 2]}),
}
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")


class Interruption(BaseException):
    """Stands for a kill between two epochs."""


class DataSets:
    """Raw and preprocessed data sets of the session: one for each way to label, in 2D, 3D and as a cascade.

    Planned by nnU-Net once; then the networks are narrowed and a cascade is added, as nnU-Net's planner would for
    larger images. nnU-Net's own preprocessor runs in this process. Tests may change theirs, so each of pytest-xdist's
    workers has a copy of what the first of them has made.
    """

    @cache  # noqa: B019 (one instance a session)
    def name(self, variant: str) -> str:
        """The data set's name; it is made at the first call."""
        name = f"Dataset{VARIANTS[variant][0]}_{variant}"
        folders = [Path(os.environ[folder]) / name for folder in ("nnUNet_raw", "nnUNet_preprocessed")]
        made = [Path(os.environ["TESTS_DATA_SETS"]) / folder.parent.name / name for folder in folders]
        whole = made[0].parents[1] / f"{name}.whole"
        with FileLock(whole.with_suffix(".lock")):
            origins, targets = (made, folders) if whole.exists() else (folders, made)
            if origins is folders:
                self._make(variant, name, folders[0])
            for origin, target in zip(origins, targets, strict=True):
                shutil.copytree(origin, target, dirs_exist_ok=True)  # another worker may have failed half-way
            whole.touch()
        return name

    def _make(self, variant: str, name: str, raw: Path) -> None:
        number, content = VARIANTS[variant]
        phantom.write_dataset(raw, CASES, TEST_CASES, SHAPE, **content)
        if "ignore" in variant:
            for file in (raw / "labelsTr").iterdir():
                _ignore_some_slices(file)
        if variant == "labels":
            _plan(number)
        else:
            _copy_plans(self.name("labels"), name)
        _preprocess(raw, name)


def _ignore_some_slices(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    labels = sitk.GetArrayFromImage(image)
    labels[::3] = 3
    ignored = sitk.GetImageFromArray(labels)
    ignored.CopyInformation(image)
    sitk.WriteImage(ignored, str(file))


def _plan(number: int) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments

    # nnU-Net's planner cannot do with the 0 of these tests.
    with patch.dict(os.environ, nnUNet_n_proc_DA="1"), quickly_started_workers():
        extract_fingerprints([number], num_processes=1)
        plan_experiments([number])
    file = next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{number}_*")) / "nnUNetPlans.json"
    plans = load_json(str(file))
    configurations = plans["configurations"]
    for configuration in configurations.values():
        configuration["batch_size"] = 2
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [4 * 2 ** min(i, 2) for i in range(network["n_stages"])]
        network["n_conv_per_stage"] = [1] * network["n_stages"]
        network["n_conv_per_stage_decoder"] = [1] * (network["n_stages"] - 1)
    configurations["3d_lowres"] = {
        **configurations["3d_fullres"],
        "data_identifier": "nnUNetPlans_3d_lowres",
        "spacing": [1.25 * s for s in configurations["3d_fullres"]["spacing"]],
        "next_stage": "3d_cascade_fullres",
    }
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    save_json(plans, str(file), sort_keys=False)


def _copy_plans(source: str, target: str) -> None:
    preprocessed = Path(os.environ["nnUNet_preprocessed"])
    (preprocessed / target).mkdir()
    shutil.copy(preprocessed / source / "dataset_fingerprint.json", preprocessed / target)
    plans = load_json(str(preprocessed / source / "nnUNetPlans.json"))
    save_json({**plans, "dataset_name": target}, str(preprocessed / target / "nnUNetPlans.json"), sort_keys=False)


def _preprocess(raw: Path, name: str) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnunetv2_selfreg.data.preprocessing import preprocess_unlabeled

    folder = Path(os.environ["nnUNet_preprocessed"]) / name
    description = load_json(str(raw / "dataset.json"))
    save_json(description, str(folder / "dataset.json"), sort_keys=False)
    shutil.copytree(raw / "labelsTr", folder / "gt_segmentations")
    cases = sorted(get_filenames_of_train_images_and_targets(str(raw), description))
    splits = [
        {"train": cases[:-3], "unlabeled": [cases[-3]], "val": cases[-2:]},
        {"train": cases[3:], "unlabeled": [cases[2]], "val": cases[:2]},
    ]
    save_json(splits, str(folder / "splits_final.json"))
    plans = PlansManager(str(folder / "nnUNetPlans.json"))
    for configuration_name in CONFIGURATIONS:
        configuration = plans.get_configuration(configuration_name)
        output = folder / configuration.data_identifier
        output.mkdir()
        preprocessor = configuration.preprocessor_class(verbose=False)
        for identifier, files in get_filenames_of_train_images_and_targets(str(raw), description).items():
            preprocessor.run_case_save(
                str(output / identifier), files["images"], files["label"], plans, configuration, description
            )
    preprocess_unlabeled(name, CONFIGURATIONS, raw / "imagesTs", processes=1)


@dataclass(frozen=True)
class Run:
    """One trainer on one configuration and fold of a data set."""

    data_set: str
    configuration: str
    trainer: str
    fold: int | str = 0

    @property
    def model_folder(self) -> Path:
        results = Path(os.environ["nnUNet_results"])
        return results / self.data_set / f"{self.trainer}__nnUNetPlans__{self.configuration}"

    @property
    def folder(self) -> Path:
        return self.model_folder / f"fold_{self.fold}"

    @property
    def raw(self) -> Path:
        return Path(os.environ["nnUNet_raw"]) / self.data_set

    def build(self, continue_training: bool = False):
        """The trainer object, as nnUNetv2_train builds it."""
        from nnunetv2.run import run_training

        with patch.object(run_training, "recursive_find_trainer_class_by_name", _found_once):
            return run_training.get_trainer_from_args(
                self.data_set,
                self.configuration,
                self.fold,
                self.trainer,
                continue_training=continue_training,
                device=torch.device("cpu"),
            )

    def load(self, checkpoint: str = "checkpoint_final.pth") -> dict:
        return torch.load(self.folder / checkpoint, weights_only=False)


def _found_once(name: str) -> type:
    """nnU-Net looks at each module of the process for each name: most of the time of a test that takes no steps."""
    return _find(name, os.environ["nnUNet_extTrainer"])


@cache
def _find(name: str, _folders: str) -> type:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    return recursive_find_trainer_class_by_name(name)


def initialised(cls, run: Run, change=lambda configurations: None, **attributes):
    """A trainer of any class on the run's configuration, in training mode, for 2 epochs of 2 iterations.

    `change` is given the plan's configurations, to change them; `attributes` are the class's.
    """
    stock = run.build()
    plans = {**stock.plans_manager.plans, "continue_training": False}
    change(plans["configurations"])
    trainer = type(cls.__name__, (cls,), attributes)(
        plans, run.configuration, run.fold, stock.dataset_json, stock.device
    )
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch, trainer.num_epochs = 2, 1, 2
    torch.manual_seed(0)
    trainer.initialize()
    trainer.network.train()
    return trainer


def write_pseudo_labels(run: Run, teacher: str = "teacher", name: str = "") -> Path:
    """Pseudo-labels of the run's pool, without a teacher and unlike the real ones: dark voxels are atrium, the darkest
    veins. Returns their folder."""
    from nnunetv2_selfreg.data.pseudo_labels import Description, folder_of, store_case
    from nnunetv2_selfreg.data.unlabeled import recipe

    trainer = Run(run.data_set, run.configuration, "nnUNetTrainerMeanTeacher", run.fold).build()
    pool, planned = trainer.unlabeled_pool(), trainer.configuration_manager
    folder = folder_of(Path(trainer.preprocessed_dataset_folder), run.fold, name)
    folder.mkdir(parents=True, exist_ok=True)
    made_by = [{"trainer": teacher, "fold": run.fold, "checkpoint": teacher, "sha256": teacher}]
    current = recipe(trainer.plans_manager, planned)
    description = Description(run.fold, made_by, [], current, trainer.dataset_json["labels"], "members")
    manager, maker = trainer.label_manager, (description.made_by, planned.patch_size)
    for case in pool.identifiers:
        image = pool.load_image(case)[0]
        labels = np.digitize(-image, np.quantile(-image, (0.7, 0.95)))
        store_case(folder, case, labels, manager, 0.1, maker[0], pool.fingerprint(case), maker[1])
    description.disagreement = dict.fromkeys(pool.identifiers, 0.1)
    description.save(folder)
    return folder


class InProcess:
    """Training, resuming, validating and predicting through nnU-Net's Python interface."""

    def train_and_interrupt(self, run: Run) -> None:
        """Trains the first epoch of two and stops as if killed."""
        trainer = run.build()

        def stop_in_second_epoch():
            if trainer.current_epoch == 1:
                raise Interruption
            type(trainer).on_epoch_start(trainer)

        trainer.on_epoch_start = stop_in_second_epoch
        try:
            trainer.run_training()
        except Interruption:
            return
        raise AssertionError("the second epoch was not reached")

    def resume(self, run: Run) -> None:
        """What `nnUNetv2_train … --c --npz` does."""
        from nnunetv2.run.run_training import maybe_load_checkpoint

        trainer = run.build(continue_training=True)
        maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
        assert trainer.current_epoch == 1
        trainer.run_training()
        with quickly_started_workers():
            trainer.perform_actual_validation(save_probabilities=True)

    def predict(self, run: Run, images: Path, output: Path, previous_stage: Path | None = None) -> None:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
        output.mkdir(parents=True, exist_ok=True)
        predictor.initialize_from_trained_model_folder(str(run.model_folder), (run.fold,))
        predictor.predict_from_files_sequential(
            str(images),
            str(output),
            save_probabilities=True,
            folder_with_segs_from_prev_stage=previous_stage and str(previous_stage),
        )


@contextlib.contextmanager
def quickly_started_workers(method: str = "forkserver") -> Iterator[None]:
    """nnU-Net's pools are forked off conftest's server, which has imported what they need, or with "fork" off a process
    that is itself; spawned ones would import torch anew each."""
    get_context = multiprocessing.get_context

    def instead_of_spawn(wanted: str | None = None):
        return get_context(method if wanted == "spawn" else wanted)

    with patch.object(multiprocessing, "get_context", instead_of_spawn):
        yield


class Commands:
    """The same through nnU-Net's commands; the interruption is a SIGKILL."""

    def train_and_interrupt(self, run: Run) -> None:
        process = subprocess.Popen(
            [_program("nnUNetv2_train"), *self._model(run), "-device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.rstrip().endswith("Epoch 1"):
                process.kill()
        process.wait()
        assert process.returncode == -9, "".join(lines[-20:])

    def resume(self, run: Run) -> None:
        command("nnUNetv2_train", *self._model(run), "-device", "cpu", "--c", "--npz")

    def predict(self, run: Run, images: Path, output: Path, previous_stage: Path | None = None) -> None:
        model = ["-d", run.data_set, "-c", run.configuration, "-f", str(run.fold), "-tr", run.trainer]
        previous = ["-prev_stage_predictions", str(previous_stage)] if previous_stage else []
        options = ["--disable_tta", "--save_probabilities", "-npp", "1", "-nps", "1", "-device", "cpu"]
        command("nnUNetv2_predict", *model, "-i", str(images), "-o", str(output), *options, *previous)

    @staticmethod
    def _model(run: Run) -> list[str]:
        return [run.data_set, run.configuration, str(run.fold), "-tr", run.trainer]


def command(name: str, *arguments: str, **environment: str) -> str:
    """Runs a command of this environment in a process of its own; returns what it printed, or fails with its end."""
    with tempfile.NamedTemporaryFile("w+") as output:
        process = ForkedCommand([name, *arguments], {**os.environ, **environment}, output)
        process.wait()
        output.seek(0)
        printed = output.read()
    assert process.returncode == 0, f"{name} {' '.join(arguments)}\n{printed[-3000:]}"
    return printed


class ForkedCommand:
    """A command forked off conftest's server, since half its time would be its imports; otherwise as subprocess.Popen,
    as far as the tests and `commands.call` need that."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], stdout: IO, **_) -> None:
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run_command, args=(Path(words[0]).name, words[1:], env, stdout.name))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> None:
        self._process.join()


def _run_command(name: str, arguments: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    """What the script does that pip makes of an entry point."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = [name, *arguments]
    (entry,) = entry_points(group="console_scripts", name=name)
    # A process forked after OpenMP has started threads can hang; without this, nnU-Net starts one for each core.
    with quickly_started_workers("fork"), patch.object(torch, "set_num_threads"):
        sys.exit(entry.load()())


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def two_stages(plan: dict) -> None:
    """Cuts a configuration's network to its upper two resolution stages."""
    network = plan["architecture"]["arch_kwargs"]
    for key, value in network.items():
        if isinstance(value, list) and key != "n_conv_per_stage_decoder":
            network[key] = value[:2]
    network["n_stages"], network["n_conv_per_stage_decoder"] = 2, [1]


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def read_labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def put_batch_shapes(loader, queue) -> None:
    """For a worker process, which must find it by name when it is spawned."""
    queue.put({key: tuple(value.shape) for key, value in next(loader).items() if isinstance(value, torch.Tensor)})


def start(trainer):
    """Weights that depend on nothing but the seed, loaders running."""
    torch.manual_seed(0)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 (nnU-Net's loaders draw from it)


def weights(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def finish(trainer) -> None:
    """Trains to the end, each epoch from its own seed."""
    begin = trainer.on_epoch_start
    trainer.on_epoch_start = lambda: (seed(trainer.current_epoch), begin())
    trainer.run_training()


def whole_and_resumed(run: Run, folder: Path, monkeypatch) -> tuple:
    """Trainers after the same epochs from the same seeds: at once, and in two halves with a checkpoint between."""
    torch.manual_seed(0)
    whole = run.build()
    finish(whole)
    monkeypatch.setenv("nnUNet_results", str(folder / "resumed"))
    torch.manual_seed(0)
    first = run.build()
    on_epoch_start = first.on_epoch_start

    def half_of_the_epochs():
        if first.current_epoch == first.num_epochs // 2:
            raise Interruption
        on_epoch_start()

    first.on_epoch_start = half_of_the_epochs
    with contextlib.suppress(Interruption):
        finish(first)
    second = run.build(continue_training=True)
    second.load_checkpoint(str(run.folder / "checkpoint_latest.pth"))
    assert second.current_epoch == first.num_epochs // 2
    finish(second)
    return whole, second
