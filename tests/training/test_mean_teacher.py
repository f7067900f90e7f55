"""The teacher: what it is, when it moves, what it serves, and that nothing of it is lost."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.optim.swa_utils import AveragedModel
from workspace import Run, finish, start, weights, whole_and_resumed

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.training.mean_teacher import MeanTeacher

NAME = "nnUNetTrainerMeanTeacher_4epochs_2iters"


@pytest.fixture
def run(data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return Run(data_sets.name("ignore"), "3d_fullres", NAME)


def test_teacher_follows_the_closed_form_of_its_recursion(run):
    trainer = start(run.build())
    trainer.ema_decay = 0.6
    first = weights(trainer.teacher.module)
    torch.testing.assert_close(first, weights(trainer.network))
    students, expected = [], first
    for step in range(5):
        trainer.train_step(next(trainer.dataloader_train))
        students.append(weights(trainer.network))
        a = min(1 - 1 / (step + 1), 0.6)
        expected = [a * t + (1 - a) * s for t, s in zip(expected, students[-1], strict=True)]
    torch.testing.assert_close(weights(trainer.teacher.module), expected)
    assert not torch.equal(students[0][0], students[-1][0])


def test_without_decay_the_teacher_is_the_student(run):
    trainer = start(run.build())
    trainer.ema_decay = 0.0
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
    torch.testing.assert_close(weights(trainer.teacher.module), weights(trainer.network), rtol=0, atol=0)


def test_teacher_gets_no_gradient_and_runs_in_training_mode(run):
    trainer = start(run.build())
    trainer.train_step(next(trainer.dataloader_train))
    assert all(p.grad is None for p in trainer.teacher.parameters())
    assert trainer.teacher.module.training
    assert trainer.network.training


def test_selfreg_never_sees_the_teachers_features(run):
    """SelfReg acts on the student's features of all samples; the teacher's pass in between leaves no trace."""
    composed = Run(run.data_set, run.configuration, "nnUNetTrainerSelfRegMeanTeacher_4epochs_2iters")
    trainer = start(composed.build())
    batch = next(trainer.dataloader_train)
    seen = []
    take = trainer.loss.taps.take
    trainer.loss.taps.take = lambda: seen.append(take()) or seen[-1]
    run_teacher = trainer._run_teacher
    trainer._run_teacher = lambda image: run_teacher(image + 100)
    student = copy.deepcopy(trainer.network)
    trainer.train_step(batch)
    assert trainer.loss.taps.empty
    assert len(seen[0].final) == len(batch["data"])
    expected = {}
    student.decoder.stages[-1].register_forward_hook(lambda _m, _i, output: expected.update(final=output))
    student(batch["data"])
    torch.testing.assert_close(seen[0].final, expected["final"])


def test_loss_is_the_supervised_loss_and_the_weighted_consistency(run):
    trainer = start(run.build())
    trainer.consistency_weight = 3.0
    outputs = trainer.train_step(next(trainer.dataloader_train))
    assert outputs["consistency_weight"] == pytest.approx(3 * np.exp(-5), rel=1e-5)
    weighted = outputs["consistency_weight"] * outputs["consistency"]
    assert outputs["loss"] == pytest.approx(outputs["segmentation"] + weighted, rel=1e-5)
    trainer.current_epoch, trainer._steps_in_epoch = 1, 1  # 1.5 of 4 epochs; the ramp ends at 1.6
    assert trainer.ramp == pytest.approx(np.exp(-5 * (1 - 0.375 / 0.4) ** 2))


def test_labelled_part_alone_reaches_the_supervised_loss(run):
    trainer = start(run.build())
    batch = next(trainer.dataloader_train)
    labelled = len(batch["target"][0])
    assert len(batch["data"]) == labelled + len(batch["data_weak"]) == 4
    changed = {**batch, "data": batch["data"].clone()}
    changed["data"][labelled:] += 1
    terms = []
    for mine in (batch, changed):
        terms.append(trainer.weighted_terms(Batch.split(mine)))
    assert torch.equal(terms[0]["segmentation"][1], terms[1]["segmentation"][1])
    assert not torch.equal(terms[0]["consistency"][1], terms[1]["consistency"][1])


@pytest.mark.parametrize("variant", ["labels", "regions"])
def test_consistency_is_of_strong_and_weak_views(variant, run, data_sets):
    """Recomputed from copies of both networks: student on the strong views, teacher on the weak ones."""
    trainer = start(Run(data_sets.name(variant), run.configuration, NAME).build())
    trainer.teacher_noise = 0.0
    trainer.train_step(next(trainer.dataloader_train))
    trainer.train_step(next(trainer.dataloader_train))  # student and teacher differ from here on
    batch = next(trainer.dataloader_train)
    labelled = len(batch["target"][0])
    activation = torch.sigmoid if variant == "regions" else (lambda logits: torch.softmax(logits, 1))
    with torch.no_grad():
        student = activation(trainer.network(batch["data"])[0])[labelled:]
        teacher = activation(trainer.teacher.module(batch["data_weak"])[0])
    expected = float(((student - teacher) ** 2).mean())
    assert trainer.train_step(batch)["consistency"] == pytest.approx(expected, rel=1e-5)


def test_noise_of_the_teacher_is_clipped(run):
    trainer = start(run.build())
    batch = next(trainer.dataloader_train)
    inputs, run_teacher = [], trainer._run_teacher
    trainer._run_teacher = lambda image: inputs.append(image) or run_teacher(image)
    trainer.train_step(batch)
    noise = inputs[0] - batch["data_weak"]
    assert 0.19 < float(noise.abs().max()) < 0.2 + 1e-5
    assert float(noise.std()) == pytest.approx(0.0959, rel=0.02)  # of N(0, 0.1) clipped at two deviations
    assert len(inputs) == 1


@pytest.mark.parametrize("epoch", [0, 2, 3])  # the weight's ramp has ended at the last two, the threshold's goes on
def test_uncertainty_is_of_the_passes_and_the_target_one_more(epoch, run):
    aware = Run(run.data_set, run.configuration, "nnUNetTrainerUAMeanTeacher_4epochs_2iters")
    trainer = start(aware.build())
    trainer.current_epoch = epoch
    batch = next(trainer.dataloader_train)
    passes, one_pass = [], trainer._noisy_probabilities
    trainer._noisy_probabilities = lambda weak: passes.append(one_pass(weak)) or passes[-1]
    target, kept = trainer.teach(batch["data_weak"])
    assert len(passes) == 9
    assert target is passes[8]
    assert not torch.equal(passes[0], passes[1])
    mean = torch.stack(passes[:8]).mean(0)
    entropy = -(mean * torch.log(mean + 1e-6)).sum(1, keepdim=True)
    threshold = 0.75 + 0.25 * np.exp(-5 * (1 - epoch / 4) ** 2)
    classes = mean.shape[1]
    margin = (entropy - threshold * np.log(classes)).abs() > 1e-5
    torch.testing.assert_close(kept[margin], (entropy < threshold * np.log(classes))[margin])


def test_passes_disagree_by_dropout_which_validation_has_not(run):
    aware = Run(run.data_set, run.configuration, "nnUNetTrainerUAMeanTeacher_4epochs_2iters")
    trainer = start(aware.build())
    trainer.teacher_noise = 0.0
    batch = next(trainer.dataloader_train)
    assert not torch.equal(*(trainer.teacher_probabilities(batch["data_weak"]) for _ in range(2)))
    assert not torch.equal(*(trainer.network(batch["data"])[0] for _ in range(2)))
    trainer.network.eval()
    torch.testing.assert_close(*(trainer.network(batch["data"])[0] for _ in range(2)))
    plain = start(run.build())
    assert list(trainer.network.state_dict()) == list(plain.network.state_dict())
    torch.testing.assert_close(*(plain.network(batch["data"])[0] for _ in range(2)))


def test_kept_share_follows_the_whole_training(run):
    """Of probabilities whose uncertainties are spread evenly: 0.75 at first, at 40 % still far from all."""
    trainer = start(Run(run.data_set, run.configuration, "nnUNetTrainerUAMeanTeacher_10epochs_2iters").build())
    entropies = torch.linspace(0, 1, 1001)[:-1]  # in units of the largest
    foreground = torch.linspace(0, 0.5, 100001, dtype=torch.float64)
    curve = -(foreground * foreground.log2().clamp_min(-1e9) + (1 - foreground) * (1 - foreground).log2())
    chosen = foreground[torch.searchsorted(curve.nan_to_num(), entropies.double()).clamp_max(100000)].float()
    trainer._noisy_probabilities = lambda _weak: torch.stack([1 - chosen, chosen])[None, :, :, None, None]
    shares = []
    for trainer.current_epoch in (0, 4, 7, 10):
        trainer.teach(torch.empty(0))
        shares.append(float(trainer.terms["kept_voxels"]))
    expected = [0.75 + 0.25 * np.exp(-5 * (1 - t) ** 2) for t in (0, 0.4, 0.7, 1)]
    assert shares == pytest.approx(expected, abs=2e-3)


def test_gradients_are_clipped(run):
    trainer = start(run.build())
    loss_of = trainer.loss_of
    trainer.loss_of = lambda batch: 1e4 * loss_of(batch)
    trainer.train_step(next(trainer.dataloader_train))
    norm = torch.cat([p.grad.flatten() for p in trainer.network.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(12, rel=1e-3)


def test_buffers_are_copied_and_change_places_too():
    """nnU-Net's plans have none; other networks have batch normalisation."""
    trainer = object.__new__(MeanTeacher)
    trainer.network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    trainer.teacher = AveragedModel(trainer.network, multi_avg_fn=trainer._average)
    trainer._exchanged = False
    trainer.network(torch.rand(2, 1, 4, 4))
    trainer.after_step()
    student, teacher = trainer.network[1].running_mean, trainer.teacher.module[1].running_mean
    torch.testing.assert_close(teacher, student)
    teacher.fill_(7)
    before = student.clone()
    with trainer.teacher_weights():
        assert (trainer.network[1].running_mean == 7).all()
    torch.testing.assert_close(trainer.network[1].running_mean, before)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("ramp_up_length", 0),
        ("consistency_weight", -0.1),
        ("consistency_weight", float("inf")),
        ("ema_decay", 1.0),
        ("teacher_noise", -1),
        ("teacher_passes", 0),
        ("dropout", 1.0),
    ],
)
def test_impossible_setting_is_named(attribute, value, run):
    trainer = Run(run.data_set, run.configuration, "nnUNetTrainerUAMeanTeacher").build()
    setattr(trainer, attribute, value)
    with pytest.raises(ValueError, match=f"nnUNetTrainerUAMeanTeacher.{attribute} is {value}, it must be"):
        trainer.initialize()


