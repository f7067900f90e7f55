"""Two tasks: what the losses are, what trains, what is saved, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.dice import SoftDiceLoss
from workspace import Run, start, weights, whole_and_resumed

from nnunetv2_selfreg.data import signed_distance_map
from nnunetv2_selfreg.errors import UserError

LENGTH = "_4epochs_2iters"
DISTANCE_TERM = {"nnUNetTrainerDualTask": "distance", "nnUNetTrainerDualTaskMutual": "distance_dice"}
FAMILIES = tuple(DISTANCE_TERM)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))


@pytest.fixture(params=FAMILIES)
def run(request, data_sets, results):
    return Run(data_sets.name("ignore"), "3d_fullres", request.param + LENGTH)


def masks_and_validity(target: np.ndarray, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the two classes or regions, and where nothing is ignored, written down without the library."""
    if variant == "labels":
        return np.concatenate([target == 1, target == 2], 1), np.ones_like(target, bool)
    if variant == "ignore":
        return np.concatenate([target == 1, target == 2], 1), target != 3
    if variant == "regions":
        return target[:, :2] > 0, np.ones_like(target[:, :1], bool)
    valid = target[:, 2:] == 0
    return (target[:, :2] > 0) & valid, valid


def outputs_of(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Foreground probabilities and distances of copies of the networks, so that nothing is recorded."""
    network = copy.deepcopy(trainer.network)
    captured = {}
    network.decoder.stages[-1].register_forward_hook(lambda _m, _i, output: captured.update(final=output))
    with torch.no_grad():
        logits = network(batch["data"])[0]
        mutual = "Mutual" in type(trainer).__name__
        distance = trainer.distance_partner.module(batch["data"] if mutual else captured["final"]).tanh()
    regions = trainer.label_manager.has_regions
    return (torch.sigmoid(logits) if regions else torch.softmax(logits, 1)[:, 1:]), distance


@pytest.mark.parametrize("variant", ["labels", "regions", "ignore", "regions_ignore"])
@pytest.mark.parametrize(
    ("family", "configuration"), [*((family, "3d_fullres") for family in FAMILIES), (FAMILIES[1], "2d")]
)
def test_terms_are_recomputed_from_the_outputs(family, configuration, variant, data_sets, results):
    """In 2D nnU-Net takes the Dice of the whole batch."""
    trainer = start(Run(data_sets.name(variant), configuration, family + LENGTH).build())
    assert trainer.configuration_manager.batch_dice == (configuration == "2d")
    trainer.sharpness = 3.0
    trainer.distance_weight = 0.7
    trainer.train_step(next(trainer.dataloader_train))
    batch = next(trainer.dataloader_train)
    masks, valid = masks_and_validity(batch["target"][0].numpy(), variant)
    foreground, distance = outputs_of(trainer, batch)
    labelled = len(masks)
    assert len(foreground) == 2 * labelled
    agreement = float(((torch.sigmoid(-3 * distance) - foreground) ** 2).mean())
    if family.endswith("Mutual"):
        dice = SoftDiceLoss(batch_dice=trainer.configuration_manager.batch_dice, smooth=1e-5, ddp=False)
        whole = (0,) if trainer.configuration_manager.batch_dice else ()
        present = torch.from_numpy(masks.any((*whole, *range(2, masks.ndim)), keepdims=True))
        soft = torch.sigmoid(-3 * distance[:labelled]) * present
        expected = float(dice(soft, torch.from_numpy(masks), loss_mask=torch.from_numpy(valid)))
    else:
        squares = []
        for sample, label in np.ndindex(masks.shape[:2]):
            mask = masks[sample, label]
            if mask.any():
                exact = signed_distance_map(mask, trainer.configuration_manager.spacing)
                squares.append(((distance[sample, label].numpy() - exact) ** 2)[valid[sample, 0]])
        expected = np.concatenate(squares).mean()
    outputs = trainer.train_step(batch)
    assert outputs[DISTANCE_TERM[family]] == pytest.approx(expected, rel=1e-4)
    assert outputs["consistency"] == pytest.approx(agreement, rel=1e-4)
    total = outputs["segmentation"] + 0.7 * expected + trainer_ramp(1) * agreement
    assert outputs["loss"] == pytest.approx(total, rel=1e-4)
    assert outputs["consistency_weight"] == pytest.approx(trainer_ramp(1), rel=1e-5)


def trainer_ramp(step: int) -> float:
    """Full weight at the end of 4 epochs of 2 steps."""
    return float(np.exp(-5 * (1 - step / 8) ** 2))


def test_each_modules_gradient_is_clipped_on_its_own_and_moves_it(run):
    trainer = start(run.build())
    before = weights(trainer.distance_partner.module), weights(trainer.network)
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def recorded(parameters, limit):
        norms.append((clip(parameters := list(parameters), limit), len(parameters)))
        return norms[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
        trainer.train_step(next(trainer.dataloader_train))
    assert [count for _, count in norms] == [len(part) for part in reversed(before)]
    assert all(p.grad is not None for p in trainer.distance_partner.module.parameters() if p.requires_grad)
    assert all(norm > 0 for norm, _ in norms)
    for was, module in zip(before, (trainer.distance_partner.module, trainer.network), strict=True):
        assert not torch.equal(was[0], weights(module)[0])


def test_agreement_teaches_both_tasks(run, monkeypatch):
    """Where it is the only term of the loss, as on unlabelled samples."""
    trainer = start(run.build())
    batch = next(trainer.dataloader_train)
    trainer.sharpness, trainer.distance_weight = 3.0, 0.0
    trainer.current_epoch = trainer.num_epochs
    monkeypatch.setattr(trainer, "supervised_loss", lambda output, _: 0 * output[0].sum())
    trainer.distance_loss = lambda distance, *_: 0 * distance.sum()
    trainer.loss_of(batch).backward()
    for module in (trainer.network.decoder.seg_layers[-1], trainer.network.encoder, trainer.distance_partner.module):
        assert sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None) > 0


def test_distances_teach_the_network_that_the_head_reads(data_sets, results):
    """Where they are the only term of the loss: the head is no appendix, and its own layers are not all that learns."""
    trainer = start(Run(data_sets.name("labels"), "3d_fullres", f"nnUNetTrainerDualTask{LENGTH}").build())
    trainer.supervised_loss = lambda output, _: 0 * output[0].sum()
    trainer.agreement = lambda distance, _: 0 * distance.sum()
    trainer.loss_of(next(trainer.dataloader_train)).backward()
    for module in (trainer.network.decoder.stages[-1], trainer.network.encoder, trainer.distance_partner.module):
        assert sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None) > 0
    assert not trainer.network.decoder.seg_layers[-1].weight.grad.any()


class Scaler(torch.amp.GradScaler):
    """Records what it is asked for."""

    def __init__(self):
        super().__init__("cpu", init_scale=1024.0)
        self.calls = []

    def unscale_(self, optimizer):
        self.calls.append(("unscale", optimizer))
        return super().unscale_(optimizer)

    def step(self, optimizer):
        self.calls.append(("step", optimizer))
        return super().step(optimizer)

    def update(self):
        self.calls.append(("update",))
        super().update()


def test_gradient_scaler_serves_both_optimisers(run):
    """As in half precision on a GPU: the weights move as without it."""
    moved = []
    for scaler in (None, Scaler()):
        torch.manual_seed(0)
        trainer = start(run.build())
        trainer.grad_scaler = scaler
        generator = torch.Generator().manual_seed(1)
        for part in (trainer.network, trainer.distance_partner.module):
            for parameter in part.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        batch = moved[0][0] if moved else next(trainer.dataloader_train)
        trainer.train_step(copy.deepcopy(batch))
        moved.append((batch, weights(trainer.network), weights(trainer.distance_partner.module)))
    torch.testing.assert_close(moved[0][1:], moved[1][1:])
    first, second = (optimizer for _, optimizer in trainer.trained_modules())
    assert scaler.calls == [("unscale", first), ("step", first), ("unscale", second), ("step", second), ("update",)]


@pytest.mark.usefixtures("compiling_without_code")
def test_compiled_training_is_the_eager_one(run):
    """Compiled as on a GPU; the module beside the network too."""
    steps = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = run.build()
        if compiled:
            trainer._do_i_compile = lambda: True
        trainer = start(trainer)
        batch = steps[0][0] if steps else next(trainer.dataloader_train)
        torch.manual_seed(2)
        for part in (trainer.network, trainer.distance_partner.module):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        loss = float(trainer.train_step(copy.deepcopy(batch))["loss"])
        steps.append((batch, loss, weights(trainer.network), weights(trainer.distance_partner.module)))
    assert isinstance(trainer.distance_partner.module, torch._dynamo.OptimizedModule)
    torch.testing.assert_close(steps[1][1:], steps[0][1:], rtol=1e-4, atol=1e-5)


def test_schedule_follows_the_networks(run):
    trainer = start(run.build())
    for epoch in (0, 3):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        rates = [optimizer.param_groups[0]["lr"] for _, optimizer in trainer.trained_modules()]
        assert rates[0] == rates[1] > 0
    assert rates[0] < trainer.initial_lr


def test_resumed_training_equals_one_without_interruption(run, tmp_path, monkeypatch):
    whole, second = whole_and_resumed(run, tmp_path, monkeypatch)
    for mine, theirs in (
        (second.network, whole.network),
        (second.distance_partner.module, whole.distance_partner.module),
    ):
        torch.testing.assert_close(weights(mine), weights(theirs), rtol=0, atol=0)
    for (_, mine), (_, theirs) in zip(second.trained_modules(), whole.trained_modules(), strict=True):
        momenta = [[s["momentum_buffer"] for s in o.state_dict()["state"].values()] for o in (mine, theirs)]
        torch.testing.assert_close(*momenta, rtol=0, atol=0)
    curves = [t.logger.local_logger.my_fantastic_logging for t in (whole, second)]
    for name in (
        DISTANCE_TERM[run.trainer.removesuffix(LENGTH)],
        "consistency",
        "consistency_weight",
        "train_losses",
        "mean_fg_dice",
    ):
        np.testing.assert_array_equal(curves[1][name], curves[0][name])


@pytest.mark.parametrize(
    ("writer", "reader", "missing"),
    [
        ("nnUNetTrainer", "nnUNetTrainerDualTask", "distance_head"),
        ("nnUNetTrainerDualTask", "nnUNetTrainerDualTaskMutual", "distance_network"),
        ("nnUNetTrainerDualTaskMutual", "nnUNetTrainerDualTask", "distance_head"),
        ("nnUNetTrainerDualTask", "nnUNetTrainerMeanTeacher", "student_weights"),
    ],
)
def test_checkpoint_of_another_family_is_refused_before_anything_is_loaded(writer, reader, missing, data_sets, results):
    first = Run(data_sets.name("labels"), "3d_fullres", f"{writer}_1epochs_1iters").build()
    first.initialize()
    first.current_epoch = 5
    first.save_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    second = Run(data_sets.name("labels"), "3d_fullres", f"{reader}_1epochs_1iters").build(continue_training=True)
    with pytest.raises(UserError, match=f"checkpoint_latest.pth has no {missing}.*-pretrained_weights"):
        second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    assert second.current_epoch == 0
    assert not torch.equal(weights(second.network)[0], weights(first.network)[0])


def test_stock_trainer_continues_from_a_checkpoint(run):
    trainer = run.build()
    trainer.initialize()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    stock = Run(run.data_set, run.configuration, "nnUNetTrainer" + LENGTH).build(continue_training=True)
    stock.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    torch.testing.assert_close(weights(stock.network), weights(trainer.network))


def test_labels_alone_when_asked_for(run, monkeypatch):
    """Nothing unlabelled has to be there."""
    trainer = run.build()
    trainer.unlabeled_batch_size = 0
    monkeypatch.setattr(trainer, "unlabeled_pool", lambda: pytest.fail("the pool is asked for"))
    trainer = start(trainer)
    batch = next(trainer.dataloader_train)
    assert len(batch["data"]) == len(batch["target"][0]) == 2
    assert trainer.train_step(batch)["consistency"] > 0


def test_mean_teacher_needs_unlabelled_samples(data_sets, results):
    trainer = Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerMeanTeacher").build()
    trainer.unlabeled_batch_size = 0
    trainer.initialize()
    with pytest.raises(ValueError, match="unlabeled_batch_size is 0, it must be 1 at least"):
        trainer.get_dataloaders()


def test_class_that_never_occurs_costs_nothing(run):
    """No term for the distance, and no gradient of it, whatever is predicted."""
    trainer = start(run.build())
    batch = next(trainer.dataloader_train)
    background = [torch.zeros_like(scale) for scale in batch["target"]]
    outside = {"distance": torch.ones_like(batch["distance"])} if "distance" in batch else {}
    trainer.agreement = lambda *_: torch.tensor(0.0)
    outputs = trainer.train_step({**batch, "target": background, **outside})
    assert all(np.isfinite(value) for value in outputs.values())
    distance = outputs[DISTANCE_TERM[run.trainer.removesuffix(LENGTH)]]
    assert distance == (-1 if "Mutual" in run.trainer else 0)  # a Dice loss of 1, or an error of 0
    assert not any(p.grad.any() for p in trainer.distance_partner.module.parameters() if p.grad is not None)


def primus(plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True):
    from dynamic_network_architectures.architectures.primus import Primus

    return Primus(num_input_channels, 24, (8, 8, 8), num_output_channels, 1, 2, (16, 24, 24))


def test_network_without_stages_is_named_where_they_are_needed(run):
    trainer = run.build()
    trainer.build_network_architecture = primus
    trainer.set_deep_supervision_enabled = lambda _: None  # nnU-Net's Primus trainers go without
    if "Mutual" in run.trainer:
        trainer.initialize()
        assert type(trainer.distance_partner.module).__name__ == "Primus"
    else:
        with pytest.raises(NotImplementedError, match="Primus has no encoder"):
            trainer.initialize()


def test_network_that_keeps_its_heads_elsewhere_is_named(data_sets, results):
    trainer = Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerDualTask").build()
    build = trainer.build_network_architecture

    def headless(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        network = build(plans_manager, configuration_manager, num_input_channels, num_output_channels)
        del network.decoder.seg_layers
        return network

    trainer.build_network_architecture = headless
    with pytest.raises(NotImplementedError, match=r"PlainConvUNet has no decoder\.seg_layers"):
        trainer.initialize()


@pytest.mark.parametrize(
    ("attribute", "value"), [("sharpness", 0), ("sharpness", float("inf")), ("distance_weight", -1)]
)
def test_impossible_setting_is_named(attribute, value, data_sets, results):
    trainer = Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerDualTask").build()
    setattr(trainer, attribute, value)
    with pytest.raises(ValueError, match=f"nnUNetTrainerDualTask.{attribute} is {value}, it must be"):
        trainer.initialize()
