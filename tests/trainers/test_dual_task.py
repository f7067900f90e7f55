from contract import FOUR_CELLS, TWO_CELLS, TrainerContract, TrainerMatrix


class _DualTask(TrainerMatrix):
    terms = ("segmentation", "distance", "consistency", "consistency_weight")
    trains_cascades = False


class _Mutual(_DualTask):
    terms = ("segmentation", "distance_dice", "consistency", "consistency_weight")


class TestDualTask(_DualTask, TrainerContract):
    trainer = "nnUNetTrainerDualTask"
    chosen = FOUR_CELLS


class TestDualTaskMutual(_Mutual):
    trainer = "nnUNetTrainerDualTaskMutual"
    chosen = TWO_CELLS


class TestSelfRegDualTask(_DualTask):
    trainer = "nnUNetTrainerSelfRegDualTask"
    chosen = TWO_CELLS
    terms = (*_DualTask.terms, "scr", "ifd")


class TestSelfRegDualTaskMutual(_Mutual):
    trainer = "nnUNetTrainerSelfRegDualTaskMutual"
    chosen = TWO_CELLS
    terms = (*_Mutual.terms, "scr", "ifd")
