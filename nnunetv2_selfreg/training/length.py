"""Training length as a suffix of a trainer's name: `nnUNetTrainerSelfReg_50epochs`, `nnUNetTrainer_2epochs_20iters`.

nnU-Net itself ships a class for some numbers of epochs; here it is every number, for every trainer.
"""

from __future__ import annotations

import difflib
import re

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_selfreg.discovery import VARIABLE, external_folders, failed_import, list_trainers, trainers_of_others
from nnunetv2_selfreg.errors import SettingError, UserError, show_alone

ACCEPTED = "<trainer>_<N>epochs or <trainer>_<N>epochs_<M>iters, N and M whole numbers from 1"
_SUFFIX = re.compile(r"(?P<base>.*[^_])_(?P<epochs>[1-9][0-9]*)epochs(_(?P<iterations>[1-9][0-9]*)iters)?")
_ATTEMPT = re.compile(r".*_[-+]?[0-9.,]+_?(epochs?|iters?|iterations?)", re.IGNORECASE)
_LENGTH_HINT = f"If a training length is meant, it is {ACCEPTED}."
_SOMETHING_LIKE_A_LENGTH = re.compile(r"[0-9]_?(epochs?|iters?)", re.IGNORECASE)
_PREFIX = "nnUNetTrainer"
_ALIKE = 0.8  # of 1, as difflib measures it
_being_searched: set[str] = set()


def trainer_of_name(name: str) -> type[nnUNetTrainer]:
    """The trainer class that `name` asks for, if it ends in a training length; for others an error that helps.

    A class that really has this name wins: nnU-Net has looked among its own before it asks here, and all folders in
    `nnUNet_extTrainer` are searched first.

    Args:
        name: what was given to `-tr`.

    Raises:
        AttributeError: `name` is no trainer's, or there is nothing to say about it; nnU-Net's own error follows.
        SettingError: `name` ends in a malformed length, or in two of them.
        UserError: there is no trainer of the name, or of that before the length, but of one that is like it.
        RuntimeError: nnU-Net's own: there is none before the length.
    """
    if name in _being_searched or name.startswith("_"):
        raise AttributeError(f"{name} is not a trainer with a training length")
    show_alone()
    if not name.startswith(_PREFIX) and _near_miss(name) is None:
        raise AttributeError(f"{name} is no trainer")  # without a search: other programs ask modules for names too
    existing = _class_of_that_name(name)
    if existing is not None:
        return existing
    match = _SUFFIX.fullmatch(name)
    if match and not _SUFFIX.fullmatch(match["base"]):
        base = _find(match["base"])
        return with_length(base, name, int(match["epochs"]), int(match["iterations"]) if match["iterations"] else None)
    if _ATTEMPT.fullmatch(name):
        raise SettingError(f"The trainer name {name} has a malformed training length. Accepted: {ACCEPTED}")
    _refuse_near_miss(name)
    if _SOMETHING_LIKE_A_LENGTH.search(name):
        return _find(name)
    raise AttributeError(f"{name} is not a trainer with a training length")


def _find(name: str) -> type[nnUNetTrainer]:
    """As nnU-Net finds a trainer; the error says what may have been meant."""
    _being_searched.add(name)
    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        _refuse_near_miss(name)
        raise RuntimeError(f"{error}. {_LENGTH_HINT}" if _SOMETHING_LIKE_A_LENGTH.search(name) else error) from None
    finally:
        _being_searched.discard(name)


def _refuse_near_miss(name: str) -> None:
    """Raises a UserError if another trainer may be meant by a name that none has."""
    alike = _near_miss(name)
    if alike is not None:
        raise UserError(f"There is no trainer {name}. Did you mean {alike}?")


def _near_miss(name: str) -> str | None:
    """The trainer, of this package or of the user's folders, whose name is most like this one, if one's is."""

    def varying(name: str) -> str:
        return name.lower().removeprefix(_PREFIX.lower())

    known = {varying(trainer.name): trainer.name for trainer in [*list_trainers(), *trainers_of_others()]}
    return next((known[alike] for alike in difflib.get_close_matches(varying(name), known, 1, _ALIKE)), None)


def with_length(
    base: type[nnUNetTrainer], name: str, epochs: int, iterations: int | None = None
) -> type[nnUNetTrainer]:
    """A subclass of `base`, called `name`, that trains for `epochs` epochs of `iterations` iterations.

    Validation iterations shrink in proportion, at least 1. So does the interval of `checkpoint_latest` when the
    training is shorter than the trainer's own: with nnU-Net's 50 epochs a short training would never write one.
    """

    class OfLength(base):  # type: ignore[misc, valid-type]
        # nnU-Net reads the constructor's parameters by name, so they are spelled out.
        def __init__(
            self,
            plans: dict,
            configuration: str,
            fold: int,
            dataset_json: dict,
            device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
        ) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.save_every = min(self.save_every, _in_proportion(self.save_every, epochs, self.num_epochs))
            self.num_epochs = epochs
            if iterations is not None:
                self.num_val_iterations_per_epoch = _in_proportion(
                    self.num_val_iterations_per_epoch, iterations, self.num_iterations_per_epoch
                )
                self.num_iterations_per_epoch = iterations

    OfLength.__name__ = OfLength.__qualname__ = name
    OfLength.__module__ = base.__module__
    OfLength.__doc__ = f"{base.__name__}, {epochs} epochs" + (f" of {iterations} iterations" if iterations else "")
    return OfLength


def _in_proportion(value: int, new: int, old: int) -> int:
    return max(1, round(value * new / old))


def _class_of_that_name(name: str) -> type[nnUNetTrainer] | None:
    """A class in one of the external folders. This module is asked again on the way and must not answer then."""
    _being_searched.add(name)
    try:
        for folder in map(str, external_folders()):
            found = recursive_find_python_class(
                folder, name, None, base_folder=folder, cleanup_imports_from_base_folder=True
            )
            if found is not None:
                return found
        return None
    except Exception as error:  # whatever a module of the user's raises
        if (file := failed_import(error)) is None:
            raise
        raise UserError(
            f"{file} in {VARIABLE} cannot be imported ({type(error).__name__}: {error}), and nnU-Net stops there. Mend "
            "it, or move it away."
        ) from error
    finally:
        _being_searched.discard(name)
