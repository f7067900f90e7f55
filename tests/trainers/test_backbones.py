import pytest
from contract import CELLS, FOUR_CELLS, TWO_CELLS, TrainerContract, TrainerMatrix
from workspace import Run


class _Backbone(TrainerMatrix):
    network_is_stock = False


class TestUXNet(_Backbone, TrainerContract):
    trainer = "nnUNetTrainerUXNet"
