from contract import TrainerContract, TrainerMatrix


class _DualTask(TrainerMatrix):
    terms = ("segmentation", "distance", "consistency", "consistency_weight")
    trains_cascades = False


class TestDualTask(_DualTask, TrainerContract):
    trainer = "nnUNetTrainerDualTask"


class TestDualTaskMutual(_DualTask):
    trainer = "nnUNetTrainerDualTaskMutual"


class TestSelfRegDualTask(_DualTask):
    trainer = "nnUNetTrainerSelfRegDualTask"
    terms = (*_DualTask.terms, "scr", "ifd")


class TestSelfRegDualTaskMutual(_DualTask):
    trainer = "nnUNetTrainerSelfRegDualTaskMutual"
    terms = (*_DualTask.terms, "scr", "ifd")
