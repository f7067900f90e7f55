"""Labelling a pool: what the labels are, what is never opened, interruptions, parts, other teachers."""

import errno
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from workspace import Run

from nnunetv2_selfreg.data.pseudo_labels import EMPTY, FILE, OVERVIEW, WORST, Description
from nnunetv2_selfreg.data.storage import open_array
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool
from nnunetv2_selfreg.errors import FullDiskError, UnsupportedError, UserError
from nnunetv2_selfreg.files import naming_a_full_disk
from nnunetv2_selfreg.labeling import label, overview
from nnunetv2_selfreg.labeling.label import judge, pseudo_label
from nnunetv2_selfreg.labeling.overview import draw_overview

POOL = ["phantom_003", "phantom_006"]  # the one that fold 0 lists, and the one of imagesTs


def train(run: Run) -> Path:
    """A step, then heads of large random weights, so that the prediction has all labels everywhere."""
    torch.manual_seed(sum(map(ord, f"{run.trainer}{run.fold}")))
    run.build().run_training()
    checkpoint = run.load()
    for name, weight in checkpoint["network_weights"].items():
        if "seg_layers" in name:
            checkpoint["network_weights"][name] = torch.randn(weight.shape)
    torch.save(checkpoint, run.folder / "checkpoint_final.pth")
    return run.model_folder


@pytest.fixture(scope="module")
def trained(data_sets, tmp_path_factory):
    """Teachers on both folds, in 3D, of classes and of regions."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(results))
        for variant in ("labels", "regions_ignore"):
            for fold in (0, 1):
                train(Run(data_sets.name(variant), "3d_fullres", "nnUNetTrainer_1epochs_1iters", fold))
    return results


@pytest.fixture
def model(data_sets, trained):
    return trained / data_sets.name("labels") / "nnUNetTrainer_1epochs_1iters__nnUNetPlans__3d_fullres"


@pytest.fixture
def preprocessed(data_sets):
    folder = Path(os.environ["nnUNet_preprocessed"]) / data_sets.name("labels")
    yield folder
    for made in folder.glob("*_pseudo_labels"):
        shutil.rmtree(made)


@pytest.fixture
def labelled(preprocessed, model):
    """Labels with defaults of this test, changed as it wants."""

    def run(**changed):
        options = {"models": [model], "folds": [0], "drop": 0.0, "keep_empty": True}
        return pseudo_label(preprocessed.name, "3d_fullres", **{**options, **changed})

    return run


def predicted(model: Path, fold: int, image: np.ndarray, mirror: bool = True) -> torch.Tensor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=mirror, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,))
    return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float()


def labels_of(job, case: str) -> np.ndarray:
    return open_array(job.folder / f"{case}.b2nd")[0]


def everything(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_labels_and_disagreement_of_one_model_are_of_its_mirrored_and_its_plain_prediction(labelled, model):
    job, description = labelled()
    assert [*description.disagreement] == job.pool.identifiers == POOL
    for case in POOL:
        image = job.pool.load_image(case)[:]
        mirrored, plain = (predicted(model, 0, image, mirror).argmax(0).numpy() for mirror in (True, False))
        np.testing.assert_array_equal(labels_of(job, case), mirrored)
        expected = (mirrored != plain).sum() / max(1, (mirrored > 0).sum())
        assert description.disagreement[case] == pytest.approx(expected)
    assert description.between == "mirrored and plain prediction"
    assert any(value > 0 for value in description.disagreement.values())


def test_labels_of_several_models_are_of_their_mean_and_the_disagreement_is_theirs(labelled, model):
    job, description = labelled(folds=[0, 1], student="all")
    assert job.pool.identifiers == POOL[1:]  # fold all knows the images without labels alone
    (case,) = POOL[1:]
    first, second = (predicted(model, fold, job.pool.load_image(case)[:]) for fold in (0, 1))
    expected = (first + second).argmax(0).numpy()
    np.testing.assert_array_equal(labels_of(job, case), expected)
    differ = (first.argmax(0) != second.argmax(0)).sum()
    assert description.disagreement[case] == pytest.approx(int(differ) / max(1, (expected > 0).sum()))
    assert description.between == "members"
    assert [teacher["fold"] for teacher in description.teachers] == [0, 1]


def test_regions_are_labelled_as_nnunet_writes_them(data_sets, trained):
    name = data_sets.name("regions_ignore")
    model = trained / name / "nnUNetTrainer_1epochs_1iters__nnUNetPlans__3d_fullres"
    job, _ = pseudo_label(name, "3d_fullres", [model], [0], keep_empty=True)
    for case in POOL:
        logits = predicted(model, 0, job.pool.load_image(case)[:])
        heart, veins = torch.sigmoid(logits) > 0.5
        np.testing.assert_array_equal(labels_of(job, case), torch.where(veins, 2, heart.int()).numpy())
    shutil.rmtree(job.folder.parent)


def logits_of(labels: list[int], classes: int = 3) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), classes).T.float()[:, None, None]


def test_disagreement_by_hand(data_sets):
    manager = Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainer").build().label_manager
    a, b = [0, 1, 1, 2, 2], [1, 1, 2, 2, 2]

    def judged(*opinions, members=1):
        labels, disagreement = judge(map(logits_of, opinions), members, manager)
        return labels.ravel().tolist(), disagreement

    assert judged(a, b) == (a, 2 / 4)  # of the first, since it is the only member
    assert judged(a, b, b, members=3) == (b, 2 / 5)
    assert judged(a, a, [0] * 5, members=3) == (a, 4 / 4)
    assert judged([0, 0], [0, 1]) == ([0, 0], 1.0)
    assert judged(a) == (a, None)


def test_real_labels_are_never_opened(labelled, preprocessed):
    """Neither the segmentation nor nnU-Net's properties of a listed case, which say where its classes are."""
    expected = everything(labelled()[0].folder)
    shutil.rmtree(preprocessed / "nnUNetPlans_3d_fullres_pseudo_labels")
    cases = preprocessed / "nnUNetPlans_3d_fullres"
    files = [cases / f"{POOL[0]}_seg.b2nd", cases / f"{POOL[0]}.pkl"]
    before = [file.read_bytes() for file in files]
    try:
        for file in files:
            file.write_bytes(b"garbage")
        assert everything(labelled()[0].folder) == expected
        shutil.rmtree(preprocessed / "nnUNetPlans_3d_fullres_pseudo_labels")
        for file in files:
            file.unlink()
        assert everything(labelled()[0].folder) == expected
    finally:
        for file, content in zip(files, before, strict=True):
            file.write_bytes(content)


