from contract import FOUR_CELLS, TrainerContract


class TestSelfReg(TrainerContract):
    trainer = "nnUNetTrainerSelfReg"
    chosen = FOUR_CELLS
    terms = ("segmentation", "scr", "ifd")