def test_resumed_training_equals_one_without_interruption(run, tmp_path, monkeypatch):
    """4 epochs at once against 2 and 2: student, teacher, optimiser, and the ramp, which ends with the training."""
    monkeypatch.setattr(MeanTeacher, "ramp_up_length", 1.0)
    whole, second = whole_and_resumed(run, tmp_path, monkeypatch)
    assert second.teacher.n_averaged == whole.teacher.n_averaged
    torch.testing.assert_close(weights(second.network), weights(whole.network), rtol=0, atol=0)
    torch.testing.assert_close(weights(second.teacher), weights(whole.teacher), rtol=0, atol=0)
    momenta = [[s["momentum_buffer"] for s in t.optimizer.state_dict()["state"].values()] for t in (whole, second)]
    torch.testing.assert_close(momenta[1], momenta[0], rtol=0, atol=0)
    curves = [t.logger.local_logger.my_fantastic_logging for t in (whole, second)]
    for name in ("consistency_weight", "consistency", "train_losses", "student_dice", "mean_fg_dice"):
        np.testing.assert_array_equal(curves[1][name], curves[0][name])
    weights_of_epochs = curves[0]["consistency_weight"]
    assert weights_of_epochs == sorted(set(weights_of_epochs))  # so that a ramp that starts again would differ


