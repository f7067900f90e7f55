"""Trained models that label: which there are, whether they may, and what they say of an image."""

from __future__ import annotations

import contextlib
import io
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
from nnunetv2_selfreg.files import sha256


@dataclass(frozen=True)
class Teacher:
    """A checkpoint of a trained model."""

    model: Path
    """nnU-Net's model folder, `<trainer>__<plans>__<configuration>`."""
    fold: int | str
    checkpoint: str

    @property
    def file(self) -> Path:
        return self.model / f"fold_{self.fold}" / self.checkpoint

    @property
    def trainer(self) -> str:
        return self.model.name.partition("__")[0]

    @cached_property
    def sha256(self) -> str:
        """The checkpoint's hash."""
        return sha256(self.file)

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
        UserError: a checkpoint is not there, the message names what there is; or one is given twice.
    """
    for model in models:
        if model.name.count("__") != 2:
            raise UserError(
                f"{model} is no model folder of nnU-Net: name one as <trainer>__<plans>__<configuration>, in which the "
                "folds are."
            )
    teachers = [Teacher(model, fold, checkpoint) for model in models for fold in folds]
    for teacher in teachers:
        if not teacher.file.is_file():
            raise UserError(f"There is no trained model {teacher.file}. {_what_there_is(teacher)}")
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
    folds: Sequence[dict],
    student: int | str,
) -> None:
    """Checks that teachers fit the preprocessed images, and know nothing of what the student is validated on.

    Args:
        teachers: with a checkpoint each.
        plans: with which the images were preprocessed.
        configuration: of the images.
        dataset_json: of the preprocessed data set.
        folds: of `splits_final.json`.
        student: its fold.

    Raises:
        UserError: nnU-Net does not find a trainer, a teacher has other labels, channels, plans or another
            configuration, or was trained with labels of the student's validation cases.
    """
    discovery.require(dict.fromkeys(teacher.trainer for teacher in teachers))
    current = recipe(plans, plans.get_configuration(configuration))
    held_out = set() if student == "all" else set(folds[student]["val"])
    for teacher in teachers:
        theirs, its_json = (read_json(teacher.model / name) for name in ("plans.json", "dataset.json"))
        name = teacher.model.name.rpartition("__")[2]
        if name not in theirs["configurations"] or recipe(*_planned(theirs, name)) != current:
            raise UserError(
                f"{teacher.model} was trained on images of other plans or of another configuration than "
                f"{configuration} of {plans.plans_name}. Give with -p and -c what it was trained with."
            )
        for entry in ("labels", "regions_class_order", "channel_names"):
            if its_json.get(entry) != dataset_json.get(entry):
                raise UserError(
                    f"{teacher.model} was trained with other {entry} than dataset.json has now. Train it again."
                )
        _check_held_out(teacher, folds, held_out, student)


def _planned(plans: dict, configuration: str):
    manager = PlansManager(plans)
    return manager, manager.get_configuration(configuration)


def _check_held_out(teacher: Teacher, folds: Sequence[dict], held_out: set[str], student: int | str) -> None:
    if not held_out:
        return
    if teacher.fold == "all":
        seen = held_out
    elif teacher.fold < len(folds):
        seen = held_out & set(folds[teacher.fold]["train"])
    else:
        raise UserError(f"splits_final.json has no fold {teacher.fold}, so what {teacher.file} saw is not known.")
    if seen:
        raise UserError(
            f"{teacher.file} was trained with labels of {some(sorted(seen))}, on which the student of fold {student} "
            "is validated: its Dice would be too good. Take a teacher of the student's own fold."
        )


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
        self._mirrored = any(predictor.allowed_mirroring_axes for predictor in self._predictors)

    def __call__(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits of all members together, and those of each opinion, `(K, *spatial)` in single precision.

        The opinions are the members'. A single model has two: the mirrored prediction, which is its label, and the
        plain one; or one, if it was trained without mirroring.
        """
        opinions = [logits for predictor in self._predictors for logits in _of_members(predictor, image)]
        together = torch.stack(opinions).mean(0)
        if self._one and self._mirrored:
            (predictor,) = self._predictors
            predictor.use_mirroring = False
            opinions += _of_members(predictor, image)
            predictor.use_mirroring = True
        return together, opinions


def _of_members(predictor: nnUNetPredictor, image: Tensor) -> Iterator[Tensor]:
    """nnU-Net's predictor hands out the mean of its members only, so it is given one at a time."""
    members = predictor.list_of_parameters
    for member in members:
        predictor.list_of_parameters = [member]
        yield predictor.predict_logits_from_preprocessed_data(image).float()
    predictor.list_of_parameters = members
