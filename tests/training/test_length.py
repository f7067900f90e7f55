"""Training length as a suffix, looked up exactly as nnU-Net's commands do."""

import os
import shutil

import pytest
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
from workspace import Run

from nnunetv2_selfreg import discovery
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.training import length


@pytest.fixture
def folder_of_a_user(tmp_path, monkeypatch):
    """A user's own folder with trainers, searched before or after this package's."""
    from nnunetv2.paths import nnUNet_extTrainer

    def make(before: bool = False, **modules: str):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        folders = [str(nnUNet_extTrainer), str(tmp_path)]
        monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(reversed(folders) if before else folders))
        return tmp_path

    return make


OWN = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class {name}(nnUNetTrainer):
    mine = True
"""


@pytest.mark.parametrize(
    ("name", "base", "epochs", "iterations", "validation", "save_every"),
    [
        ("nnUNetTrainerSelfReg_50epochs", "nnUNetTrainerSelfReg", 50, 250, 50, 2),
        ("nnUNetTrainerSelfReg_2epochs_20iters", "nnUNetTrainerSelfReg", 2, 20, 4, 1),
        ("nnUNetTrainer_3epochs_1iters", "nnUNetTrainer", 3, 1, 1, 1),
        ("nnUNetTrainer_2epochs_20iters", "nnUNetTrainer", 2, 20, 4, 1),
        ("nnUNetTrainerNoDeepSupervision_7epochs", "nnUNetTrainerNoDeepSupervision", 7, 250, 50, 1),
        ("nnUNetTrainer_3000epochs", "nnUNetTrainer", 3000, 250, 50, 50),
        ("nnUNetTrainer_250epochs_NoMirroring_2epochs_5iters", "nnUNetTrainer_250epochs_NoMirroring", 2, 5, 1, 1),
    ],
)
def test_suffix_sets_the_length(name, base, epochs, iterations, validation, save_every, data_sets):
    trainer = Run(data_sets.name("labels"), "2d", name).build()
    assert type(trainer).__name__ == name
    assert base in [cls.__name__ for cls in type(trainer).__mro__]
    assert trainer.num_epochs == epochs
    assert (trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (iterations, validation)
    assert trainer.save_every == save_every


def test_nnunets_own_class_of_that_name_wins():
    assert find("nnUNetTrainer_5epochs").__module__.startswith("nnunetv2.")


@pytest.mark.parametrize("before", [True, False])
def test_class_of_a_user_with_that_name_wins(folder_of_a_user, before):
    folder_of_a_user(before, own=OWN.format(name="nnUNetTrainer_3epochs"))
    assert find("nnUNetTrainer_3epochs").mine


def test_class_of_a_user_whose_name_looks_malformed_wins(folder_of_a_user):
    folder_of_a_user(own=OWN.format(name="nnUNetTrainer_0epochs_special"))
    assert find("nnUNetTrainer_0epochs_special").mine


@pytest.mark.parametrize("before", [True, False])
def test_trainer_of_a_user_takes_a_suffix(folder_of_a_user, before):
    folder_of_a_user(before, own=OWN.format(name="nnUNetTrainerMine"))
    assert find("nnUNetTrainerMine_3epochs").mine


def test_two_copies_of_this_package_do_not_ask_each_other_for_ever(folder_of_a_user):
    copy = (discovery.trainers_folder() / "nnUNetTrainer_training_length.py").read_text()
    folder_of_a_user(nnUNetTrainer_training_length=copy)
    assert find("nnUNetTrainer_3epochs").__name__ == "nnUNetTrainer_3epochs"


@pytest.mark.parametrize("module", ["aaa", "zzz"])
def test_class_in_this_packages_own_folder_wins(module, tmp_path, monkeypatch):
    folder = shutil.copytree(discovery.trainers_folder(), tmp_path / "trainers")
    (folder / f"{module}.py").write_text(OWN.format(name="nnUNetTrainer_3epochs"))
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    assert find("nnUNetTrainer_3epochs").mine
    assert not hasattr(find("nnUNetTrainer_4epochs"), "mine")


@pytest.mark.parametrize(
    "suffix",
    [
        "_0epochs",
        "_-5epochs",
        "_1.5epochs",
        "_5epoch",
        "_5epochs_0iters",
        "_20iters",
        "_2epochs_20iterations",
        "_05epochs",
        "_5epochs_3epochs",
    ],
)
def test_malformed_suffix_names_the_accepted_form(suffix):
    with pytest.raises(ValueError, match=r"malformed.*<N>epochs_<M>iters"):
        find("nnUNetTrainerSelfReg" + suffix)


@pytest.mark.parametrize("name", ["nnUNetTrainerUnknown", "nnUNetTrainerUnknown_5epochs", "nnUNetTrainer_epochs"])
def test_unknown_trainer_is_nnunets_own_error(name):
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        find(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("nnUNetTrainerSelfreg", "nnUNetTrainerSelfReg"),
        ("nnUNetTrainerMeanTeachr", "nnUNetTrainerMeanTeacher"),
        ("nnunettrainerselfreg", "nnUNetTrainerSelfReg"),
        ("SelfReg", "nnUNetTrainerSelfReg"),
        ("nnUNetTrainerUXnet_5epochs", "nnUNetTrainerUXNet"),
        ("nnUNetTrainerCopypaste_2epochs_20iters", "nnUNetTrainerCopyPaste"),
    ],
)
def test_near_miss_is_named_in_the_error_that_is_seen_last(name, meant):
    with pytest.raises(UserError, match=rf"There is no trainer {name.partition('_')[0]}. Did you mean {meant}\?$"):
        find(name)


def test_near_miss_of_the_users_own_trainer_is_named_too(folder_of_a_user):
    folder_of_a_user(own=OWN.format(name="nnUNetTrainerOfMine"))
    with pytest.raises(UserError, match=r"Did you mean nnUNetTrainerOfMine\?$"):
        find("nnUNetTrainerOfmine")


def test_the_users_own_name_wins_however_like_one_of_ours(folder_of_a_user):
    folder_of_a_user(own=OWN.format(name="UXNet2"))
    assert find("UXNet2").mine


def test_module_of_ours_is_not_blamed_for_a_name_that_nobody_has():
    assert "cannot be imported" not in discovery.why_not_found("nnUNetTrainerFooBar_5epochs")


def test_broken_module_of_the_user_is_named(folder_of_a_user):
    folder = folder_of_a_user(broken="import a_package_that_is_not_there")
    with pytest.raises(UserError, match=rf"{folder / 'broken.py'} in nnUNet_extTrainer cannot be imported .*No module"):
        find("nnUNetTrainerSelfReg_5epochs")


def test_foreign_name_with_something_like_a_length_is_not_found(folder_of_a_user):
    name = "nnUNetTrainer_2000_epochs_DA5NoMirroring"
    hint = r"If a training length is meant, it is <trainer>_<N>epochs or .*\.$"
    with pytest.raises(RuntimeError, match=rf"Could not find requested nnunet trainer {name} .*{hint}"):
        find(name)
    folder_of_a_user(own=OWN.format(name=name))
    assert find(name).mine


def test_name_of_a_user_that_is_like_one_of_ours_wins(folder_of_a_user):
    folder_of_a_user(own=OWN.format(name="nnUNetTrainerSelfReg2"))
    assert find("nnUNetTrainerSelfReg2").mine


def test_other_names_are_not_answered():
    with pytest.raises(AttributeError):
        length.trainer_of_name("__path__")