def test_checkpoint_serves_the_teacher_and_keeps_the_student(run):
    trainer = run.build()
    trainer.num_epochs = 1
    trainer.run_training()
    checkpoint = run.load()
    student = list(trainer.network.state_dict().values())
    teacher = list(trainer.teacher.module.state_dict().values())
    assert not torch.equal(student[0], teacher[0])
    torch.testing.assert_close(list(checkpoint["network_weights"].values()), teacher)
    torch.testing.assert_close(list(checkpoint["nnunetv2_selfreg"]["student_weights"].values()), student)


def test_validation_judges_the_teacher_and_the_student(run):
    """The student is made useless: nnU-Net's pseudo Dice is the teacher's, `student_dice` notices."""
    trainer = start(run.build())
    trainer.network.eval()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.zero_()
        batch = next(trainer.dataloader_val)
        outputs = trainer.validation_step(batch)
    assert outputs["student_tp_hard"].sum() == 0
    assert outputs["tp_hard"].sum() + outputs["fp_hard"].sum() > 0
    assert all(float(p.abs().sum()) == 0 for p in trainer.network.parameters())  # changed back


@pytest.mark.parametrize("variant", ["ignore"])
def test_teachers_pseudo_dice_is_stocks_with_its_weights(variant, run, data_sets):
    """nnU-Net's validation step overwrites ignored voxels of its target, so the student's pass may leave no trace."""
    trainer = start(Run(data_sets.name(variant), run.configuration, NAME).build())
    trainer.train_step(next(trainer.dataloader_train))
    trainer.train_step(next(trainer.dataloader_train))  # student and teacher differ from here on
    trainer.on_validation_epoch_start()
    batch = next(trainer.dataloader_val)
    counts = ("tp_hard", "fp_hard", "fn_hard")
    expected = {}
    for name, module in (("", trainer.teacher.module), ("student_", trainer.network)):
        stock = Run(data_sets.name(variant), run.configuration, "nnUNetTrainer_4epochs_2iters").build()
        stock.initialize()
        stock.network.load_state_dict(module.state_dict())
        stock.network.eval()
        with torch.no_grad():
            found = stock.validation_step(copy.deepcopy(batch))
        expected |= {f"{name}{count}": found[count] for count in counts} | {f"{name}loss": found["loss"]}
    with torch.no_grad():
        outputs = trainer.validation_step(batch)
    for name in (*counts, *(f"student_{count}" for count in counts)):
        np.testing.assert_array_equal(outputs[name], expected[name])
    assert outputs["loss"] == pytest.approx(expected["loss"])


