"""Self-training: what its batch is, what its loss is, where the student starts, and what it refuses."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch import distributed as dist
from workspace import Interruption, Run, finish, seed, start, weights, whole_and_resumed, write_pseudo_labels

from nnunetv2_selfreg.data.batch import Batch
from nnunetv2_selfreg.data.loaders import patch_sizes
from nnunetv2_selfreg.data.pseudo_labels import FILE, class_locations
from nnunetv2_selfreg.data.storage import open_array
from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.losses.consistency import gaussian_ramp_up
from nnunetv2_selfreg.tensors import as_list

NAME = "nnUNetTrainerSelfTraining_4epochs_2iters"
COPY_PASTE = "nnUNetTrainerSelfTrainingCopyPaste_4epochs_2iters"


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))


@pytest.fixture(params=["labels", "regions_ignore"])
def run(request, data_sets, results):
    yield from labelled(Run(data_sets.name(request.param), "3d_fullres", NAME))


@pytest.fixture
def flat(data_sets, results):
    yield from labelled(Run(data_sets.name("labels"), "2d", NAME))


@pytest.fixture
def pasting(data_sets, results):
    yield from labelled(Run(data_sets.name("ignore"), "3d_fullres", COPY_PASTE))


def labelled(run: Run):
    folder = write_pseudo_labels(run)
    yield run
    shutil.rmtree(folder)


def changed(trainer, **attributes):
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_batch_has_the_samples_of_stock_nnunet_then_pseudo_labelled_ones(configuration, data_sets, results):
    run = Run(data_sets.name("labels"), configuration, NAME)
    folder = write_pseudo_labels(run)
    batches = []
    for name in ("nnUNetTrainer", NAME):
        built = changed(Run(run.data_set, configuration, name).build(), unlabeled_batch_size=3)
        built.initialize()
        loader, _ = built.get_dataloaders()
        seed(0)
        batches.append(next(loader))
    stock, mine = batches
    torch.testing.assert_close(mine["data"][:2], stock["data"], rtol=0, atol=0)
    torch.testing.assert_close(mine["target"], stock["target"], rtol=0, atol=0)
    patch = stock["data"].shape[1:]
    assert mine["data"].shape == (2 + 3, *patch)
    assert [scale.shape[2:] for scale in mine["pseudo_target"]] == [scale.shape[2:] for scale in stock["target"]]
    assert {len(scale) for scale in mine["pseudo_target"]} == {3}
    assert set(mine["keys"][2:]) <= set(built.unlabeled_pool().identifiers)
    shutil.rmtree(folder)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_pseudo_labelled_samples_are_those_of_nnunets_loader(configuration, data_sets, results, tmp_path):
    """As it makes them of a case that is stored with these labels, from the same draws."""
    run = Run(data_sets.name("labels"), configuration, NAME)
    folder = write_pseudo_labels(run)
    trainer = run.build()
    trainer.initialize()
    stream = trainer.get_dataloaders()[0].data_loader
    pool = trainer.unlabeled_pool()
    for case in pool.identifiers:
        labels = open_array(folder / f"{case}.b2nd")[:]
        properties = {"class_locations": class_locations(labels, trainer.label_manager)}
        nnUNetDatasetBlosc2.save_case(pool.load_image(case)[:], labels, properties, str(tmp_path / case))
    stock = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(tmp_path)),
        2,
        *patch_sizes(stream.labeled),
        trainer.label_manager,
        oversample_foreground_percent=0.5,
        probabilistic_oversampling=True,
        transforms=stream.labeled.transforms,
    )
    batches = []
    for loader in (stock, stream.unlabeled):
        seed(0)
        batches.append([loader.generate_train_batch() for _ in range(4)])
    for expected, mine in zip(*batches, strict=True):
        assert list(mine["keys"]) == list(expected["keys"])
        torch.testing.assert_close(mine["data"], expected["data"], rtol=0, atol=0)
        torch.testing.assert_close(mine["pseudo_target"], expected["target"], rtol=0, atol=0)
    shutil.rmtree(folder)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_as_large_a_share_is_placed_on_foreground_as_of_the_labelled_samples(samples, flat):
    trainer = changed(flat.build(), unlabeled_batch_size=samples)
    trainer.initialize()
    stream = trainer.get_dataloaders()[0].data_loader
    asked, crop = [], stream.unlabeled.get_bbox

    def spied(shape, force, locations):
        (lower, upper), foreground = crop(shape, force, locations), np.concatenate(list(locations.values()))[:, 1:]
        asked.append(force)
        assert not force or ((foreground >= lower) & (foreground < upper)).all(1).any()
        return lower, upper

    stream.unlabeled.get_bbox = spied
    seed(0)
    for _ in range(200 // samples):
        stream.unlabeled.generate_train_batch()
    assert np.mean(asked) == pytest.approx(0.5, abs=0.12)  # one of the plan's two


def test_nothing_of_the_real_labels_is_opened(data_sets, tmp_path, monkeypatch):
    """Neither the segmentation nor nnU-Net's properties of a listed case: with garbage there, the weights are the
    same."""
    trained = []
    run = Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerSelfTraining_1epochs_2iters")
    folder = write_pseudo_labels(run)
    cases = Path(run.build().preprocessed_dataset_folder)
    files = [cases / "phantom_003_seg.b2nd", cases / "phantom_003.pkl"]
    before = [file.read_bytes() for file in files]
    try:
        for number, change in enumerate((lambda _: None, lambda f: f.write_bytes(b"garbage"), Path.unlink)):
            monkeypatch.setenv("nnUNet_results", str(tmp_path / str(number)))
            for file in files:
                change(file)
            torch.manual_seed(0)
            trainer = run.build()
            finish(trainer)
            trained.append(weights(trainer.network))
    finally:
        for file, content in zip(files, before, strict=True):
            file.write_bytes(content)
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)
    torch.testing.assert_close(trained[2], trained[0], rtol=0, atol=0)
    shutil.rmtree(folder)


def loss_of_output(trainer, output, batch: Batch) -> torch.Tensor:
    trainer.network = lambda _: output
    trainer.terms.clear()
    return trainer.terms.total(trainer.weighted_terms(batch))


def test_loss_is_nnunets_of_both_the_second_weighted_and_ramped(run):
    trainer = changed(start(run.build()), pseudo_weight=0.7, ramp_up_length=0.5)
    trainer.current_epoch = 1
    batch = Batch.split(next(trainer.dataloader_train))
    target = as_list(batch.further["pseudo_target"])
    output = trainer.network(batch.images)
    labeled, pseudo = ([scale[part] for scale in output] for part in (slice(2), slice(2, None)))
    ramp = gaussian_ramp_up(0.25, 0.5)
    assert 0 < ramp < 1
    expected = trainer.loss(labeled, batch.target) + 0.7 * ramp * trainer.loss(pseudo, target)
    torch.testing.assert_close(loss_of_output(trainer, output, batch), expected)
    assert trainer.terms["pseudo_weight"] == pytest.approx(0.7 * ramp)


def test_pseudo_labels_teach_the_network(run):
    """Both terms have gradients of their own, at every weighted scale."""
    trainer = start(run.build())
    trainer.current_epoch = 3
    batch = Batch.split(next(trainer.dataloader_train))
    output = [scale.detach().requires_grad_() for scale in trainer.network(batch.images)]
    loss_of_output(trainer, output, batch).backward()
    for scale in output[:-1]:  # the last has no weight in nnU-Net
        supervised, taught = (scale.grad[part].abs().sum() for part in (slice(2), slice(2, None)))
        assert 0 < supervised / 5 < taught < 5 * supervised


def test_mixtures_have_pseudo_labels_where_the_unlabelled_sample_is(pasting):
    trainer = start(pasting.build())
    trainer.current_epoch = 1  # the warm-up is over
    trainer.teacher_probabilities = None  # not asked
    batch = Batch.split(next(trainer.dataloader_train))
    target = as_list(batch.further["pseudo_target"])
    mixtures = trainer.mixtures(batch)
    for number, sample in ((0, 0), (1, 1), (2, 0), (3, 1)):
        other = mixtures.other[number]
        assert torch.equal(mixtures.images[number][other], batch.strong[sample][other])
        assert torch.equal(mixtures.target[0][number][other], target[0][sample][other])
        assert not torch.equal(mixtures.target[0][number], target[0][sample])


def test_selfreg_composes_with_it(data_sets, results):
    run = Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerSelfRegSelfTraining_4epochs_2iters")
    folder = write_pseudo_labels(run)
    trainer = start(run.build())
    trainer.train_step(next(trainer.dataloader_train))
    assert {"segmentation", "pseudo_segmentation", "pseudo_weight", "scr", "ifd"} <= set(trainer.terms)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", [NAME, COPY_PASTE])
def test_resumed_training_equals_one_without_interruption(name, data_sets, tmp_path, monkeypatch):
    run = Run(data_sets.name("labels"), "2d", name)
    folder = write_pseudo_labels(run)
    whole, resumed = whole_and_resumed(run, tmp_path, monkeypatch)
    torch.testing.assert_close(weights(resumed.network), weights(whole.network), rtol=0, atol=0)
    shutil.rmtree(folder)


def test_training_is_not_resumed_with_other_labels(flat):
    interrupt(flat.build())
    folder = write_pseudo_labels(flat, teacher="another")
    resumed = flat.build(continue_training=True)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    with pytest.raises(UserError, match=r"has learned from other labels than those that are in .*, of another \(fold"):
        resumed.run_training()
    resumed.perform_actual_validation()  # needs none of them
    assert folder.is_dir()


def interrupt(trainer, epoch: int = 2) -> None:
    """Trains until an epoch begins."""
    begin = trainer.on_epoch_start
    trainer.on_epoch_start = lambda: begin() if trainer.current_epoch < epoch else (_ for _ in ()).throw(Interruption)
    with pytest.raises(Interruption):
        finish(trainer)


def test_other_cases_that_are_left_out_meanwhile_are_told(flat):
    interrupt(flat.build())
    folder = Path(flat.build().preprocessed_dataset_folder_base) / "nnUNetPlans_2d_pseudo_labels" / "fold_0"
    content = json.loads((folder / FILE).read_text())
    content["dropped"] = {"phantom_003": "disagreement"}
    (folder / FILE).write_text(json.dumps(content))
    resumed = flat.build(continue_training=True)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    resumed.get_dataloaders()
    assert "Other pseudo-labelled cases are left out now" in Path(resumed.log_file).read_text()


def test_second_round_that_is_interrupted_goes_on(flat):
    """nnU-Net's --c would take the first round's final checkpoint."""
    flat.build().run_training()
    first = flat.load()["network_weights"]
    write_pseudo_labels(flat, teacher="the first student")
    interrupt(flat.build())
    torch.testing.assert_close(flat.load("checkpoint_last_round.pth")["network_weights"], first)
    resumed = flat.build(continue_training=True)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    assert resumed.current_epoch == 2
    resumed.run_training()
    assert flat.load()["nnunetv2_selfreg"]["teachers"] == ["the first student"]


def test_checkpoint_knows_whose_labels_its_teachers_saw(flat):
    folder = write_pseudo_labels(flat)
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**content, "seen": ["phantom_000"]}))
    flat.build().run_training()
    assert flat.load()["nnunetv2_selfreg"] == {
        "teachers": ["teacher"],
        "cases": ["phantom_003", "phantom_006"],
        "seen": ["phantom_000"],
    }


def teacher_of(run: Run, network: str = "nnUNetTrainer_1epochs_1iters") -> Path:
    """A teacher whom the run's labels name as their first."""
    teacher = Run(run.data_set, run.configuration, network)
    teacher.build().run_training()
    file = teacher.folder / "checkpoint_final.pth"
    folder = write_pseudo_labels(run)
    content = json.loads((folder / FILE).read_text())
    content["teachers"][0]["checkpoint"] = str(file)
    content["teachers"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / FILE).write_text(json.dumps(content))
    relabel(folder, content["teachers"][0]["sha256"])
    return file


