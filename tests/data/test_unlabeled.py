"""Which images a fold trains on without labels."""

import gc
import json
import weakref

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunetv2_selfreg.data.unlabeled import find_pool
from nnunetv2_selfreg.errors import UserError

IMAGE = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
SEGMENTATION = np.zeros((1, 3, 4, 5), np.int16)
RECIPE = {"spacing": [1.0, 1.0]}


@pytest.fixture
def folder(tmp_path):
    """Three labelled cases a, b, c, and two of their own folder, x and y."""
    labelled, unlabelled = tmp_path / "plans_3d", tmp_path / "plans_3d_unlabeled"
    for place, cases in ((labelled, "abc"), (unlabelled, "xy")):
        place.mkdir()
        for case in cases:
            nnUNetDatasetBlosc2.save_case(IMAGE, SEGMENTATION, {}, str(place / case))
    for file in unlabelled.glob("*_seg.b2nd"):
        file.unlink()
    (unlabelled / "preprocessing.json").write_text(json.dumps(RECIPE))
    return labelled


def test_pool_is_the_list_and_the_folder(folder):
    pool = find_pool(folder, {"train": ["a"], "val": ["b"], "unlabeled": ["c"]}, 5, RECIPE)
    assert pool.identifiers == ["c", "x", "y"]
    for case in pool.identifiers:
        np.testing.assert_array_equal(pool.load_image(case)[:], IMAGE)


def test_listed_case_may_lie_in_the_folder_of_unlabelled_ones(folder):
    pool = find_pool(folder, {"train": ["a"], "val": ["b"], "unlabeled": ["x"]}, 5, RECIPE)
    assert pool.identifiers == ["x", "y"]


def test_memory_does_not_grow_with_the_pool(folder):
    pool = find_pool(folder, {"train": ["a"], "val": ["b"], "unlabeled": ["c"]}, 5, RECIPE)
    opened = [weakref.ref(pool.load_image(case)) for case in pool.identifiers]
    gc.collect()
    assert [image() for image in opened] == [None] * 3


@pytest.mark.parametrize("change", [{"spacing": [2.0, 1.0]}, None])
def test_cases_made_with_other_plans_are_an_error(folder, change):
    file = folder.with_name("plans_3d_unlabeled") / "preprocessing.json"
    file.write_text(json.dumps(change)) if change else file.unlink()
    with pytest.raises(UserError, match=r"plans_3d_unlabeled was preprocessed with other plans.*Delete that folder"):
        find_pool(folder, {"train": ["a"], "val": ["b"]}, 5, RECIPE)


def test_no_segmentation_is_needed(folder):
    (folder / "c_seg.b2nd").unlink()
    pool = find_pool(folder, {"train": ["a"], "val": ["b"], "unlabeled": ["c"]}, 5, RECIPE)
    np.testing.assert_array_equal(pool.load_image("c")[:], IMAGE)


def test_numpy_format(folder):
    for file in folder.glob("c*"):
        file.unlink()
    nnUNetDatasetNumpy.save_case(IMAGE, SEGMENTATION, {}, str(folder / "c"))
    fold = {"train": ["a"], "val": ["b"], "unlabeled": ["c"]}
    np.testing.assert_array_equal(find_pool(folder, fold, 5, RECIPE).load_image("c"), IMAGE)
    np.save(folder / "c.npy", 2 * IMAGE)  # unpacked: preferred
    np.testing.assert_array_equal(find_pool(folder, fold, 5, RECIPE).load_image("c"), 2 * IMAGE)


@pytest.mark.parametrize("missing", [".pkl", ".b2nd"])
def test_half_preprocessed_case_is_left_out(folder, missing):
    (folder.with_name("plans_3d_unlabeled") / f"y{missing}").unlink()
    assert find_pool(folder, {"train": ["a"], "val": ["b"]}, 5, RECIPE).identifiers == ["x"]


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("case", ["c", "x"])
def test_case_that_is_labelled_too_is_an_error(folder, part, case):
    fold = {"train": ["a"], "val": ["b"], "unlabeled": ["c"]}
    fold[part] = [*fold[part], case]
    remedy = "one of the two lists" if case == "c" else "delete its .b2nd and .pkl file in .*plans_3d_unlabeled"
    with pytest.raises(UserError, match=f"Fold 5 has {case} in {part} and among the unlabelled.*{remedy}"):
        find_pool(folder, fold, 5, RECIPE)


def test_unknown_case_is_an_error(folder):
    with pytest.raises(
        UserError,
        match=r"Fold 5 lists u, v, w and 1 more as unlabeled, but neither .*plans_3d nor .*plans_3d_unlabeled has",
    ):
        find_pool(folder, {"train": ["a"], "val": ["b"], "unlabeled": ["u", "v", "w", "z"]}, 5, RECIPE)


def test_empty_pool_is_an_error_that_names_both_ways_out(folder):
    for file in folder.with_name("plans_3d_unlabeled").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"no unlabelled case.*preprocess_unlabeled.*split"):
        find_pool(folder, {"train": ["a"], "val": ["b"]}, 5, RECIPE)
