from contract import ONE_CELL, TWO_CELLS, TrainerContract, TrainerMatrix


class _MeanTeacher(TrainerMatrix):
    terms = ("segmentation", "consistency", "consistency_weight", "student_dice")
    trains_cascades = False


class TestMeanTeacher(_MeanTeacher, TrainerContract):
    trainer = "nnUNetTrainerMeanTeacher"
    chosen = TWO_CELLS
    tools_are_chosen = False


class TestUAMeanTeacher(_MeanTeacher):
    trainer = "nnUNetTrainerUAMeanTeacher"
    chosen = ()  # with SelfReg below
    terms = (*_MeanTeacher.terms, "kept_voxels")


class TestSelfRegMeanTeacher(_MeanTeacher):
    trainer = "nnUNetTrainerSelfRegMeanTeacher"
    chosen = ()  # what it is made of is above
    terms = (*_MeanTeacher.terms, "scr", "ifd")


class TestSelfRegUAMeanTeacher(_MeanTeacher):
    trainer = "nnUNetTrainerSelfRegUAMeanTeacher"
    chosen = ONE_CELL
    terms = (*_MeanTeacher.terms, "kept_voxels", "scr", "ifd")