def test_files_of_nnunet_stay_as_they_are(labelled, preprocessed):
    def all_files() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in preprocessed.rglob("*") if file.is_file()}

    before = all_files()
    labelled()
    after = all_files()
    assert {file: after[file] for file in before} == before
    assert {file.parent.parent.name for file in after.keys() - before.keys()} == {
        "nnUNetPlans_3d_fullres_pseudo_labels"
    }


def test_interrupted_labelling_goes_on_where_it_was(labelled, monkeypatch):
    expected = everything(labelled()[0].folder)
    shutil.rmtree(labelled()[0].folder)
    store, stored = label.store_case, []

    def interrupted(folder, case, *rest):
        if stored:
            raise KeyboardInterrupt
        stored.append(case)
        store(folder, case, *rest)

    monkeypatch.setattr(label, "store_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        labelled()
    relabelled = []
    monkeypatch.setattr(label, "store_case", lambda *what: relabelled.append(what[1]) or store(*what))
    job, _ = labelled()
    assert (stored, relabelled) == (POOL[:1], POOL[1:])
    assert everything(job.folder) == expected


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parts_make_what_one_process_makes(order, labelled):
    job, _ = labelled()
    expected = everything(job.folder)
    shutil.rmtree(job.folder)
    first, second = order
    job, description = labelled(part=(first, 2))
    assert [*description.disagreement] == [POOL[first]]
    labelled(part=(second, 2))
    assert everything(job.folder) == expected


def label_part(part: int, results: str, options: dict) -> None:
    os.environ["nnUNet_results"] = results
    pseudo_label(**options, part=(part, 2))


def test_parts_may_run_at_once(labelled, preprocessed, model):
    job, description = labelled()
    expected = [labels_of(job, case) for case in POOL]
    shutil.rmtree(job.folder)
    options = {"dataset": preprocessed.name, "configuration": "3d_fullres", "models": [model], "folds": [0]}
    options = {**options, "drop": 0.0, "keep_empty": True}
    context = multiprocessing.get_context("forkserver")
    parts = [context.Process(target=label_part, args=(part, str(model.parents[1]), options)) for part in (0, 1)]
    for process in parts:
        process.start()
    for process in parts:
        process.join()
    assert [process.exitcode for process in parts] == [0, 0]
    assert Description.read(job.folder) == description
    np.testing.assert_array_equal([labels_of(job, case) for case in POOL], expected)


def test_part_without_a_share_says_what_is_left(labelled):
    job, description = labelled(part=(2, 3))
    assert description.disagreement == {}
    assert (job.folder / FILE).is_file()


def test_full_disk_is_named_and_what_is_labelled_is_kept(labelled, monkeypatch):
    store = label.store_case

    def full(folder, case, *rest):
        if case == POOL[1]:
            with naming_a_full_disk(folder / case):
                raise OSError(errno.ENOSPC, "No space left on device")
        store(folder, case, *rest)

    monkeypatch.setattr(label, "store_case", full)
    with pytest.raises(FullDiskError, match="phantom_006 could not be written: No space left on device"):
        labelled()
    monkeypatch.setattr(label, "store_case", store)
    done = []
    monkeypatch.setattr(label, "store_case", lambda *what: done.append(what[1]) or store(*what))
    labelled()
    assert done == POOL[1:]


def test_scan_that_has_changed_is_labelled_again(labelled, monkeypatch):
    job, _ = labelled()
    before = labels_of(job, POOL[1])
    load = UnlabeledPool.load_image

    def mirrored(pool, case):
        return np.ascontiguousarray(load(pool, case)[:][:, ::-1]) if case == POOL[1] else load(pool, case)

    monkeypatch.setattr(UnlabeledPool, "load_image", mirrored)
    done, store = [], label.store_case
    monkeypatch.setattr(label, "store_case", lambda *what: done.append(what[1]) or store(*what))
    job, _ = labelled()
    assert done == POOL[1:]
    assert (labels_of(job, POOL[1]) != before).any()


def test_images_of_an_older_format_are_labelled_alike(labelled, preprocessed):
    job, _ = labelled()
    expected = labels_of(job, POOL[0])
    shutil.rmtree(job.folder)
    cases = preprocessed / "nnUNetPlans_3d_fullres"
    image = cases / f"{POOL[0]}.b2nd"
    nnUNetDatasetNumpy.save_case(open_array(image)[:], np.zeros((1, 1, 1, 1)), {}, str(cases / "packed"))
    hidden = image.rename(image.with_suffix(".hidden"))
    packed = (cases / "packed.npz").rename(cases / f"{POOL[0]}.npz")
    (cases / "packed.pkl").unlink()
    try:
        np.testing.assert_array_equal(labels_of(labelled()[0], POOL[0]), expected)
    finally:
        packed.unlink()
        hidden.rename(image)


def test_another_share_is_left_out_without_labelling_again(labelled, monkeypatch):
    _, description = labelled()
    monkeypatch.setattr(label, "Opinions", None)  # not asked
    job, changed = labelled(drop=0.5)
    (worst,) = changed.dropped
    assert changed.dropped == {worst: WORST}
    assert description.disagreement == changed.disagreement
    assert changed.disagreement[worst] == max(changed.disagreement.values())
    assert json.loads((job.folder / FILE).read_text())["drop"] == 0.5


def test_case_without_foreground_is_left_out_unless_kept(labelled, monkeypatch):
    def nothing_found(*what):
        return 0 * judge(*what)[0], 0.0

    monkeypatch.setattr(label, "judge", nothing_found)
    assert labelled(keep_empty=False)[1].dropped == dict.fromkeys(POOL, EMPTY)
    assert labelled(keep_empty=True)[1].dropped == {}


def test_labels_of_other_teachers_are_replaced_when_that_is_wanted(labelled, model, monkeypatch):
    job, description = labelled()
    before = everything(job.folder)
    other = model.parent / "nnUNetTrainer_1epochs_2iters__nnUNetPlans__3d_fullres"
    monkeypatch.setenv("nnUNet_results", str(model.parents[1]))
    train(Run(job.folder.parents[1].name, "3d_fullres", "nnUNetTrainer_1epochs_2iters"))
    with pytest.raises(UserError, match=r"has labels of other teachers: nnUNetTrainer_1epochs_1iters \(fold 0\)"):
        labelled(models=[other])
    (job.folder / OVERVIEW).touch()
    before[OVERVIEW] = b""
    assert everything(job.folder) == before
    further, _ = labelled(models=[other], name="second")
    assert everything(job.folder) == before
    expected = everything(further.folder)
    _, replaced = labelled(models=[other], overwrite=True)
    assert replaced.made_by != description.made_by
    assert everything(job.folder) == expected
    shutil.rmtree(other)


def test_outside_of_the_body_labels_are_those_of_nnunet(labelled, preprocessed, tmp_path):
    """Where the plan normalises within the body, nnU-Net's training masks images by labels of -1."""
    plans = load_json(str(preprocessed / "nnUNetPlans.json"))
    plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]
    made, _ = labelled()
    job = replace(made, folder=tmp_path, configuration=PlansManager(plans).get_configuration("3d_fullres"))
    image = np.zeros((1, 8, 8, 8), np.float32)
    image[:, 2:6, 2:6, 2:6] = 1
    job.pool.load_image = lambda _: image
    expected = np.full((8, 8, 8), -1)
    expected[2:6, 2:6, 2:6] = 0
    expected[3:7, 3:5, 3:5] = 1  # also outside, where nnU-Net's preprocessing keeps foreground

    class Foreseen:
        members = 1

        def __call__(self, _):
            return iter([logits_of([1, 0])[:, 0, 0, torch.from_numpy((expected < 1) * 1)]])

    label._label(job, Foreseen(), ["a"], ["x"])
    np.testing.assert_array_equal(labels_of(job, "a"), expected)


