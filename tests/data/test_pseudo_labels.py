"""Pseudo-labels on disk: what is left out, what vouches for a case, and what a student refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from hypothesis import given
from hypothesis import strategies as st
from workspace import Run, write_pseudo_labels

from nnunetv2_selfreg.data.pseudo_labels import (
    EMPTY,
    FILE,
    WORST,
    Description,
    PseudoLabeledCases,
    class_locations,
    folder_of,
    left_out,
    location_keys,
    read_case,
    read_pseudo_labels,
    store_case,
)
from nnunetv2_selfreg.data.storage import open_array
from nnunetv2_selfreg.data.unlabeled import recipe
from nnunetv2_selfreg.errors import UserError

VARIANTS = ("labels", "regions", "ignore", "regions_ignore")


def test_worst_share_is_left_out():
    disagreement = {f"c{n}": n / 10 for n in range(10)}
    assert left_out(disagreement, [], 0.2, False) == {"c9": WORST, "c8": WORST}
    assert left_out(disagreement, [], 0.0, False) == {}


def test_cases_without_foreground_are_left_out_unless_kept():
    disagreement = {"a": 0.1, "b": 5.0, "c": 0.3, "d": 0.2}
    assert left_out(disagreement, ["b"], 0.25, False) == {"b": EMPTY, "c": WORST}
    assert left_out(disagreement, ["b"], 0.25, True) == {"b": WORST}


def test_unknown_disagreement_leaves_nothing_out():
    assert left_out({"a": None, "b": None}, [], 0.5, False) == {}


@given(
    st.dictionaries(st.text(min_size=1), st.none() | st.floats(0, 10), max_size=12),
    st.floats(0, 0.99),
    st.booleans(),
)
def test_none_that_is_kept_is_worse_than_one_that_is_left_out(disagreement, drop, keep_empty):
    out = left_out(disagreement, [*disagreement][:2], drop, keep_empty)
    worst = [disagreement[case] for case, reason in out.items() if reason == WORST]
    kept = [value for case, value in disagreement.items() if case not in out and value is not None]
    assert len(worst) <= round(drop * len(disagreement))
    assert not worst or not kept or max(kept) <= min(worst)


@pytest.fixture
def trainer(data_sets):
    return Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerMeanTeacher").build()


@pytest.fixture
def written(data_sets):
    folder = write_pseudo_labels(Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerSelfTraining"))
    yield folder
    shutil.rmtree(folder)


def read(trainer, folder: Path, **changed):
    what = {
        "pool": trainer.unlabeled_pool(),
        "manager": trainer.label_manager,
        "labels": trainer.dataset_json["labels"],
        "current": recipe(trainer.plans_manager, trainer.configuration_manager),
        "fold": 0,
        "val": trainer.do_split()[1],
    }
    return read_pseudo_labels(folder, **{**what, **changed})


LABELS = np.zeros((4, 5, 6), np.int16)
LABELS[1, 2:4, 3] = 2


def test_case_is_read_as_it_was_stored(trainer, tmp_path):
    store_case(tmp_path, "a", LABELS, trainer.label_manager, 0.25, ["x", "y"], "image", (4, 4, 4))
    store_case(tmp_path, "b", 0 * LABELS, trainer.label_manager, None, ["x", "y"], "image", (4, 4, 4))
    assert read_case(tmp_path, "a", ["x", "y"], "image") == {"disagreement": 0.25, "empty": False}
    assert read_case(tmp_path, "b", ["x", "y"], "image") == {"disagreement": None, "empty": True}
    np.testing.assert_array_equal(open_array(tmp_path / "a.b2nd")[0], LABELS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.b2nd", "a.npz", "b.b2nd", "b.npz"]


def test_case_of_other_teachers_or_half_a_case_counts_as_missing(trainer, tmp_path):
    def stored() -> dict | None:
        store_case(tmp_path, "a", LABELS, trainer.label_manager, 0.25, ["x"], "image", (4, 4, 4))
        return read_case(tmp_path, "a", ["x"], "image")

    assert stored() is not None
    assert read_case(tmp_path, "a", ["x", "y"], "image") is None
    assert read_case(tmp_path, "a", ["x"], "another image") is None
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:60])
    assert read_case(tmp_path, "a", ["x"], "image") is None
    assert stored() is not None
    (tmp_path / "a.b2nd").write_bytes(b"damaged")
    assert read_case(tmp_path, "a", ["x"], "image") is None
    (tmp_path / "a.b2nd").unlink()
    assert read_case(tmp_path, "a", ["x"], "image") is None


def test_kill_between_the_files_of_a_case_leaves_it_missing(trainer, tmp_path, monkeypatch):
    store_case(tmp_path, "a", LABELS, trainer.label_manager, 0.25, ["x"], "image", (4, 4, 4))

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", killed)
    with pytest.raises(KeyboardInterrupt):
        store_case(tmp_path, "a", LABELS + 1, trainer.label_manager, 0.5, ["x"], "image", (4, 4, 4))
    assert read_case(tmp_path, "a", ["x"], "image") is None  # the new labels with the old disagreement would be neither


@pytest.mark.parametrize("variant", VARIANTS)
def test_classes_are_where_nnunets_preprocessing_finds_them(variant, data_sets):
    trainer = Run(data_sets.name(variant), "3d_fullres", "nnUNetTrainer").build()
    folder = Path(trainer.preprocessed_dataset_folder)
    case = "phantom_000"
    expected = load_pickle(str(folder / f"{case}.pkl"))["class_locations"]
    found = class_locations(open_array(folder / f"{case}_seg.b2nd")[:], trainer.label_manager)
    assert [*found] == [*expected] == location_keys(trainer.label_manager)
    for key, voxels in expected.items():
        np.testing.assert_array_equal(found[key], voxels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_case_has_image_labels_and_class_locations(variant, data_sets):
    run = Run(data_sets.name(variant), "3d_fullres", "nnUNetTrainerMeanTeacher")
    folder, trainer = write_pseudo_labels(run), run.build()
    pool = trainer.unlabeled_pool()
    cases = PseudoLabeledCases(pool, folder, pool.identifiers, trainer.label_manager, ["teacher"])
    for case in cases.identifiers:
        image, labels, previous, properties = cases.load_case(case)
        np.testing.assert_array_equal(image[:], pool.load_image(case)[:])
        np.testing.assert_array_equal(labels[0], np.digitize(-image[0], np.quantile(-image[0], (0.7, 0.95))))
        assert previous is None
        for key, voxels in properties["class_locations"].items():
            at = labels[:][tuple(np.asarray(voxels).T)]
            assert len(voxels)
            assert set(np.unique(at)) <= set(np.atleast_1d(key))
    shutil.rmtree(folder)


def test_labels_of_the_pool(trainer, written):
    description, cases = read(trainer, written)
    assert cases.identifiers == trainer.unlabeled_pool().identifiers
    assert description.made_by == ["teacher"]


def test_cases_that_are_left_out_are_not_among_them(trainer, written):
    description = Description.read(written)
    first, *others = trainer.unlabeled_pool().identifiers
    description.dropped = {first: WORST}
    description.save(written)
    assert read(trainer, written)[1].identifiers == others


def drop_all(description: dict) -> None:
    description["dropped"] = dict.fromkeys(description["disagreement"], EMPTY)


CHANGES = [
    (lambda d: d["labels"].update(more=3), "was labelled when the data set had other labels. Delete"),
    (lambda d: d["recipe"].update(spacing=[9, 9, 9]), "was labelled when the data set had other plans. Delete"),
    (lambda d: d["disagreement"].popitem(), "has no pseudo-labels of phantom_006, of 2 unlabelled cases"),
    (lambda d: d["teachers"][0].update(sha256="else"), "has no pseudo-labels of phantom_003, phantom_006"),
    (drop_all, "leaves all 2 cases out. Run nnUNetv2_selfreg pseudo_label again with a smaller --drop"),
    (lambda d: d.update(more=1), "is no description of pseudo-labels"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_does_not_fit_is_an_error(change, message, trainer, written):
    content = json.loads((written / FILE).read_text())
    change(content)
    (written / FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read(trainer, written)


def test_missing_and_damaged_descriptions_are_errors(trainer, written):
    (written / FILE).write_text("{")
    with pytest.raises(UserError, match=f"{FILE} is not JSON"):
        read(trainer, written)
    (written / FILE).unlink()
    with pytest.raises(UserError, match=r"There are no pseudo-labels in .*fold_0. Run nnUNetv2_selfreg pseudo_label"):
        read(trainer, written)


def test_scan_that_has_changed_since_it_was_labelled_is_an_error(trainer, written):
    pool = trainer.unlabeled_pool()
    load = pool.load_image
    pool.load_image = lambda case: load(case)[:, ::-1] if case == "phantom_003" else load(case)
    with pytest.raises(UserError, match=r"has no pseudo-labels of phantom_003, of 2 unlabelled cases: the pool has"):
        read(trainer, written, pool=pool)


def test_labels_of_another_fold_are_an_error(trainer, written):
    with pytest.raises(UserError, match=r"has labels for fold 0, not for 5. Run nnUNetv2_selfreg pseudo_label -f 5"):
        read(trainer, written, fold=5)


def test_labels_of_a_teacher_that_saw_a_validation_case_are_an_error(trainer, written):
    """As where the fold was redefined since."""
    description = Description.read(written)
    description.seen = trainer.do_split()[1][:1]
    description.save(written)
    with pytest.raises(UserError, match=r"was trained with labels of phantom_004, on which fold 0 is validated"):
        read(trainer, written)


def test_training_ends_when_its_labels_are_replaced(trainer, written, data_sets):
    _, cases = read(trainer, written)
    cases.load_case("phantom_003")
    write_pseudo_labels(Run(data_sets.name("labels"), "3d_fullres", "nnUNetTrainerSelfTraining"), teacher="another")
    with pytest.raises(UserError, match="was labelled anew while a student learned from it"):
        cases.load_case("phantom_003")


def test_folder_is_of_configuration_fold_and_name(tmp_path):
    assert folder_of(tmp_path / "p_3d", 5) == tmp_path / "p_3d_pseudo_labels" / "fold_5"
    assert folder_of(tmp_path / "p_3d", "all", "second") == tmp_path / "p_3d_pseudo_labels" / "fold_all_second"
