from contract import FOUR_CELLS, TrainerContract


class TestSelfReg(TrainerContract):
    trainer = "nnUNetTrainerSelfReg"
    chosen = FOUR_CELLS
    tools_are_chosen = False
    terms = ("segmentation", "scr", "ifd")
