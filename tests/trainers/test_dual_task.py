from contract import FOUR_CELLS, TWO_CELLS, TrainerContract, TrainerMatrix


class _DualTask(TrainerMatrix):
    terms = ("segmentation", "distance", "consistency", "consistency_weight")
    trains_cascades = False


class TestDualTask(_DualTask):
    trainer = "nnUNetTrainerDualTask"


class TestDualTaskMutual(_DualTask, TrainerContract):
    trainer = "nnUNetTrainerDualTaskMutual"
    chosen = FOUR_CELLS


class TestSelfRegDualTask(_DualTask):
    trainer = "nnUNetTrainerSelfRegDualTask"
    chosen = TWO_CELLS
    terms = (*_DualTask.terms, "scr", "ifd")


class TestSelfRegDualTaskMutual(_DualTask):
    trainer = "nnUNetTrainerSelfRegDualTaskMutual"
    chosen = TWO_CELLS
    terms = (*_DualTask.terms, "scr", "ifd")
