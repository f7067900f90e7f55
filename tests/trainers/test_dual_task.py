from contract import ONE_CELL, TrainerContract, TrainerMatrix


class _DualTask(TrainerMatrix):
    terms = ("segmentation", "distance", "consistency", "consistency_weight")
    trains_cascades = False


class _Mutual(_DualTask):
    terms = ("segmentation", "distance_dice", "consistency", "consistency_weight")


class TestDualTask(_DualTask, TrainerContract):
    trainer = "nnUNetTrainerDualTask"
    chosen = (("labels", "3d_fullres"),)
    tools_are_chosen = False


class TestDualTaskMutual(_Mutual):
    trainer = "nnUNetTrainerDualTaskMutual"
    chosen = ONE_CELL


class TestSelfRegDualTask(_DualTask):
    trainer = "nnUNetTrainerSelfRegDualTask"
    chosen = ()  # what it is made of is above
    terms = (*_DualTask.terms, "scr", "ifd")


class TestSelfRegDualTaskMutual(_Mutual):
    trainer = "nnUNetTrainerSelfRegDualTaskMutual"
    chosen = ONE_CELL
    terms = (*_Mutual.terms, "scr", "ifd")
