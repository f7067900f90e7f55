import pytest
from contract import CELLS, FOUR_CELLS, TWO_CELLS, TrainerContract, TrainerMatrix
from workspace import Run


class _Backbone(TrainerMatrix):
    network_is_stock = False


class TestUXNet(_Backbone, TrainerContract):
    trainer = "nnUNetTrainerTinyUXNet"
    chosen = FOUR_CELLS


class TestKMaxUXNet(_Backbone, TrainerContract):
    trainer = "nnUNetTrainerTinyKMaxUXNet"
    terms = ("segmentation", "convolutional", "query_distribution")
    chosen = FOUR_CELLS

    @pytest.mark.parametrize(("variant", "configuration"), CELLS)
    def test_trains_resumes_validates_and_predicts(self, variant, configuration, cells, tmp_path, request):
        if "regions" not in variant:
            super().test_trains_resumes_validates_and_predicts(variant, configuration, cells, tmp_path, request)
            return
        run = Run(cells.data_sets.name(variant), configuration, self.trainer)
        with pytest.raises(NotImplementedError, match=f"{run.data_set} has regions"):
            run.build().initialize()


class TestSwinUNETR(_Backbone):
    trainer = "nnUNetTrainerTinySwinUNETR"
    chosen = FOUR_CELLS


class TestSelfRegUXNet(_Backbone):
    trainer = "nnUNetTrainerTinySelfRegUXNet"
    chosen = TWO_CELLS
    terms = ("segmentation", "scr", "ifd")


class TestSelfRegSwinUNETR(_Backbone):
    trainer = "nnUNetTrainerTinySelfRegSwinUNETR"
    chosen = TWO_CELLS
    terms = ("segmentation", "scr", "ifd")
