"""Which trained models may label, and why others may not."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from workspace import Run

from nnunetv2_selfreg.data.datasets import labeled_cases
from nnunetv2_selfreg.data.splits import read_splits
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.labeling.teachers import Opinions, Teacher, check_teachers, find_teachers, labels_seen

NAME = "nnUNetTrainer_1epochs_1iters"


@pytest.fixture
def run(data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    run = Run(data_sets.name("labels"), "3d_fullres", NAME)
    run.build().run_training()
    return run


def check(run: Run, teacher: Teacher) -> None:
    folder = Path(os.environ["nnUNet_preprocessed"]) / run.data_set
    plans = PlansManager(str(folder / "nnUNetPlans.json"))
    check_teachers([teacher], plans, run.configuration, load_json(str(folder / "dataset.json")))


def seen_by(run: Run, teacher: Teacher, student: int | str = 0) -> set[str]:
    folder = Path(os.environ["nnUNet_preprocessed"]) / run.data_set
    return labels_seen([teacher], read_splits(folder / "splits_final.json"), labeled_cases(folder), student)


def found(run: Run, **changed) -> Teacher:
    what = {"models": [run.model_folder], "folds": [0], "checkpoint": "checkpoint_final.pth"}
    (teacher,) = find_teachers(**{**what, **changed})
    return teacher


def test_teacher_of_the_students_own_fold_may_label(run):
    teacher = found(run)
    check(run, teacher)
    assert teacher.describe().items() >= {"trainer": NAME, "fold": 0}.items()
    assert len(teacher.sha256) == 64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"folds": [1]}, r"There is no trained model .*fold_1.*has fold_0. Give one of these with -f, or train this"),
        ({"checkpoint": "mine.pth"}, r"Its folder has checkpoint_.*: finish the training with --c, or name one"),
        ({"models": [Path("nowhere/a__b__c")]}, "nowhere has none. Train it first, or name another one with -tr"),
        ({"folds": [0, 0]}, "A teacher is given twice"),
    ],
)
def test_teacher_that_is_not_there(changed, message, run):
    with pytest.raises(UserError, match=message):
        found(run, **changed)


def test_another_trainer_that_is_there_is_named(run):
    with pytest.raises(UserError, match=f"has {run.model_folder.name}. Train it first"):
        found(run, models=[run.model_folder.with_name("nnUNetTrainerUXNet__nnUNetPlans__3d_fullres")])


def test_folder_without_plans_is_no_model(run):
    (run.model_folder / "plans.json").unlink()
    with pytest.raises(UserError, match=r"has no plans.json. Give the folder that nnU-Net's training has written"):
        found(run)


def test_damaged_checkpoint_is_named(run):
    file = run.folder / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint_final.pth is damaged. Train that model again"):
        check(run, found(run))


def test_teacher_that_saw_labels_of_the_students_validation_cases_is_refused(run):
    """Each fold's validation cases are among the other one's training cases, and among fold all's."""
    own = {"phantom_000", "phantom_001", "phantom_002"}
    assert seen_by(run, found(run)) == own
    with pytest.raises(UserError, match=r"trained with labels of phantom_\d+.*, on which the student of fold 1 is"):
        seen_by(run, found(run), student=1)
    shutil.copytree(run.folder, run.model_folder / "fold_all")
    with pytest.raises(UserError, match=r"fold_all.* was trained with labels of .*student of fold 0"):
        seen_by(run, found(run, folds=["all"]))
    assert seen_by(run, found(run), student="all") == own  # which has no held-out case
    shutil.copytree(run.folder, run.model_folder / "fold_9")
    with pytest.raises(UserError, match=r"has no fold 9, so what .* was trained on is not known"):
        seen_by(run, found(run, folds=[9]))


def test_students_checkpoint_tells_what_its_teacher_saw(run):
    """So that labels do not come back to the validation through two rounds."""
    file = run.folder / "checkpoint_final.pth"
    torch.save({**run.load(), "nnunetv2_selfreg": {"seen": ["phantom_004"]}}, file)
    with pytest.raises(UserError, match=r"was trained with labels of phantom_004, on which the student of fold 0 is"):
        seen_by(run, found(run))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("dataset.json", lambda d: d["labels"].update(veins=1, atrium=2), "was trained with other labels than"),
        ("dataset.json", lambda d: d.update(channel_names={"0": "CT"}), "was trained with other channel_names"),
        (
            "plans.json",
            lambda p: p["configurations"]["3d_fullres"].update(spacing=[1.0, 1.0, 1.0]),
            "was trained on images of other plans or of another configuration than 3d_fullres of nnUNetPlans",
        ),
    ],
)
def test_teacher_that_cannot_read_these_images_is_refused(file, change, message, run):
    content = load_json(str(run.model_folder / file))
    change(content)
    save_json(content, str(run.model_folder / file))
    with pytest.raises(UserError, match=message):
        check(run, found(run))


def test_teacher_of_another_configuration_is_refused(run, data_sets):
    low = Run(run.data_set, "3d_lowres", NAME)
    low.build().run_training()
    with pytest.raises(UserError, match="another configuration than 3d_fullres"):
        check(run, found(low))


def test_trainer_that_nnunet_does_not_find_is_named(run):
    torch.save({**run.load(), "trainer_name": "nnUNetTrainerOfMine"}, run.folder / "checkpoint_final.pth")
    with pytest.raises(UserError, match="-tr nnUNetTrainerOfMine: "):
        check(run, found(run))


def test_model_folder_may_have_any_name(run):
    renamed = run.model_folder.rename(run.model_folder.with_name("best"))
    teacher = found(run, models=[renamed])
    check(run, teacher)
    assert teacher.describe()["trainer"] == NAME


IMAGE = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(0))


def test_model_that_does_not_mirror_has_one_opinion(run):
    checkpoint = run.load()
    torch.save({**checkpoint, "inference_allowed_mirroring_axes": None}, run.folder / "checkpoint_final.pth")
    assert len([*Opinions([found(run)], torch.device("cpu"))(IMAGE)]) == 1


def test_models_of_several_folders_are_members_each_with_its_own_opinion(run):
    other = Run(run.data_set, run.configuration, "nnUNetTrainer_2epochs_1iters")
    other.build().run_training()
    teachers = find_teachers([run.model_folder, other.model_folder], [0], "checkpoint_final.pth")
    opinions = Opinions(teachers, torch.device("cpu"))
    together = [*opinions(IMAGE)]
    alone = [next(Opinions([teacher], torch.device("cpu"))(IMAGE)) for teacher in teachers]
    assert opinions.members == len(together) == 2
    torch.testing.assert_close(together, alone)
    assert not torch.equal(*together)