def test_cascade_is_refused(labelled, preprocessed):
    with pytest.raises(UnsupportedError, match="second stage of a cascade"):
        pseudo_label(preprocessed.name, "3d_cascade_fullres", [Path("x__y__z")], [0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"drop": 1.0}, r"--drop 1.0 is no share of cases. Give one from 0 to less than 1"),
        ({"drop": -0.1}, "--drop -0.1 is no share"),
        ({"drop": float("nan")}, "--drop nan is no share"),
        ({"folds": [0, 1]}, "Teachers of several folds: say with --student"),
        ({"student": 7}, "There is no fold 7: .*splits_final.json has 0 to 1"),
        ({"plans_name": "other"}, "other.json does not exist"),
        ({"name": "../mine"}, r"--name ../mine: letters, digits and hyphens only"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(changed, message, labelled, preprocessed):
    with pytest.raises(UserError, match=message):
        labelled(**changed)
    assert not list(preprocessed.glob("*_pseudo_labels"))


def test_fold_without_a_pool_is_an_error(labelled, preprocessed):
    own = preprocessed / "nnUNetPlans_3d_fullres_unlabeled"
    own.rename(preprocessed / "elsewhere")
    file = preprocessed / "splits_final.json"
    before = file.read_text()
    try:
        save_json([{part: fold[part] for part in ("train", "val")} for fold in json.loads(before)], str(file))
        with pytest.raises(UserError, match="Fold 0 has no unlabelled case"):
            labelled()
    finally:
        file.write_text(before)
        (preprocessed / "elsewhere").rename(own)


def test_overview_is_a_picture_of_the_most_and_the_least_disputed_cases(labelled, monkeypatch):
    job, description = labelled(drop=0.5)
    file = draw_overview(job, description)
    assert file == job.folder / "overview.png"
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawn = []
    monkeypatch.setattr(overview, "ROWS", 1)
    monkeypatch.setattr(overview, "contour_figure", lambda cases, _: drawn.extend(cases))
    draw_overview(job, description)
    worst, best = sorted(POOL, key=lambda case: -description.disagreement[case])
    for case, shown in zip((worst, best), drawn, strict=True):
        assert shown.title.startswith(f"{case}: disagreement {description.disagreement[case]:.3f}")
        assert shown.title.endswith("left out: disagreement") == (case == worst)
        assert shown.reference is None
        np.testing.assert_array_equal(shown.prediction, labels_of(job, case))
        np.testing.assert_array_equal(shown.image, job.pool.load_image(case)[0])


def test_overview_goes_when_other_cases_are_left_out(labelled):
    job, description = labelled()
    file = draw_overview(job, description)
    labelled()
    assert file.is_file()
    labelled(drop=0.5)
    assert not file.is_file()
