import pytest
from contract import CELLS, ONE_CELL, TrainerContract, TrainerMatrix
from workspace import Run


class _Backbone(TrainerMatrix):
    network_is_stock = False
    cascade_is_chosen = False
    chosen = ONE_CELL


class TestUXNet(_Backbone, TrainerContract):
    trainer = "nnUNetTrainerTinyUXNet"
    chosen = (("labels", "3d_fullres"),)
    tools_are_chosen = False


class _KMaxUXNet(_Backbone):
    terms = ("query_segmentation", "convolutional", "query_distribution")
    chosen = (("ignore", "3d_fullres"),)

    @pytest.mark.parametrize(("variant", "configuration"), CELLS)
    def test_trains_resumes_validates_and_predicts(self, variant, configuration, cells, tmp_path, only_if_chosen):
        if "regions" not in variant:
            super().test_trains_resumes_validates_and_predicts(variant, configuration, cells, tmp_path, only_if_chosen)
            return
        run = Run(cells.data_sets.name(variant), configuration, self.trainer)
        with pytest.raises(NotImplementedError, match=f"{run.data_set} has regions"):
            run.build().initialize()


class TestKMaxUXNet(_KMaxUXNet):
    trainer = "nnUNetTrainerTinyKMaxUXNet"
    chosen = ()  # the dual one below trains it, and more


class TestDualKMaxUXNet(_KMaxUXNet):
    trainer = "nnUNetTrainerTinyDualKMaxUXNet"
    terms = (*_KMaxUXNet.terms, "segmentation", "strong_segmentation", "segmentation_consistency", "query_consistency")
    trains_cascades = False


class TestDualKMaxUXNetTwo(TestDualKMaxUXNet):
    trainer = "nnUNetTrainerTinyDualKMaxUXNetTwo"
    chosen = ()


class TestSelfRegDualKMaxUXNet(TestDualKMaxUXNet):
    trainer = "nnUNetTrainerTinySelfRegDualKMaxUXNet"
    chosen = ()
    terms = (*TestDualKMaxUXNet.terms, "scr", "ifd")


class TestSwinUNETR(_Backbone):
    trainer = "nnUNetTrainerTinySwinUNETR"


class TestSelfRegUXNet(_Backbone):
    trainer = "nnUNetTrainerTinySelfRegUXNet"
    chosen = ()
    terms = ("segmentation", "scr", "ifd")


class TestSelfRegSwinUNETR(_Backbone):
    trainer = "nnUNetTrainerTinySelfRegSwinUNETR"
    chosen = ()
    terms = ("segmentation", "scr", "ifd")