def test_pretrained_weights_are_the_teachers_too(run):
    trainer = run.build()
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.fill_(0.5)
    trainer.on_train_start()
    assert all(bool((p == 0.5).all()) for p in trainer.teacher.parameters())


def test_checkpoint_without_a_teacher_is_an_error(run):
    stock = Run(run.data_set, run.configuration, "nnUNetTrainer_1epochs_1iters").build()
    stock.run_training()
    trainer = run.build(continue_training=True)
    with pytest.raises(
        UserError, match=r"checkpoint_final\.pth has no student_weights, teacher_steps.*-pretrained_weights"
    ):
        trainer.load_checkpoint(str(Path(stock.output_folder) / "checkpoint_final.pth"))


@pytest.mark.parametrize("damage", ["garbage", "deleted"])
@pytest.mark.parametrize(("variant", "configuration"), [("ignore", "3d_fullres"), ("regions", "2d")])
def test_segmentation_of_an_unlabelled_case_reaches_nothing(
    damage, variant, configuration, data_sets, tmp_path, monkeypatch
):
    """A seeded run with the unlabelled case's segmentation replaced or deleted: the same losses, the same weights."""
    run = Run(data_sets.name(variant), configuration, NAME)
    preprocessed = Path(shutil.copytree(Path(run.build().preprocessed_dataset_folder_base).parent, tmp_path / "copy"))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    results = []
    for damaged in (False, True):
        monkeypatch.setenv("nnUNet_results", str(tmp_path / f"results-{damaged}"))
        folder = preprocessed / run.data_set
        plans = with_masks(folder, configuration)
        (unlabelled,) = load_json(str(folder / "splits_final.json"))[0]["unlabeled"]
        case = folder / plans["data_identifier"] / unlabelled
        if damaged and damage == "deleted":
            Path(f"{case}_seg.b2nd").unlink()
        elif damaged:
            data, seg, _, properties = nnUNetDatasetBlosc2(str(case.parent), [unlabelled]).load_case(unlabelled)
            garbage = np.random.default_rng(0).integers(-1, 99, seg.shape).astype(np.int16)
            image = data[:]
            for file in case.parent.glob(f"{unlabelled}*"):
                file.unlink()
            nnUNetDatasetBlosc2.save_case(image, garbage, properties, str(case))
        torch.manual_seed(0)
        trainer = run.build()
        trainer.num_epochs = 1
        finish(trainer)
        curves = trainer.logger.local_logger.my_fantastic_logging
        losses = {name: curves[name] for name in ("train_losses", "segmentation", "consistency")}
        results.append((losses, weights(trainer.network), weights(trainer.teacher)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1:], results[0][1:], rtol=0, atol=0)