def relabel(folder: Path, teacher: str) -> None:
    for file in folder.glob("*.npz"):
        with np.load(file) as content:
            arrays = {**content, "made_by": np.array([teacher])}
        np.savez(file, **arrays)


def test_student_begins_anew_by_default(flat):
    file = teacher_of(flat)
    trainer = start(flat.build())
    other = torch.load(file, weights_only=False)["network_weights"]
    assert any(not torch.equal(value, other[name]) for name, value in trainer.network.state_dict().items())


def test_student_starts_from_its_teacher_when_that_is_wanted(flat):
    file = teacher_of(flat)
    trainer = start(changed(flat.build(), start_from_teacher=True))
    torch.testing.assert_close(
        dict(trainer.network.state_dict()), dict(torch.load(file, weights_only=False)["network_weights"])
    )


def test_resumed_student_keeps_its_own_weights(flat):
    file = teacher_of(flat)
    interrupt(changed(flat.build(), start_from_teacher=True))
    file.unlink()  # it is not needed any more
    resumed = changed(flat.build(continue_training=True), start_from_teacher=True)
    resumed.load_checkpoint(str(flat.folder / "checkpoint_latest.pth"))
    before = weights(resumed.network)
    resumed.on_train_start()
    torch.testing.assert_close(weights(resumed.network), before, rtol=0, atol=0)


