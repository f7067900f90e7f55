from contract import FOUR_CELLS, TWO_CELLS, TrainerContract, TrainerMatrix


class _MeanTeacher(TrainerMatrix):
    terms = ("segmentation", "consistency", "consistency_weight", "student_dice")
    trains_cascades = False


class TestMeanTeacher(_MeanTeacher, TrainerContract):
    trainer = "nnUNetTrainerMeanTeacher"
    chosen = FOUR_CELLS


class TestUAMeanTeacher(_MeanTeacher):
    trainer = "nnUNetTrainerUAMeanTeacher"
    chosen = TWO_CELLS
    terms = (*_MeanTeacher.terms, "kept_voxels")


class TestSelfRegMeanTeacher(_MeanTeacher):
    trainer = "nnUNetTrainerSelfRegMeanTeacher"
    chosen = TWO_CELLS
    terms = (*_MeanTeacher.terms, "scr", "ifd")


class TestSelfRegUAMeanTeacher(_MeanTeacher):
    trainer = "nnUNetTrainerSelfRegUAMeanTeacher"
    chosen = TWO_CELLS
    terms = (*_MeanTeacher.terms, "kept_voxels", "scr", "ifd")
