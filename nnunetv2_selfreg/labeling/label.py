"""Labels a fold's unlabelled pool with trained models, whole volumes, and says on which cases they disagree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor
from tqdm import tqdm

from nnunetv2_selfreg.data.datasets import labeled_cases, preprocessed_folder
from nnunetv2_selfreg.data.preprocessing import prepare
from nnunetv2_selfreg.data.pseudo_labels import FILE, OVERVIEW, Description, folder_of, left_out, read_case, store_case
from nnunetv2_selfreg.data.splits import check_fold, folds_of
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool, find_pool, recipe
from nnunetv2_selfreg.data.views import outside_of_body
from nnunetv2_selfreg.errors import UnsupportedError, UserError
from nnunetv2_selfreg.labeling.teachers import Opinions, check_teachers, find_teachers, labels_seen


@dataclass(frozen=True)
class Job:
    """What is to be labelled, for whom."""

    folder: Path
    """Where the pseudo-labels go."""
    pool: UnlabeledPool
    configuration: ConfigurationManager
    manager: LabelManager
    device: torch.device


def pseudo_label(
    dataset: str,
    configuration: str,
    models: Sequence[Path],
    folds: Sequence[int | str],
    plans_name: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    student: int | str | None = None,
    drop: float = 0.1,
    keep_empty: bool = False,
    name: str = "",
    overwrite: bool = False,
    part: tuple[int, int] = (0, 1),
    device: str = "cpu",
) -> tuple[Job, Description]:
    """Labels the pool of a fold; cases that these teachers have labelled are skipped.

    Only images are opened, never a label of an unlabelled case. With parts, each labels its share, and
    `pseudo_labels.json` knows all cases when the last one has ended.

    Args:
        dataset: as given to nnU-Net's `-d`.
        configuration: of teachers and student.
        models: nnU-Net's model folders.
        folds: of each model.
        plans_name: as given to nnU-Net's `-p`.
        checkpoint: its file's name.
        student: the fold for which is labelled; None: the teacher's, if all have the same.
        drop: the share of cases with the largest disagreement that is left out.
        keep_empty: whether cases in which no foreground is found are kept.
        name: of a further set for the same fold.
        overwrite: whether the labels of other teachers are replaced.
        part: which part of how many.
        device: of the networks.

    Returns:
        What was labelled, and what `pseudo_labels.json` says now.

    Raises:
        UserError: before anything is written, what :func:`find_teachers`, :func:`check_teachers`, :func:`labels_seen`
            and :func:`find_pool` raise, and values that cannot be; other teachers' labels are there.
    """
    if not 0 <= drop < 1:
        raise UserError(f"--drop {drop} is no share of cases. Give one from 0 to less than 1, as 0.1.")
    folder = preprocessed_folder(dataset)
    prepared = prepare(folder, [configuration], plans_name)
    planned = prepared.plans.get_configuration(configuration)
    if planned.previous_stage_name is not None:
        raise UnsupportedError(
            f"-c {configuration} is the second stage of a cascade: unlabelled cases have no segmentation of the "
            "previous one. Label with 3d_fullres or 3d_lowres."
        )
    if not re.fullmatch(r"[A-Za-z0-9-]*", name):
        raise UserError(f"--name {name}: letters, digits and hyphens only, as it is part of a folder's name.")
    teachers = find_teachers(models, folds, checkpoint)
    check_teachers(teachers, prepared.plans, configuration, prepared.dataset_json)
    student = _student(student, folds)
    splits, labeled = [] if {*folds, student} == {"all"} else folds_of(folder), labeled_cases(folder)
    cases, current = folder / planned.data_identifier, recipe(prepared.plans, planned)
    pool = _pool(cases, splits, labeled, student, current)
    description = Description(
        student,
        [teacher.describe() for teacher in teachers],
        sorted(labels_seen(teachers, splits, labeled, student)),
        current,
        prepared.dataset_json["labels"],
        "members" if len(teachers) > 1 else "mirrored and plain prediction",
        drop,
        keep_empty,
    )
    manager = prepared.plans.get_label_manager(prepared.dataset_json)
    job = Job(folder_of(cases, student, name), pool, planned, manager, torch.device(device))
    _begin(job, description, overwrite)
    mine = pool.identifiers[part[0] :: part[1]]  # of the whole pool: parts need not start together
    if left := [case for case in mine if _done(job, case, description) is None]:
        _label(job, Opinions(teachers, job.device), left, description.made_by)
    _finish(job, description)
    return job, description


def _student(student: int | str | None, folds: Sequence[int | str]) -> int | str:
    if student is not None:
        return student
    if len(folds) > 1:
        raise UserError(
            "Teachers of several folds: say with --student which fold is trained with their labels. It is `all` unless "
            "none of them saw what that fold validates on."
        )
    return folds[0]


def _pool(
    cases: Path, splits: Sequence[dict], labeled: Sequence[str], student: int | str, current: dict
) -> UnlabeledPool:
    if student == "all":
        return find_pool(cases, {"train": labeled, "val": []}, student, current)
    check_fold(cases.with_name("splits_final.json"), student, labeled)
    return find_pool(cases, splits[student], student, current)


def _done(job: Job, case: str, description: Description) -> dict | None:
    return read_case(job.folder, case, description.made_by, job.pool.fingerprint(case))


def _begin(job: Job, description: Description, overwrite: bool) -> None:
    """Says whose labels are made, before the first."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with _lock(job):
        there = Description.read(job.folder)
        if there is not None and there.made_by == description.made_by:
            return
        if there is not None and not overwrite:
            raise UserError(
                f"{job.folder} has labels of other teachers: {there.teachers_named}. Replace them with --overwrite, or "
                "keep both: give these a --name."
            )
        description.save(job.folder)
        (job.folder / OVERVIEW).unlink(missing_ok=True)


