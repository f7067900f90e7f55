from contract import TWO_CELLS, TrainerContract


class TestSelfReg(TrainerContract):
    trainer = "nnUNetTrainerSelfReg"
    chosen = TWO_CELLS
    tools_are_chosen = False
    terms = ("segmentation", "scr", "ifd")
