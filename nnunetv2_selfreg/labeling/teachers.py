"""Trained models that label: which there are, whether they may, and what they say of an image."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.file_path_utilities import convert_trainer_plans_config_to_identifier
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunetv2_selfreg import discovery
from nnunetv2_selfreg.data.datasets import read_json
from nnunetv2_selfreg.data.splits import some
from nnunetv2_selfreg.data.unlabeled import recipe
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import EXTRA_STATE, sha256


@dataclass(frozen=True)
class Teacher:
    """A checkpoint of a trained model."""

    model: Path
    """nnU-Net's model folder, with `plans.json`, `dataset.json` and the folds."""
    fold: int | str
    checkpoint: str

    @property
    def file(self) -> Path:
        return self.model / f"fold_{self.fold}" / self.checkpoint

    @cached_property
    def content(self) -> dict:
        """The checkpoint; tensors are read when they are used."""
        try:
            return torch.load(self.file, map_location="cpu", weights_only=False, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise UserError(f"{self.file} is damaged. Train that model again, or give another one.") from error

    @property
    def trainer(self) -> str:
        return self.content["trainer_name"]

    @property
    def configuration(self) -> str:
        return self.content["init_args"]["configuration"]

    @cached_property
    def sha256(self) -> str:
        """The checkpoint's hash."""
        return sha256(self.file)

    def seen(self, folds: Sequence[dict], labeled: Sequence[str]) -> set[str]:
        """The cases whose real labels it has learned from: those of its fold, and what a student's checkpoint says of
        its own teachers.

        Args:
            folds: of `splits_final.json`.
            labeled: all cases with labels.

        Raises:
            UserError: there is no such fold now.
        """
        own = {*self.content.get(EXTRA_STATE, {}).get("seen", ())}
        if self.fold == "all":
            return own | {*labeled}
        if self.fold >= len(folds):
            raise UserError(
                f"splits_final.json has no fold {self.fold}, so what {self.file} was trained on is not known."
            )
        return own | {*folds[self.fold]["train"]}

    def describe(self) -> dict:
        """As `pseudo_labels.json` names it."""
        return {
            "trainer": self.trainer,
            "fold": self.fold,
            "checkpoint": str(self.file.absolute()),
            "sha256": self.sha256,
        }


def find_teachers(models: Sequence[Path], folds: Sequence[int | str], checkpoint: str) -> list[Teacher]:
    """A teacher for each fold of each model.

    Raises:
        UserError: a checkpoint is not there, the message names what there is; a folder is none of a model's; or a
            teacher is given twice.
    """
    teachers = [Teacher(model, fold, checkpoint) for model in models for fold in folds]
    for teacher in teachers:
        if not teacher.file.is_file():
            raise UserError(f"There is no trained model {teacher.file}. {_what_there_is(teacher)}")
        for name in ("plans.json", "dataset.json"):
            if not (teacher.model / name).is_file():
                raise UserError(f"{teacher.model} has no {name}. Give the folder that nnU-Net's training has written.")
    if len({teacher.file.resolve() for teacher in teachers}) < len(teachers):
        raise UserError("A teacher is given twice. Name each model and fold once.")
    return teachers


def model_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """nnU-Net's folder of a trained model.

    Raises:
        UserError: nnUNet_results is not set.
    """
    if not nnUNet_results.is_set():
        raise UserError("nnUNet_results is not set. Set it to nnU-Net's folder of that name, or give a folder with -m.")
    return Path(nnUNet_results, dataset, convert_trainer_plans_config_to_identifier(trainer, plans, configuration))


def _what_there_is(teacher: Teacher) -> str:
    if there := sorted(file.name for file in teacher.file.parent.glob("checkpoint_*.pth")):
        return f"Its folder has {', '.join(there)}: finish the training with --c, or name one of these with -chk."
    if there := sorted(folder.name for folder in teacher.model.glob("fold_*")):
        return f"{teacher.model} has {', '.join(there)}. Give one of these with -f, or train this one."
    others = sorted(folder.name for folder in teacher.model.parent.glob("*__*__*"))
    return f"{teacher.model.parent} has {some(others) or 'none'}. Train it first, or name another one with -tr."


def check_teachers(
    teachers: Sequence[Teacher],
    plans: PlansManager,
    configuration: str,
    dataset_json: dict,
) -> None:
    """Checks that teachers can read the preprocessed images, and know the data set's labels.

    Args:
        teachers: with a checkpoint each.
        plans: with which the images were preprocessed.
        configuration: of the images.
        dataset_json: of the preprocessed data set.

    Raises:
        UserError: nnU-Net does not find a trainer, or a teacher has other labels, channels, plans or another
            configuration.
    """
    discovery.require(dict.fromkeys(teacher.trainer for teacher in teachers))
    current = recipe(plans, plans.get_configuration(configuration))
    for teacher in teachers:
        theirs, its_json = (read_json(teacher.model / name) for name in ("plans.json", "dataset.json"))
        manager = PlansManager(theirs)
        known = teacher.configuration in manager.available_configurations
        if not known or recipe(manager, manager.get_configuration(teacher.configuration)) != current:
            raise UserError(
                f"{teacher.model} was trained on images of other plans or of another configuration than "
                f"{configuration} of {plans.plans_name}. Give with -p and -c what it was trained with."
            )
        for entry in ("labels", "regions_class_order", "channel_names"):
            if its_json.get(entry) != dataset_json.get(entry):
                raise UserError(
                    f"{teacher.model} was trained with other {entry} than dataset.json has now. Train it again."
                )


def labels_seen(
    teachers: Sequence[Teacher], folds: Sequence[dict], labeled: Sequence[str], student: int | str
) -> set[str]:
    """The cases whose real labels the teachers have learned from.

    Args:
        teachers: of any folds.
        folds: of `splits_final.json`.
        labeled: all cases with labels.
        student: the fold that is trained with their labels.

    Raises:
        UserError: the student is validated on some of them.
    """
    held_out = set() if student == "all" else {*folds[student]["val"]}
    seen = {teacher: teacher.seen(folds, labeled) for teacher in teachers}
    for teacher, cases in seen.items():
        if both := sorted(cases & held_out):
            raise UserError(
                f"{teacher.file} was trained with labels of {some(both)}, on which the student of fold {student} is "
                "validated: its Dice would be too good. Take a teacher of the student's own fold."
            )
    return set().union(*seen.values())


class Opinions:
    """What teachers say of preprocessed images, by nnU-Net's own sliding window, mirrored."""

    def __init__(self, teachers: Sequence[Teacher], device: torch.device) -> None:
        self._predictors = []
        for model in dict.fromkeys(teacher.model for teacher in teachers):
            (checkpoint,) = {teacher.checkpoint for teacher in teachers}
            folds = [teacher.fold for teacher in teachers if teacher.model == model]
            with contextlib.redirect_stdout(io.StringIO()):  # 20 lines about the search for the trainer
                predictor = nnUNetPredictor(device=device, allow_tqdm=False)
                predictor.initialize_from_trained_model_folder(str(model), folds, checkpoint)
            self._predictors.append(predictor)
        self._one = len(teachers) == 1

    def __call__(self, image: Tensor) -> Iterator[Tensor]:
        """Logits of each opinion on an image `(C, *spatial)`, one after the other, `(K, *spatial)` in single precision.

        The opinions are the members'. A single model has two: the mirrored prediction, then the plain one; or one, if
        it was trained without mirroring.
        """
        for predictor in self._predictors:
            yield from _of_members(predictor, image)
        if self._one and self._predictors[0].allowed_mirroring_axes:
            (predictor,) = self._predictors
            predictor.use_mirroring = False
            yield from _of_members(predictor, image)
            predictor.use_mirroring = True

    @property
    def members(self) -> int:
        """How many of the opinions, the first ones, make the labels."""
        return sum(len(predictor.list_of_parameters) for predictor in self._predictors)


def _of_members(predictor: nnUNetPredictor, image: Tensor) -> Iterator[Tensor]:
    """nnU-Net's predictor hands out the mean of its members only, so it is given one at a time."""
    members = predictor.list_of_parameters
    for member in members:
        predictor.list_of_parameters = [member]
        logits = predictor.predict_logits_from_preprocessed_data(image).float()
        predictor.list_of_parameters = members
        yield logits