def _lock(job: Job) -> FileLock:
    """For what is in `pseudo_labels.json`, which several parts write."""
    return FileLock(job.folder / f"{FILE}.lock")


def _label(job: Job, opinions: Opinions, cases: Iterable[str], made_by: list[str]) -> None:
    masked = [channel for channel, is_masked in enumerate(job.configuration.use_mask_for_norm) if is_masked]
    for case in tqdm(cases, desc="Labelling", unit="case"):
        image = torch.from_numpy(np.asarray(job.pool.load_image(case)[:]))
        labels, disagreement = judge(opinions(image), opinions.members, job.manager)
        if masked:  # of -1 in a label map nnU-Net's training masks the image; its preprocessing keeps foreground there
            labels[(labels == 0) & (outside_of_body(image[masked])[0].numpy() < 0)] = -1
        fingerprint, patch_size = job.pool.fingerprint(case), job.configuration.patch_size
        store_case(job.folder, case, labels, job.manager, disagreement, made_by, fingerprint, patch_size)


def judge(opinions: Iterable[Tensor], members: int, manager: LabelManager) -> tuple[np.ndarray, float | None]:
    """Hard labels, and how much the opinions on them differ.

        u = voxels where two opinions differ / voxels of foreground

    Args:
        opinions: logits of each, `(K, *spatial)`; not more than one is kept, since whole volumes of many classes are
            large.
        members: the first so many of them make the labels, by their mean.
        manager: of the data set's labels.

    Returns:
        Labels `(*spatial)`, int16, and `u`; without foreground the denominator is 1, and None of a single opinion.
    """
    total, hard = None, []
    for logits in opinions:
        hard.append(_hard(logits, manager))
        if len(hard) <= members:
            total = logits if total is None else total.add_(logits)
    labels = hard[0].copy() if members == 1 else _hard(total / members, manager)
    if len(hard) == 1:
        return labels, None
    differ = np.any([hard[0] != other for other in hard[1:]], 0)
    return labels, float(differ.sum() / max(1, (labels > 0).sum()))


def _hard(logits: Tensor, manager: LabelManager) -> np.ndarray:
    return np.asarray(manager.convert_logits_to_segmentation(logits)).astype(np.int16)


def _finish(job: Job, description: Description) -> None:
    """Notes what is labelled by now, by whatever part, and what of it is left out."""
    with _lock(job):
        said = {case: _done(job, case, description) for case in job.pool.identifiers}
        done = {case: content for case, content in said.items() if content is not None}
        description.disagreement = {case: content["disagreement"] for case, content in done.items()}
        empty = [case for case, content in done.items() if content["empty"]]
        description.dropped = left_out(description.disagreement, empty, description.drop, description.keep_empty)
        if Description.read(job.folder) != description:
            (job.folder / OVERVIEW).unlink(missing_ok=True)  # it shows what was left out before
        description.save(job.folder)
