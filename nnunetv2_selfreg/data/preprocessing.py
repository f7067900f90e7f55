"""Preprocesses images without labels, with the preprocessor that the plans name, into a folder of their own.

nnU-Net takes whatever lies in `<data_identifier>/` for labelled, so these cases go to `<data_identifier>_unlabeled/`:
the image as `<identifier>.b2nd`, its properties as `<identifier>.pkl`, and no segmentation. `preprocessing.json` says
with which part of the plans.
"""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_json, write_pickle
from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunetv2_selfreg.data.datasets import labeled_cases, preprocessed_folder, read_json
from nnunetv2_selfreg.data.images import BadImageError, check_image, check_nifti, list_cases, why_misnamed
from nnunetv2_selfreg.data.storage import store_array
from nnunetv2_selfreg.data.unlabeled import RECIPE_FILE, is_outdated, recipe
from nnunetv2_selfreg.errors import FullDiskError, UserError
from nnunetv2_selfreg.files import replacing


@dataclass
class Outcome:
    """What became of the cases."""

    folders: list[Path]
    done: int = 0
    done_before: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    """Why a case was rejected, by identifier."""


@dataclass(frozen=True)
class Preprocessing:
    """What a worker process needs: plans, dataset.json, and the configuration of each folder to write to."""

    plans: PlansManager
    dataset_json: dict
    configurations: dict[Path, ConfigurationManager]

    @property
    def channels(self) -> list[str]:
        # nnU-Net still takes version 1's name of the entry.
        return list((self.dataset_json.get("channel_names") or self.dataset_json["modality"]).values())

    @property
    def is_2d(self) -> bool:
        return self.plans.plans["original_median_shape_after_transp"][0] == 1

    def missing(self, identifier: str) -> list[Path]:
        """The folders that do not have the whole case: its .pkl file is the last to appear."""
        return [
            folder
            for folder in self.configurations
            if not all((folder / f"{identifier}{ending}").is_file() for ending in (".b2nd", ".pkl"))
        ]

    def outdated(self, folder: Path) -> bool:
        return is_outdated(folder, recipe(self.plans, self.configurations[folder]))

    def begin(self) -> None:
        """Makes the folders, each with the recipe of its cases."""
        for folder, configuration in self.configurations.items():
            folder.mkdir(exist_ok=True)
            with replacing(folder / RECIPE_FILE) as part:
                save_json(recipe(self.plans, configuration), part)

    def run(self, identifier: str, files: Sequence[Path], folders: Sequence[Path]) -> str | None:
        """Checks a case, preprocesses it and stores it in `folders`; returns None, or why that was not possible.

        Raises:
            FullDiskError: it cannot be stored.
        """
        try:
            data, properties = self.read([str(file) for file in files])
            for folder in folders:
                configuration = self.configurations[folder]
                image, body, stored = configuration.preprocessor_class(verbose=False).run_case_npy(
                    data, None, copy.deepcopy(properties), self.plans, configuration, self.dataset_json
                )
                check_size(image.shape[1:], configuration)
                mask_outside(image, body, configuration.use_mask_for_norm)
                store(image, stored, folder, identifier, configuration.patch_size)
        except BadImageError as reason:
            return str(reason)
        except FullDiskError:
            raise
        except Exception as error:  # whatever is wrong with a case, the others go on
            return f"{type(error).__name__}: {error}"
        return None

    def read(self, files: Sequence[str]) -> tuple[np.ndarray, dict]:
        """The image (channels first) and its properties, read by nnU-Net's reader and checked.

        Raises:
            BadImageError: a file cannot be read, or the image does not fit the data set or is not finite.
        """
        for file in files:
            check_nifti(file)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):  # some readers print the reason and raise an empty error
                data, properties = self.plans.image_reader_writer_class().read_images(files)
        except Exception as error:
            raise BadImageError(f"cannot be read: {str(error) or printed.getvalue()}") from error
        if printed.getvalue():
            tqdm.write(f"{Path(files[0]).name}: {' '.join(printed.getvalue().split())}", file=sys.stderr)
        check_image(data, self.channels, self.is_2d, self.plans.transpose_forward)
        return data, properties


