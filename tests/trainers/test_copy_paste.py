from contract import FOUR_CELLS, TWO_CELLS, TrainerContract, TrainerMatrix


class _CopyPaste(TrainerMatrix):
    terms = ("segmentation", "labeled_part", "unlabeled_part", "unlabeled_part_weight", "student_dice")
    trains_cascades = False


class TestCopyPaste(_CopyPaste, TrainerContract):
    trainer = "nnUNetTrainerCopyPaste"
    chosen = FOUR_CELLS


class TestSelfRegCopyPaste(_CopyPaste):
    trainer = "nnUNetTrainerSelfRegCopyPaste"
    chosen = TWO_CELLS
    terms = (*_CopyPaste.terms, "scr", "ifd")