def test_student_does_not_start_from_a_teacher_that_is_not_the_one(flat):
    file = teacher_of(flat)
    checkpoint = torch.load(file, weights_only=False)
    torch.save({**checkpoint, "more": 1}, file)
    trainer = changed(flat.build(), start_from_teacher=True)
    with pytest.raises(UserError, match=r"final.pth, the teacher of these pseudo-labels, is gone or was trained"):
        trainer.on_train_start()
    file.unlink()
    with pytest.raises(UserError, match=r"is gone or was trained again. With start_from_teacher = False the student"):
        trainer.on_train_start()


def test_student_does_not_start_from_another_network(flat):
    teacher_of(flat, "nnUNetTrainerTinyUXNet_1epochs_1iters")
    trainer = changed(flat.build(), start_from_teacher=True)
    with pytest.raises(UserError, match="has another network than nnUNetTrainerSelfTraining"):
        trainer.on_train_start()


def test_another_set_of_labels_is_taken_by_its_name(flat):
    folder = write_pseudo_labels(flat, teacher="second", name="mine")
    trainer = changed(flat.build(), pseudo_label_set="mine")
    trainer.initialize()
    trainer.get_dataloaders()
    assert "labels of second (fold 0)" in Path(trainer.log_file).read_text()
    shutil.rmtree(folder)


