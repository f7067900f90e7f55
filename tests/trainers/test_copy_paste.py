from contract import TWO_CELLS, TrainerContract, TrainerMatrix


class _CopyPaste(TrainerMatrix):
    terms = ("segmentation", "labeled_part", "unlabeled_part", "unlabeled_part_weight", "student_dice")
    trains_cascades = False


class TestCopyPaste(_CopyPaste, TrainerContract):
    trainer = "nnUNetTrainerCopyPaste"
    chosen = TWO_CELLS


class TestLabeledCopyPaste(_CopyPaste):
    trainer = "nnUNetTrainerLabeledCopyPaste"
    chosen = ()  # copy-paste's warm-up to the end
    cascade_is_chosen = False


class TestSelfRegCopyPaste(_CopyPaste):
    trainer = "nnUNetTrainerSelfRegCopyPaste"
    chosen = ()  # what it is made of is above, and in the other families
    terms = (*_CopyPaste.terms, "scr", "ifd")
