import pytest
from contract import TrainerContract
from workspace import InProcess, Run


class TestMeanTeacher(TrainerContract):
    trainer = "nnUNetTrainerMeanTeacher"
    terms = ("segmentation", "consistency", "consistency_weight", "student_dice")
    trains_cascades = False


@pytest.mark.parametrize(
    ("trainer", "variant", "configuration", "terms"),
    [
        ("nnUNetTrainerUAMeanTeacher", "regions_ignore", "3d_fullres", {"kept_voxels"}),
        ("nnUNetTrainerSelfRegMeanTeacher", "ignore", "2d", {"scr", "ifd"}),
        ("nnUNetTrainerSelfRegUAMeanTeacher", "labels", "3d_fullres", {"kept_voxels", "scr", "ifd"}),
    ],
)
def test_relatives_train_resume_validate_and_predict(trainer, variant, configuration, terms, data_sets, tmp_path):
    contract, runner = TestMeanTeacher(), InProcess()
    contract.terms = (*TestMeanTeacher.terms, *terms)
    run = Run(data_sets.name(variant), configuration, f"{trainer}_2epochs_2iters")
    runner.train_and_interrupt(run)
    runner.resume(run)
    contract.check_training(run)
    runner.predict(run, run.raw / "imagesTs", tmp_path)
    contract.check_prediction(tmp_path)
