"""The architecture trainers inside nnU-Net: plans, attributes, optimiser, resuming, prediction of any image size."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from small_trainers.nnUNetTrainerTinyBackbones import (
    nnUNetTrainerTinyDualKMaxUXNet,
    nnUNetTrainerTinyDualKMaxUXNetTwo,
    nnUNetTrainerTinyKMaxUXNet,
    nnUNetTrainerTinySelfRegSwinUNETR,
    nnUNetTrainerTinySelfRegUXNet,
    nnUNetTrainerTinySwinUNETR,
    nnUNetTrainerTinyUXNet,
)
from workspace import Run, initialised, seed, two_stages, whole_and_resumed

from nnunetv2_selfreg.networks.uxnet import UXBlock
from nnunetv2_selfreg.training.backbones import KMaxUXNetBackbone, SwinUNETRBackbone, UXNetBackbone
from nnunetv2_selfreg.training.optimizers import WarmUpPolyLR
from nnunetv2_selfreg.training.query_consistency import QueryConsistency
from nnunetv2_selfreg.training.selfreg import SelfRegularized


class UXNet(nnUNetTrainerTinyUXNet):
    pass


class KMax(nnUNetTrainerTinyKMaxUXNet):
    pass


class Dual(nnUNetTrainerTinyDualKMaxUXNet):
    pass


class DualTwo(nnUNetTrainerTinyDualKMaxUXNetTwo):
    pass


class Swin(nnUNetTrainerTinySwinUNETR):
    pass


class SelfRegUXNet(nnUNetTrainerTinySelfRegUXNet):
    pass


class SelfRegSwin(nnUNetTrainerTinySelfRegSwinUNETR):
    pass


FAMILIES = [UXNet, KMax, Swin]


@pytest.fixture
def build(data_sets, tmp_path, monkeypatch):
    """Builds a trainer of any class, initialised; `change` gets the plan's configuration."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))

    def make(cls, configuration="3d_fullres", variant="labels", change=lambda plan: None, **attributes):
        run = Run(data_sets.name(variant), configuration, "nnUNetTrainer_2epochs_2iters")
        return initialised(cls, run, lambda configurations: change(configurations[configuration]), **attributes)

    return make


@pytest.mark.parametrize(
    ("name", "bases", "parameters"),
    [
        ("UXNet", [UXNetBackbone], 53.02e6),
        ("KMaxUXNet", [KMaxUXNetBackbone], 63.67e6),
        ("DualKMaxUXNet", [QueryConsistency, KMaxUXNetBackbone], 63.67e6),
        ("SelfRegDualKMaxUXNet", [SelfRegularized, QueryConsistency, KMaxUXNetBackbone], 63.67e6),
        ("SwinUNETR", [SwinUNETRBackbone], 62.19e6),
        ("SelfRegUXNet", [SelfRegularized, UXNetBackbone], 53.02e6),
        ("SelfRegSwinUNETR", [SelfRegularized, SwinUNETRBackbone], 62.19e6),
    ],
)
def test_trainers_are_what_they_are_called(name, bases, parameters, data_sets):
    """Their networks have the published sizes, with four halvings and three classes."""
    trainer = Run(data_sets.name("labels"), "3d_fullres", f"nnUNetTrainer{name}").build()
    order = [cls.__name__ for cls in type(trainer).__mro__]
    places = [order.index(cls.__name__) for cls in (*bases, nnUNetTrainer)]
    assert places == sorted(places)
    network = trainer.configuration_manager.configuration["architecture"]["arch_kwargs"]
    network.update(strides=[[1] * 3, *[[2] * 3] * 4], kernel_sizes=[[3] * 3] * 5)
    trainer.configuration_manager.configuration["patch_size"] = [64] * 3
    built = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3)
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(parameters, rel=1e-2)


def anisotropic(plan):
    network = plan["architecture"]["arch_kwargs"]
    stages = network["n_stages"]
    assert stages >= 3
    network["strides"] = [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * (stages - 2)]
    network["kernel_sizes"] = [[1, 3, 3], [1, 3, 3], *[[3, 3, 3]] * (stages - 2)]
    plan["patch_size"] = [4 * 2 ** (stages - 3), 8 * 2 ** (stages - 2), 8 * 2 ** (stages - 2)]


def one_step(trainer):
    loader, _ = trainer.get_dataloaders()
    return trainer.train_step(next(loader))