def preprocess_unlabeled(
    dataset: str,
    configurations: Sequence[str],
    images: Path | None = None,
    plans_name: str = "nnUNetPlans",
    processes: int | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Preprocesses a folder of images without labels; cases that are there already are skipped.

    Cases that cannot be used are reported on stderr by name as they turn up; the others are still processed.

    Args:
        dataset: as given to nnU-Net's `-d`.
        configurations: for which to preprocess.
        images: folder with `<identifier>_<channel>` files; nnUNet_raw's `imagesUn` of the data set if None.
        plans_name: as given to nnU-Net's `-p`.
        processes: how many work at once; nnU-Net's own default number if None, but no more than there are cores.
        overwrite: whether cases that are there are made again.

    Raises:
        UserError: data set, plans or configuration are unknown or not preprocessed, there is no usable image, or a
            worker process died.
        FullDiskError: there is no room for a case; those before it are kept.
    """
    folder = preprocessed_folder(dataset)
    labeled = set(labeled_cases(folder))
    job = prepare(folder, configurations, plans_name)
    ending = job.dataset_json["file_ending"]
    cases = list_cases(_images_folder(folder.name, images), ending)
    processes = min(default_num_processes, os.cpu_count() or 1) if processes is None else processes
    if processes < 1:
        raise UserError(f"-np {processes} is no number of processes. Give 1 or more.")
    outcome = Outcome(list(job.configurations))
    outdated = [folder for folder in outcome.folders if job.outdated(folder)]
    if outdated:
        raise UserError(
            f"{outdated[0]} was made with other plans than {plans_name} are now (or its {RECIPE_FILE} is missing). "
            "Delete that folder, and preprocess all its images again."
        )
    tasks = {}
    for identifier, files in cases.items():
        reason = why_misnamed(identifier, files, ending, labeled, job.channels)
        missing = outcome.folders if overwrite else job.missing(identifier)
        if reason is not None:
            _reject(outcome, identifier, reason)
        elif missing:
            tasks[identifier] = (files, missing)
        else:
            outcome.done_before += 1
    if tasks:
        job.begin()
        run_all(job, tasks, min(processes, len(tasks)), outcome)
    if not outcome.done + outcome.done_before:
        raise UserError("No image is usable; the reasons are above.")
    return outcome


def mask_outside(image: np.ndarray, body: np.ndarray, masked: Sequence[bool]) -> None:
    """Sets the `masked` channels of `image` `(C, *spatial)` to 0 where `body` `(1, *spatial)` is negative, in place.

    nnU-Net's training does so with labelled patches, after resampling has left ringing there. Here it is done before
    storing, so that the image itself tells where the body is.
    """
    for channel, is_masked in zip(image, masked, strict=True):
        if is_masked:
            channel[body[0] < 0] = 0


def check_size(shape: Sequence[int], configuration: ConfigurationManager) -> None:
    """Checks the size of a preprocessed image.

    Raises:
        BadImageError: along every axis that the network pools it is smaller than one voxel of the bottleneck.
    """
    strides = configuration.network_arch_init_kwargs.get("strides")
    if strides is None:
        return  # not a U-Net
    coarsest = np.prod(strides, axis=0)
    within = np.asarray(shape)[-len(coarsest) :]  # in 2D without the axis of the slices
    if (coarsest > 1).any() and (within < coarsest)[coarsest > 1].all():
        raise BadImageError(
            f"it is too small: {'x'.join(map(str, within))} voxels in the spacing of the plans, less than what a "
            f"single voxel of the network's bottleneck sees ({'x'.join(map(str, coarsest))})"
        )


def store(image: np.ndarray, properties: dict, folder: Path, identifier: str, patch_size: Sequence[int]) -> None:
    """Writes a preprocessed case as nnU-Net does, without a segmentation; after a kill it is whole or `missing`."""
    pkl = folder / f"{identifier}.pkl"
    pkl.unlink(missing_ok=True)  # or an old one would vouch for the new image
    store_array(image.astype(np.float32), folder / f"{identifier}.b2nd", patch_size)
    with replacing(pkl) as part:
        write_pickle(properties, part)


def prepare(folder: Path, configurations: Sequence[str], plans_name: str) -> Preprocessing:
    """The job for a preprocessed data set.

    Raises:
        UserError: plans or a configuration are unknown, or were never preprocessed.
    """
    file = folder / f"{plans_name}.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist. Give -p the name of plans in this folder, or run nnU-Net's planning.")
    plans = PlansManager(read_json(file))
    outputs = {}
    for name in configurations:
        if name not in plans.available_configurations:
            raise UserError(f"-c {name}: {file} has {', '.join(plans.available_configurations)}. Give one of these.")
        configuration = plans.get_configuration(name)
        labeled = folder / configuration.data_identifier
        if not labeled.is_dir():
            raise UserError(
                f"{labeled} does not exist: -c {name} was never preprocessed. Run nnUNetv2_preprocess for it first."
            )
        outputs[labeled.with_name(f"{labeled.name}_unlabeled")] = configuration
    return Preprocessing(plans, read_json(folder / "dataset.json"), outputs)


def _images_folder(dataset_name: str, images: Path | None) -> Path:
    if images is None:
        if not nnUNet_raw.is_set():
            raise UserError("nnUNet_raw is not set. Set it, or give the folder of the images with -i.")
        images = Path(nnUNet_raw, dataset_name, "imagesUn")
    if not images.is_dir():
        raise UserError(f"{images} is no folder. Put the images there, or give their folder with -i.")
    return images


def run_all(
    job: Preprocessing, tasks: Mapping[str, tuple[list[Path], list[Path]]], processes: int, outcome: Outcome
) -> None:
    """Runs the tasks (files and folders by identifier) in worker processes; `outcome` takes what became of them.

    When a worker dies nobody knows over which case, so those left are done one at a time: it is the one that it dies
    over again.
    """
    left = dict(tasks)
    with tqdm(desc="Preprocessing", total=len(tasks), unit="case") as bar:

        def finish(identifier: str, reason: str | None) -> None:
            del left[identifier]
            if reason is None:
                outcome.done += 1
            else:
                _reject(outcome, identifier, reason)
            bar.update()

        while left:
            for identifier, reason in _run_in_pool(job, left, processes):
                finish(identifier, reason)
            if left and processes == 1:
                finish(next(iter(left)), "its worker process died, as happens when memory runs out or a reader fails")
            elif left:
                tqdm.write(
                    f"A worker process died. The {len(left)} cases left are done one at a time.", file=sys.stderr
                )
            processes = 1


def _run_in_pool(job: Preprocessing, tasks: Mapping, processes: int) -> Iterator[tuple[str, str | None]]:
    """Yields identifier and outcome of those cases that were done before a worker died, if one did."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    others = set(multiprocessing.active_children())
    try:
        with _interrupts_for_this_process_only():  # workers start as tasks come
            running = {pool.submit(job.run, identifier, *task): identifier for identifier, task in tasks.items()}
        for future in as_completed(running):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield running[future], future.result()
    except (KeyboardInterrupt, GeneratorExit, FullDiskError):  # here, or where the outcomes are taken
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # its files are whole or not there
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_for_this_process_only() -> Iterator[None]:
    """Processes that are started meanwhile are not reached by Ctrl-C, which a terminal sends to all; each would answer
    it with a traceback."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent() -> None:
    """Ends this worker when the command is killed.

    By itself it would wait for ever, and until then go on writing what the command, started again, writes too.
    """

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _reject(outcome: Outcome, identifier: str, reason: str) -> None:
    outcome.rejected[identifier] = reason = " ".join(reason.split())
    tqdm.write(f"{identifier}: {reason}", file=sys.stderr)