def test_labels_are_needed_before_the_training(data_sets, results):
    trainer = Run(data_sets.name("labels"), "2d", NAME).build()
    trainer.initialize()
    with pytest.raises(UserError, match=r"There are no pseudo-labels in .*2d_pseudo_labels/fold_0. Run nnUNet"):
        trainer.get_dataloaders()


@pytest.mark.parametrize(("configuration", "refused"), [("2d", True), ("3d_fullres", False)])
def test_uneven_shares_are_refused_where_processes_share_their_dice(configuration, refused, data_sets, results):
    trainer = changed(Run(data_sets.name("labels"), configuration, NAME).build(), unlabeled_batch_size=3, is_ddp=True)
    assert trainer.configuration_manager.batch_dice == refused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda: 2)
        if not refused:
            assert trainer._unlabeled_of_this_rank() == 2
            return
        with pytest.raises(ValueError, match="it must be divisible by the number of processes, 2, which share the Dic"):
            trainer._unlabeled_of_this_rank()


def test_largest_component_is_refused(data_sets, results):
    trainer = changed(Run(data_sets.name("labels"), "2d", COPY_PASTE).build(), largest_component=True)
    with pytest.raises(ValueError, match="largest_component is True, it must be False"):
        trainer.initialize()


@pytest.mark.parametrize("name", [NAME, COPY_PASTE])
def test_pseudo_labelled_samples_are_needed(name, data_sets, results):
    trainer = changed(Run(data_sets.name("labels"), "2d", name).build(), unlabeled_batch_size=0)
    with pytest.raises(ValueError, match="unlabeled_batch_size is 0, it must be 1 at least, or None"):
        trainer.initialize() or trainer.get_dataloaders()


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_weight_that_cannot_be_is_an_error(value, data_sets, results):
    trainer = changed(Run(data_sets.name("labels"), "2d", NAME).build(), pseudo_weight=value)
    with pytest.raises(ValueError, match=r"pseudo_weight is .*, it must be finite and 0 at least"):
        trainer.initialize()