@pytest.mark.parametrize("family", [SelfRegUXNet, KMax, SelfRegSwin])
def test_anisotropic_plan(family, build):
    outputs = one_step(build(family, change=anisotropic))
    assert np.isfinite([*outputs.values()]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_a_single_sample(family, build):
    outputs = one_step(build(family, change=lambda plan: plan.update(batch_size=1)))
    assert np.isfinite([*outputs.values()]).all()


@pytest.mark.parametrize("shape", [pytest.param((17, 25, 31), marks=pytest.mark.matrix), (5, 40, 24)])
@pytest.mark.parametrize("family", FAMILIES)
def test_odd_image_sizes_are_predicted(family, shape, build):
    trainer = build(family)
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3, False)
    network.load_state_dict(trainer.network.state_dict())
    predictor.manual_initialization(
        network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json, "T", None
    )
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, *shape))
    assert logits.shape == (3, *shape)
    assert torch.isfinite(logits).all()


def test_resumed_training_equals_an_uninterrupted_one(data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    run = Run(data_sets.name("labels"), "2d", "nnUNetTrainerTinyUXNet_2epochs_2iters")
    whole, resumed = whole_and_resumed(run, tmp_path, monkeypatch)
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("family", "configuration"),
    [
        (SelfRegUXNet, "3d_fullres"),
        pytest.param(KMax, "3d_fullres", marks=pytest.mark.matrix),
        pytest.param(Dual, "2d", marks=pytest.mark.matrix),
        pytest.param(DualTwo, "2d", marks=pytest.mark.matrix),
        pytest.param(SelfRegSwin, "2d", marks=pytest.mark.matrix),
    ],
)
def test_compiled_step_equals_an_eager_one(family, configuration, build, monkeypatch):
    """nnU-Net compiles on CUDA only; here it is made to on the CPU, without the minutes of code generation, but with
    its decompositions: without them torch guesses the layout of layer norm's gradient wrong."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True))
    attributes = {"activation_checkpointing": True, "layer_scale": 1.0}  # the default would hide UX-Net's blocks
    eager = build(family, configuration, **attributes)
    compiled = build(family, configuration, **attributes, _do_i_compile=lambda _: True)
    seed(0)
    loader, _ = eager.get_dataloaders()
    batch = next(loader)
    outputs = []
    for trainer in (eager, compiled):
        torch.manual_seed(1)  # SelfReg draws channels
        outputs.append([*trainer.train_step(batch).values()])
    np.testing.assert_allclose(*outputs, rtol=1e-4)
    # Compilation changes the order of sums, so single elements of a gradient may differ more than the whole.
    rounding = 1e-5 * torch.nn.utils.get_total_norm([p.grad for p in compiled.network.parameters()])
    for mine, theirs in zip(compiled.network.parameters(), eager.network.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad  # as of a head without weight
        assert (mine.grad - expected).norm() <= 1e-2 * expected.norm() + rounding


def test_attributes_reach_the_network(build):
    trainer = build(UXNet, drop_path=0.3, layer_scale=0.5)
    blocks = [module for module in trainer.network.modules() if isinstance(module, UXBlock)]
    assert blocks[-1].drop_path.drop_prob == pytest.approx(0.3)
    assert (blocks[0].layer_scale == 0.5).all()
    assert trainer.network.encoder.output_channels[-1] == 16
    kmax = build(KMax, queries=16)
    assert kmax.network.decoder.mask_decoder.queries.shape[1] == 16


@pytest.mark.parametrize("family", [UXNet, KMax, Swin])
def test_activation_checkpointing_by_attribute(family, build):
    loader, _ = build(family, "2d").get_dataloaders()
    batch = next(loader)
    losses = [build(family, "2d", activation_checkpointing=on).train_step(batch)["loss"] for on in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    trainer = build(family, "2d", activation_checkpointing=True)
    assert any("forward" in vars(module) for module in trainer.network.modules())


def test_kmax_weights_the_loss_of_the_assignment(build):
    outputs = one_step(build(KMax, "2d", query_weight=3.0))
    segmentation = outputs["query_segmentation"] + outputs["convolutional"]
    assert outputs["loss"] == pytest.approx(segmentation + 3 * outputs["query_distribution"], rel=1e-5)


def test_swin_has_no_deep_supervision(build):
    trainer = build(Swin)
    loader, _ = trainer.get_dataloaders()
    batch = next(loader)
    assert isinstance(batch["target"], torch.Tensor)
    assert isinstance(trainer.network(batch["data"]), torch.Tensor)


def test_padding_of_swin_is_no_part_of_the_terms(build):
    """The patch fills less than half of what the network pads it to: features of the padding may be anything."""
    trainer = build(SelfRegSwin, "2d", lambda_scr=1.0, lambda_ifd=1.0)
    loader, _ = trainer.get_dataloaders()
    batch = next(loader)
    torch.manual_seed(1)
    expected = trainer.train_step(batch)
    again = build(SelfRegSwin, "2d", lambda_scr=1.0, lambda_ifd=1.0)
    take = again.loss.taps.take
    patch = trainer.configuration_manager.patch_size

    def with_other_padding():
        features = take()
        final = features.final
        for feature in (*features.encoder, *features.decoder):  # the final one's last places see the image too
            covered = [
                -(-n * have // whole) for n, have, whole in zip(patch, feature.shape[2:], final.shape[2:], strict=True)
            ]
            outside = torch.ones_like(feature, dtype=torch.bool)
            outside[(..., *(slice(n) for n in covered))] = False
            feature.data[outside] = 1e6
        return features

    again.loss.taps.take = with_other_padding
    torch.manual_seed(1)
    outputs = again.train_step(batch)
    assert (outputs["scr"], outputs["ifd"]) == pytest.approx((expected["scr"], expected["ifd"]), rel=1e-5)


def test_learning_rate_grows_and_falls():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = WarmUpPolyLR(optimizer, 0.5, 20, 4)
    rates = []
    for epoch in range(20):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5:] == pytest.approx([0.5 * (1 - e / 16) ** 0.9 for e in range(1, 16)])
    schedule.step(2)  # as after resuming
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)


def test_optimiser_is_adamw_with_the_attributes(build):
    trainer = build(UXNet, learning_rate=2e-3, adamw_weight_decay=0.1, learning_rate_warm_up=0.5)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.defaults["weight_decay"] == 0.1
    assert (trainer.initial_lr, trainer.weight_decay) == (2e-3, 0.1)
    trainer.on_train_epoch_start()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(("warm_up", "epochs"), [(0.9, 4), (0.6, 1)])
def test_warm_up_ends_before_the_training(warm_up, epochs, build):
    trainer = build(UXNet, learning_rate_warm_up=warm_up)
    trainer.num_epochs = epochs
    optimizer, schedule = trainer.configure_optimizers()
    schedule.step(epochs - 1)
    assert optimizer.param_groups[0]["lr"] > 0


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("adamw_weight_decay", -1.0),
        ("learning_rate_warm_up", 1.0),
    ],
)
def test_impossible_attribute_is_an_error(attribute, value, build):
    with pytest.raises(ValueError, match=rf"UXNet\.{attribute} is {value}"):
        build(UXNet, **{attribute: value})


@pytest.mark.parametrize("family", [UXNet, KMax])
def test_plan_with_two_stages_is_an_error(family, build):
    with pytest.raises(NotImplementedError, match=r"with nnUNetPlans.*3 resolution stages at least.* 2\. Use"):
        build(family, change=two_stages)


def test_swin_takes_a_plan_with_two_stages(build):
    assert np.isfinite(one_step(build(Swin, "2d", change=two_stages))["loss"])


def test_without_its_extra_swin_alone_is_an_error(build, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs monai.*pip install "monai>=1.5" einops'):
        build(Swin, "2d")
    build(UXNet, "2d")


@pytest.mark.parametrize("family", [UXNet, KMax])
def test_patch_that_the_strides_do_not_divide_is_an_error(family, build):
    def change(plan):
        plan["patch_size"] = [18, 24, 24]

    with pytest.raises(ValueError, match=r"with nnUNetPlans.*\[18, 24, 24\] is not divisible.*correct patch_size"):
        build(family, change=change)


def test_bottleneck_of_a_single_voxel_is_an_error(build):
    def change(plan):
        strides = plan["architecture"]["arch_kwargs"]["strides"]
        plan["patch_size"] = torch.tensor(strides).prod(0).tolist()

    with pytest.raises(ValueError, match="single voxel"):
        build(UXNet, change=change)


def test_too_few_queries_are_an_error(build):
    with pytest.raises(ValueError, match="KMax with nnUNetPlans: 2 queries are too few for 3"):
        build(KMax, queries=2)


def test_kmax_without_deep_supervision_is_an_error(build):
    class NoDeepSupervision(KMax):
        def initialize(self):
            self.enable_deep_supervision = False
            super().initialize()

    with pytest.raises(NotImplementedError, match=r"with deep supervision only.*or use nnUNetTrainerUXNet"):
        build(NoDeepSupervision)