def with_masks(folder: Path, configuration: str) -> dict:
    """Switches mask-based normalisation on in the plans and in the recipe of the unlabelled cases."""
    plans = load_json(str(folder / "nnUNetPlans.json"))
    mine = plans["configurations"][configuration]
    mine["use_mask_for_norm"] = [True]
    save_json(plans, str(folder / "nnUNetPlans.json"))
    file = str(folder / f"{mine['data_identifier']}_unlabeled" / "preprocessing.json")
    save_json({**load_json(file), "use_mask_for_norm": [True]}, file)
    return mine


def test_prediction_and_final_validation_use_the_teacher(run, monkeypatch):
    trainer = run.build()
    trainer.num_epochs = 1
    trainer.run_training()
    teacher, student = weights(trainer.teacher.module), weights(trainer.network)
    assert not torch.equal(teacher[0], student[0])
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(run.model_folder), (0,))
    torch.testing.assert_close(weights(predictor.network), teacher, rtol=0, atol=0)
    validated = []
    monkeypatch.setattr(
        nnUNetTrainer, "perform_actual_validation", lambda self, _: validated.append(weights(self.network))
    )
    for mine in (trainer, run.build(continue_training=True)):  # right after training, and with --val
        if mine is not trainer:
            mine.load_checkpoint(str(run.folder / "checkpoint_final.pth"))
        mine.perform_actual_validation()
        torch.testing.assert_close(validated.pop(), teacher, rtol=0, atol=0)
        torch.testing.assert_close(weights(mine.network), student, rtol=0, atol=0)


@pytest.mark.parametrize("content", ["[{", "null", '[{"train": [], "val": [], "unlabeled": null}]'])
def test_corrupt_splits_are_named_before_anything_is_loaded(content, run, tmp_path, monkeypatch):
    trainer = run.build()
    folder = tmp_path / run.data_set
    folder.mkdir()
    (folder / "splits_final.json").write_text(content)
    trainer.preprocessed_dataset_folder_base = str(folder)
    with pytest.raises(UserError, match=r"splits_final\.json.*restore it"):
        trainer.unlabeled_pool()
