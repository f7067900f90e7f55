from contract import ONE_CELL, TWO_CELLS, TrainerContract, TrainerMatrix
from workspace import Run, write_pseudo_labels


class _SelfTraining(TrainerMatrix):
    trains_cascades = False

    @staticmethod
    def prepare(run: Run) -> None:
        write_pseudo_labels(run)


class TestSelfTraining(_SelfTraining, TrainerContract):
    trainer = "nnUNetTrainerSelfTraining"
    terms = ("segmentation", "pseudo_segmentation", "pseudo_weight")
    chosen = TWO_CELLS
    tools_are_chosen = False  # its files are a stock trainer's


class TestSelfTrainingCopyPaste(_SelfTraining):
    trainer = "nnUNetTrainerSelfTrainingCopyPaste"
    terms = ("segmentation", "labeled_part", "unlabeled_part", "student_dice")
    chosen = ONE_CELL
    cascade_is_chosen = False


class TestSelfRegSelfTraining(_SelfTraining):
    trainer = "nnUNetTrainerSelfRegSelfTraining"
    terms = (*TestSelfTraining.terms, "scr", "ifd")
    chosen = ()  # what it is made of is above, and in the other families
    cascade_is_chosen = False
