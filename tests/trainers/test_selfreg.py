from contract import TrainerContract


class TestSelfReg(TrainerContract):
    trainer = "nnUNetTrainerSelfReg"
    terms = ("segmentation", "scr", "ifd")
