"""SelfReg inside nnU-Net's training: what changes, and what must not."""

import math
import weakref

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from workspace import Run, initialised, two_stages

from nnunetv2_selfreg.losses import SelfRegularizedLoss
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class SelfReg(SelfRegularized, nnUNetTrainer):
    pass


@pytest.fixture
def build(data_sets, tmp_path, monkeypatch):
    """Builds a trainer of any class on a tiny configuration, initialised."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))

    def make(cls, configuration="3d_fullres", variant="labels", change=lambda plans: None, **attributes):
        run = Run(data_sets.name(variant), configuration, "nnUNetTrainer_2epochs_2iters")
        return initialised(cls, run, change, **attributes)

    return make


@pytest.fixture(scope="module")
def batches(data_sets):
    """Real batches of the 3D configuration."""
    trainer = Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainer_2epochs_2iters").build()
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    return [next(loader) for _ in range(2)]


def step(trainer, batch):
    torch.manual_seed(1)
    outputs = trainer.train_step(batch)
    return outputs["loss"], [p.detach().clone() for p in trainer.network.parameters()]


def test_without_lambdas_a_step_is_a_stock_step_bit_for_bit(build, batches):
    stock, mine = build(nnUNetTrainer), build(SelfReg, lambda_scr=0, lambda_ifd=0)
    for batch in batches:
        (stock_loss, stock_weights), (loss, weights) = step(stock, batch), step(mine, batch)
        assert loss == stock_loss
        assert all(torch.equal(a, b) for a, b in zip(weights, stock_weights, strict=True))


def test_with_lambdas_a_step_differs(build, batches):
    (stock_loss, stock_weights), (loss, weights) = (
        step(build(nnUNetTrainer), batches[0]),
        step(build(SelfReg), batches[0]),
    )
    assert loss > stock_loss
    assert not all(torch.equal(a, b) for a, b in zip(weights, stock_weights, strict=True))


def test_training_loss_is_the_sum_of_its_terms(build, batches):
    outputs = build(SelfReg, lambda_scr=0.5, lambda_ifd=0.25).train_step(batches[0])
    assert outputs["loss"] == pytest.approx(
        outputs["segmentation"] + 0.5 * outputs["scr"] + 0.25 * outputs["ifd"], rel=1e-5
    )


def test_validation_loss_is_stock_and_nothing_is_collected(build, batches):
    stock, mine = build(nnUNetTrainer), build(SelfReg)
    losses = []
    for trainer in (stock, mine):
        trainer.network.eval()
        with torch.no_grad():
            losses.append(trainer.validation_step(batches[0])["loss"])
    assert losses[0] == losses[1]
    assert mine.loss.taps.empty


def test_no_feature_outlives_its_step(build, batches, monkeypatch):
    trainer = build(SelfReg)
    seen = []
    take = trainer.loss.taps.take

    def watched_take():
        encoder, decoder, final = take()
        seen.extend(weakref.ref(feature) for feature in (*encoder, *decoder, final))
        return encoder, decoder, final

    monkeypatch.setattr(trainer.loss.taps, "take", watched_take)
    trainer.train_step(batches[0])
    assert len(seen) == 4
    assert all(feature() is None for feature in seen)
    assert trainer.loss.taps.empty


def test_state_dict_is_stocks_own(build):
    assert list(build(SelfReg).network.state_dict()) == list(build(nnUNetTrainer).network.state_dict())


def test_stock_checkpoint_loads_and_its_curves_are_continued(build, tmp_path):
    stock = build(nnUNetTrainer)
    stock.num_epochs = 1
    stock.run_training()
    mine = build(SelfReg)
    mine.load_checkpoint(
        str(tmp_path / stock.plans_manager.dataset_name / _folder(stock) / "fold_0/checkpoint_final.pth")
    )
    assert mine.current_epoch == 1
    mine.run_training()
    curves = mine.logger.local_logger.my_fantastic_logging
    assert len({len(curve) for curve in curves.values()}) == 1  # or nnU-Net's progress plot would end early
    assert math.isnan(curves["scr"][0])
    assert math.isfinite(curves["scr"][1])


def test_checkpoint_loads_into_a_stock_trainer(build):
    mine = build(SelfReg)
    mine.run_training()
    stock = build(nnUNetTrainer)
    stock.load_checkpoint(mine.output_folder + "/checkpoint_final.pth")
    for a, b in zip(stock.network.parameters(), mine.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert stock.current_epoch == 2


def test_term_that_is_no_longer_computed_keeps_its_curve_in_step(build):
    first = build(SelfReg)
    first.num_epochs = 1
    first.run_training()
    second = build(SelfReg, lambda_ifd=0)
    second.load_checkpoint(first.output_folder + "/checkpoint_final.pth")
    second.run_training()
    curves = second.logger.local_logger.my_fantastic_logging
    assert math.isnan(curves["ifd"][1])
    assert math.isfinite(curves["scr"][1])


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_residual_encoder_and_deep_supervision(build, batches, deep_supervision):
    def residual(configurations):
        architecture = configurations["3d_fullres"]["architecture"]
        architecture["network_class_name"] = architecture["network_class_name"].replace("PlainConv", "ResidualEncoder")
        network = architecture["arch_kwargs"]
        network["n_blocks_per_stage"] = network.pop("n_conv_per_stage")

    class Trainer(SelfReg):
        def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # noqa: B008
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.enable_deep_supervision = deep_supervision

    trainer = build(Trainer, change=residual)
    assert type(trainer.network).__name__ == "ResidualEncoderUNet"
    trainer.set_deep_supervision_enabled(deep_supervision)
    target = batches[0]["target"] if deep_supervision else batches[0]["target"][0]
    outputs = trainer.train_step({**batches[0], "target": target})
    assert outputs["scr"] > 0
    assert outputs["ifd"] > 0


@pytest.mark.usefixtures("compiling_without_code")
def test_compiled_network(build, batches):
    """nnU-Net compiles on CUDA only; here it is made to on the CPU."""

    class Compiled(SelfReg):
        def _do_i_compile(self):
            return True

    eager, compiled = build(SelfReg, lambda_scr=0.1), build(Compiled, lambda_scr=0.1)
    (eager_loss, eager_weights), (loss, weights) = step(eager, batches[0]), step(compiled, batches[0])
    assert loss == pytest.approx(eager_loss, rel=1e-4)
    torch.testing.assert_close(weights, eager_weights, rtol=1e-3, atol=1e-4)
    compiled.network.eval()
    with torch.no_grad():
        compiled.validation_step(batches[0])
    assert compiled.loss.taps.empty


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_terms_in_single_precision(build, batches, dtype):
    trainer = build(SelfReg)
    with torch.autocast("cpu", dtype=dtype):
        output = trainer.network(batches[0]["data"])
        loss = trainer.loss([o.float() for o in output], batches[0]["target"])
    assert output[0].dtype == dtype
    assert trainer.loss.terms["scr"].dtype == trainer.loss.terms["ifd"].dtype == torch.float32
    loss.backward()


def test_network_without_stages_is_named_before_workers_start(build):
    class Flat(SelfReg):
        @staticmethod
        def build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
        ):
            from dynamic_network_architectures.architectures.primus import Primus

            return Primus(num_input_channels, 24, (8, 8, 8), num_output_channels, 1, 2, (16, 24, 24))

    with pytest.raises(NotImplementedError, match="Primus has no encoder"):
        build(Flat)


def test_plan_with_two_resolution_stages_is_an_error(build):
    def shallow(configurations):
        two_stages(configurations["3d_fullres"])

    with pytest.raises(NotImplementedError, match="1 decoder stages"):
        build(SelfReg, change=shallow)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_lambda_is_an_error_at_initialisation(build, value):
    with pytest.raises(ValueError, match=f"lambda_scr is {value}"):
        build(SelfReg, lambda_scr=value)


def test_paper_variants_are_one_attribute_away(build, batches):
    trainer = build(SelfReg, ifd_order="index", ifd_stop_gradient=True)
    assert isinstance(trainer.loss, SelfRegularizedLoss)
    assert (trainer.loss.ifd_order, trainer.loss.ifd_stop_gradient) == ("index", True)
    assert trainer.train_step(batches[0])["ifd"] > 0
    with pytest.raises(ValueError, match="order of channels in IFD is 'best'"):
        build(SelfReg, ifd_order="best")


def _folder(trainer):
    return f"{type(trainer).__name__}__nnUNetPlans__{trainer.configuration_name}"
