"""`nnUNetv2_selfreg preprocess_unlabeled`."""

import gzip
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blosc2
import numpy as np
import phantom
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, load_pickle, save_json
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from workspace import SHAPE

from nnunetv2_selfreg import cli
from nnunetv2_selfreg.data import images, preprocessing
from nnunetv2_selfreg.data.views import outside_of_body

GOOD = ("new_000", "new_001")
BAD = {
    "truncated": "truncated_0000.nii.gz is damaged: ",
    "text": "text_0000.nii.gz is damaged: ",
    "no_image": "no_image_0000.nii.gz is damaged: ",
    "not_finite": "2 values are NaN or infinite",
    "flat": "the data set is 3D, the image is not",
    "unnumbered.nii.gz": "expected unnumbered_0000.nii.gz",
    "late": "channel 0 is missing (late_0000.nii.gz). The last four digits are the channel: if each file is a case of",
    "gap": "look like 2 channels of one case, and the data set has 1 (MRI)",
    "pair": "if each file is a case of its own, its name is pair_0000_0000.nii.gz",
    "black": "all of its voxels have the value 0",
    "tiny": "it is too small: ",
    "series": "it has 2 channels, the data set 1 (MRI): each is a file, and so is each image of a series",
    "dangling": "dangling_0000.nii.gz is a link to a file that is not there",
    "unequal": "look like 2 channels of one case",
    "phantom_000": "a labelled case of the data set has this identifier",
}
"""What is wrong with each bad case of `write_bad`."""


def write(file: Path, image: np.ndarray) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(image), str(file), useCompression=True)


def write_good(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, case in enumerate(GOOD):
        image, _ = phantom.phantom(50 + number, SHAPE)
        write(folder / f"{case}_0000.nii.gz", image)


def write_bad(folder: Path) -> None:
    image, _ = phantom.phantom(60, SHAPE)
    whole = folder / "phantom_000_0000.nii.gz"
    write(whole, image)
    for name in ("unnumbered", "late_0001", "gap_0000", "gap_0002", "pair_0000", "pair_0001", "unequal_0000"):
        shutil.copy(whole, folder / f"{name}.nii.gz")
    write(folder / "unequal_0001.nii.gz", image[1:])
    write(folder / "flat_0000.nii.gz", image[:1])
    write(folder / "black_0000.nii.gz", np.zeros_like(image))
    write(folder / "tiny_0000.nii.gz", image[8:10, 12:14, 12:14])
    sitk.WriteImage(
        sitk.GetImageFromArray(np.stack([image, image]), isVector=False), str(folder / "series_0000.nii.gz")
    )
    (folder / "dangling_0000.nii.gz").symlink_to("not_fetched.nii.gz")
    (folder / "truncated_0000.nii.gz").write_bytes(whole.read_bytes()[:-5000])
    (folder / "text_0000.nii.gz").write_text("not an image")
    (folder / "no_image_0000.nii.gz").write_bytes(gzip.compress(b"no image"))
    image[0, 0, :2] = np.nan, np.inf
    write(folder / "not_finite_0000.nii.gz", image)


@pytest.fixture
def workspace(data_sets, tmp_path, monkeypatch):
    """A copy of a preprocessed data set, its labelled part, and two images without labels in its raw folder."""
    name = data_sets.name("labels")
    source = Path(os.environ["nnUNet_preprocessed"]) / name
    shutil.copytree(source, tmp_path / "preprocessed" / name, ignore=shutil.ignore_patterns("*_unlabeled"))
    write_good(tmp_path / "raw" / name / "imagesUn")
    for folder in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{folder}", str(tmp_path / folder))
    return Workspace(tmp_path, name)


class Workspace:
    """Where things are."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.images = root / "raw" / name / "imagesUn"
        self.preprocessed = root / "preprocessed" / name

    def folder(self, configuration: str) -> Path:
        return self.preprocessed / f"nnUNetPlans_{configuration}_unlabeled"

    def run(self, *options: str, configurations: tuple[str, ...] = ("2d",)) -> int:
        return cli.main(["preprocess_unlabeled", "-d", self.name, "-c", *configurations, *options])


@pytest.fixture
def in_process(monkeypatch):
    """A thread instead of processes, which take seconds to start."""
    monkeypatch.setattr(preprocessing, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


FILES = sorted([*(f"{case}.{ending}" for case in GOOD for ending in ("b2nd", "pkl")), "preprocessing.json"])


def test_images_as_nnunet_preprocesses_them_in_two_processes(workspace, capsys):
    assert workspace.run("-np", "2", configurations=("2d", "3d_fullres", "3d_cascade_fullres")) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("2 cases preprocessed, 0 were there, 0 rejected")
    assert "2/2" in printed.err  # the progress bar
    plans = PlansManager(str(workspace.preprocessed / "nnUNetPlans.json"))
    for name in ("2d", "3d_fullres"):
        assert names(workspace.folder(name)) == FILES
        assert str(workspace.folder(name)) in printed.out
        configuration = plans.get_configuration(name)
        for case in GOOD:
            expected, _, properties = configuration.preprocessor_class(verbose=False).run_case(
                [str(workspace.images / f"{case}_0000.nii.gz")],
                None,
                plans,
                configuration,
                str(workspace.preprocessed / "dataset.json"),
            )
            stored = blosc2.open(str(workspace.folder(name) / f"{case}.b2nd"), mode="r")
            assert stored.dtype == np.float32
            np.testing.assert_array_equal(stored[:], expected)
            assert (stored.blocks, stored.chunks) == comp_blosc2_params(expected.shape, configuration.patch_size, 4)
            assert load_pickle(str(workspace.folder(name) / f"{case}.pkl")) == properties


def test_bad_cases_are_reported_and_the_good_ones_processed(workspace, capsys):
    write_bad(workspace.images)
    assert workspace.run("-np", "1") == 1
    printed = capsys.readouterr()
    assert f"2 cases preprocessed, 0 were there, {len(BAD)} rejected" in printed.out
    for case, reason in BAD.items():
        (line,) = (line for line in printed.err.splitlines() if line.startswith(f"{case}: "))
        assert reason in line
    assert names(workspace.folder("2d")) == FILES


def test_done_cases_are_skipped_and_interrupted_ones_done_again(workspace, in_process, capsys):
    assert workspace.run() == 0
    folder = workspace.folder("2d")
    whole = {name: (folder / name).stat().st_mtime_ns for name in names(folder)}
    assert workspace.run() == 0
    assert "0 cases preprocessed, 2 were there" in capsys.readouterr().out
    assert {name: (folder / name).stat().st_mtime_ns for name in names(folder)} == whole
    content = (folder / "new_001.b2nd").read_bytes()
    (folder / "new_001.pkl").rename(folder / "new_001.pkl.part")
    (folder / "new_001.b2nd").write_bytes(b"")
    (folder / "new_001.b2nd.part").write_bytes(content[:100])
    assert workspace.run() == 0
    assert "1 cases preprocessed, 1 were there" in capsys.readouterr().out
    assert (folder / "new_001.b2nd").read_bytes() == content
    assert names(folder) == FILES
    assert (folder / "new_000.b2nd").stat().st_mtime_ns == whole["new_000.b2nd"]


def test_overwrite_makes_all_again(workspace, in_process, capsys):
    assert workspace.run() == 0
    (workspace.images / "new_000_0000.nii.gz").replace(workspace.images / "new_001_0000.nii.gz")
    before = blosc2.open(str(workspace.folder("2d") / "new_001.b2nd"), mode="r")[:]
    assert workspace.run("--overwrite") == 0
    assert "1 cases preprocessed, 0 were there" in capsys.readouterr().out
    after = blosc2.open(str(workspace.folder("2d") / "new_001.b2nd"), mode="r")[:]
    assert not np.array_equal(before, after)


def test_only_the_missing_configuration_is_made(workspace, in_process):
    assert workspace.run() == 0
    before = (workspace.folder("2d") / "new_000.b2nd").stat().st_mtime_ns
    assert workspace.run(configurations=("2d", "3d_lowres")) == 0
    assert names(workspace.folder("3d_lowres")) == FILES
    assert (workspace.folder("2d") / "new_000.b2nd").stat().st_mtime_ns == before


def test_kill_between_the_files_leaves_no_old_properties(workspace, in_process, monkeypatch):
    assert workspace.run() == 0

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocessing, "write_pickle", kill)
    assert workspace.run("--overwrite") == 130
    assert "new_000.pkl" not in names(workspace.folder("2d"))


def test_folder_of_images_elsewhere(workspace, in_process, tmp_path):
    shutil.move(workspace.images, tmp_path / "elsewhere")
    assert workspace.run("-i", str(tmp_path / "elsewhere")) == 0
    assert names(workspace.folder("2d")) == FILES


class _Exit:
    """Ends the process that unpickles it, as the kernel does when memory runs out."""

    def __reduce__(self):
        return os._exit, (1,)


def test_case_that_its_worker_dies_of_is_named_and_the_others_are_done(workspace, capsys):
    job = preprocessing.prepare(workspace.preprocessed, ["2d"], "nnUNetPlans")
    job.begin()
    whole = {case: ([workspace.images / f"{case}_0000.nii.gz"], [workspace.folder("2d")]) for case in GOOD}
    deadly = {case: ([_Exit()], []) for case in ("deadly", "deadly_too")}
    outcome = preprocessing.Outcome([])
    preprocessing.run_all(job, {GOOD[0]: whole[GOOD[0]], **deadly, GOOD[1]: whole[GOOD[1]]}, 2, outcome)
    assert outcome.done == 2
    assert set(outcome.rejected) == set(deadly)
    assert "deadly: its worker process died" in capsys.readouterr().err
    assert names(workspace.folder("2d")) == FILES


def test_cases_of_other_plans_are_not_taken_for_done(workspace, in_process, capsys):
    assert workspace.run() == 0
    (workspace.folder("2d") / "gone.pkl").touch()
    plans = workspace.preprocessed / "nnUNetPlans.json"
    content = load_json(str(plans))
    content["configurations"]["2d"]["spacing"] = [3.0, 3.0]
    save_json(content, str(plans))
    capsys.readouterr()
    assert_error(capsys, workspace.run(), "nnUNetPlans_2d_unlabeled was made with other plans than nnUNetPlans are now")
    assert_error(capsys, workspace.run("--overwrite"), "Delete that folder")
    assert (workspace.folder("2d") / "gone.pkl").exists()
    shutil.rmtree(workspace.folder("2d"))
    assert workspace.run() == 0
    assert names(workspace.folder("2d")) == FILES


def test_warnings_of_the_reader_are_passed_on(workspace, capsys):
    """As about channels that do not lie on each other."""
    description = workspace.preprocessed / "dataset.json"
    content = load_json(str(description))
    content["modality"] = {**content.pop("channel_names"), "1": "T2"}  # nnU-Net 1 called it so
    plans = workspace.preprocessed / "nnUNetPlans.json"
    job = preprocessing.Preprocessing(PlansManager(str(plans)), content, {})
    first = workspace.images / f"{GOOD[0]}_0000.nii.gz"
    image = sitk.ReadImage(str(first))
    image.SetOrigin((50, 0, 0))
    second = first.with_name(f"{GOOD[0]}_0001.nii.gz")
    sitk.WriteImage(image, str(second))
    job.read([str(first), str(second)])
    assert f"{first.name}: WARNING! Not all input images have the same origin" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [0.7, 1.25])
def test_stored_image_tells_where_nnunet_masks(workspace, factor):
    """After nnU-Net's own resampling, with a mask for one of two channels."""
    body = sum(g**2 for g in np.meshgrid(*[np.linspace(-1.1, 1.1, n) for n in (20, 30, 30)], indexing="ij")) < 1
    image = np.where(body, np.random.default_rng(0).normal(1, 0.5, (2, *body.shape)), 0)
    configuration = PlansManager(str(workspace.preprocessed / "nnUNetPlans.json")).get_configuration("3d_fullres")
    geometry = [round(n * factor) for n in body.shape], [1.0] * 3, [1 / factor] * 3
    resampled = configuration.resampling_fn_data(image, *geometry)
    segmentation = configuration.resampling_fn_seg(body[None] - 1, *geometry)
    outside = segmentation[0] < 0
    assert (resampled[:, outside] != 0).any(1).all()
    untouched = resampled[1].copy()
    guessed = outside_of_body(torch.from_numpy(resampled))[0].numpy() < 0
    assert guessed[outside].mean() > 0.75  # the rest are neighbours of the body
    assert guessed[~outside].mean() < 0.02

    preprocessing.mask_outside(resampled, segmentation, [True, False])
    np.testing.assert_array_equal(resampled[1], untouched)
    told = outside_of_body(torch.from_numpy(resampled[:1]))[0].numpy() < 0
    assert told[outside].all()
    assert told[~outside].mean() < 0.02


def test_masked_channels_are_stored_masked(workspace, in_process):
    plans = workspace.preprocessed / "nnUNetPlans.json"
    content = load_json(str(plans))
    content["configurations"]["2d"]["use_mask_for_norm"] = [True]
    save_json(content, str(plans))
    file = workspace.images / "new_000_0000.nii.gz"
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    image[:, :6, :6] = 0
    write(file, image)
    assert workspace.run() == 0
    manager = PlansManager(content)
    configuration = manager.get_configuration("2d")
    description = str(workspace.preprocessed / "dataset.json")
    expected, body, _ = configuration.preprocessor_class(verbose=False).run_case(
        [str(file)], None, manager, configuration, description
    )
    outside = body < 0
    assert outside.any()
    stored = blosc2.open(str(workspace.folder("2d") / "new_000.b2nd"), mode="r")[:]
    np.testing.assert_array_equal(stored, np.where(outside, 0, expected))


def _leave_a_worker():
    def work():
        preprocessing.end_with_parent()
        time.sleep(60)

    multiprocessing.get_context("fork").Process(target=work).start()
    os._exit(1)


def test_worker_ends_when_the_command_is_killed():
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    fork.Process(target=_leave_a_worker).start()
    writer.close()  # the worker has the last one
    assert reader.poll(20)
    with pytest.raises(EOFError):
        reader.recv()


def test_interrupt_is_one_line_and_the_same_command_goes_on(workspace):
    """Ctrl-C of a terminal reaches the workers too."""
    command = [sys.executable, "-m", "nnunetv2_selfreg.cli", "preprocess_unlabeled", "-d", workspace.name, "-c", "2d"]
    # As a terminal starts it: where the tests run in the background, interrupts are ignored.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heeding) as process:
        said = ""
        while "Preprocessing:   0%" not in said:
            more = process.stderr.read(1)
            assert more, said
            said += more
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        "nnUNetv2_selfreg: interrupted. Finished cases are kept: the same command goes on with the others."
    )
    assert workspace.run() == 0
    assert names(workspace.folder("2d")) == FILES


def test_full_disk_ends_the_command(workspace, in_process, monkeypatch, capsys):
    def fail(*_, urlpath, **__):
        Path(urlpath).write_bytes(b"half")
        raise RuntimeError("Error while creating the NDArray")

    monkeypatch.setattr(blosc2, "asarray", fail)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - 1, 1))
    assert workspace.run() == 2
    said = capsys.readouterr().err.splitlines()[-1]
    reason = r"could not be written: No space left on device .* Make room\."
    assert re.fullmatch(rf"nnUNetv2_selfreg: .*/new_00[01]\.b2nd {reason}", said)


def test_error_of_the_preprocessor_is_the_reason(workspace, in_process, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(preprocessing, "store", fail)
    assert workspace.run() == 2
    assert "new_000: MemoryError: too large" in capsys.readouterr().err


def test_no_usable_image(workspace, capsys):
    for case in GOOD:
        (workspace.images / f"{case}_0000.nii.gz").rename(workspace.images / f"{case}.nii.gz")
    assert workspace.run() == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith("new_000.nii.gz: the name has no channel number")
    assert "No image is usable" in printed[-1]
    assert not workspace.folder("2d").exists()


def test_values_of_other_formats_are_checked_too():
    with pytest.raises(images.BadImageError, match="1 values are NaN"):
        images.check_image(np.array([[[[1, np.inf]]]]), ["T1"], True)


SAGITTAL = (2, 0, 1)  # the order of axes where slices lie along the last one


@pytest.mark.parametrize(
    ("shape", "is_2d", "axes"),
    [((2, 1, 8, 8), True, (0, 1, 2)), ((2, 8, 8, 8), False, (0, 1, 2)), ((2, 8, 8, 1), True, SAGITTAL)],
)
def test_image_that_fits_its_data_set(shape, is_2d, axes):
    images.check_image(np.arange(np.prod(shape)).reshape(shape), ["T1", "T2"], is_2d, axes)


@pytest.mark.parametrize(("channels", "fits"), [([0, 0], False), ([3, -2], False), ([0, None], True)])
def test_image_of_nothing_but_one_value_is_refused_unless_another_channel_has_more(channels, fits):
    image = np.arange(2 * 64.0).reshape(2, 4, 4, 4)
    for channel, value in zip(image, channels, strict=True):
        if value is not None:
            channel[:] = value
    if fits:
        images.check_image(image, ["T1", "T2"], False)
        return
    with pytest.raises(images.BadImageError, match=f"all of its voxels have the value {channels[0]}: "):
        images.check_image(image, ["T1", "T2"], False)


@pytest.mark.parametrize(
    ("shape", "is_2d", "reason"),
    [
        ((1, 8, 8, 8), False, r"the data set 2 \(T1, T2\)"),
        ((2, 8, 8, 8), True, "the data set is 2D"),
        ((2, 1, 8, 8), False, "the data set is 3D"),
        ((2, 8, 8, 1), False, "the data set is 3D"),
        ((2, 8, 8, 1), True, "the data set is 2D"),
    ],
)
def test_image_that_does_not_fit_its_data_set(shape, is_2d, reason):
    with pytest.raises(images.BadImageError, match=reason):
        images.check_image(np.zeros(shape), ["T1", "T2"], is_2d)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-p", "MyPlans"], "MyPlans.json does not exist. Give -p"),
        (["-c", "4d"], "-c 4d: "),
        (["-c", "2d", "3d_fullres"], "nnUNetPlans_3d_fullres does not exist: -c 3d_fullres was never preprocessed"),
        (["-d", "Dataset900_Missing"], "There is no data set Dataset900_Missing in "),
        (["-d", "900"], "There is no data set 900 in "),
        (["-i", "/missing"], "/missing is no folder"),
        (["-np", "0"], "-np 0"),
        (["-np", "-1"], "-np -1"),
    ],
)
def test_wrong_argument_is_one_line_and_writes_nothing(workspace, capsys, options, reason):
    shutil.rmtree(workspace.preprocessed / "nnUNetPlans_3d_fullres")
    assert_error(capsys, workspace.run(*options), reason)
    assert not list(workspace.preprocessed.glob("*_unlabeled"))


def test_folder_without_images(workspace, capsys):
    shutil.rmtree(workspace.images)
    assert_error(capsys, workspace.run(), f"{workspace.images} is no folder")
    workspace.images.mkdir()
    (workspace.images / "new_0000.mha").touch()
    assert_error(capsys, workspace.run(), f"{workspace.images} has no images that end in .nii.gz")


def test_raw_folder_that_is_not_set(workspace, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert_error(capsys, workspace.run(), "nnUNet_raw is not set")


def test_plans_that_are_not_json(workspace, capsys):
    (workspace.preprocessed / "nnUNetPlans.json").write_text("{")
    assert_error(capsys, workspace.run(), "nnUNetPlans.json is not JSON")


def assert_error(capsys, status: int, reason: str) -> None:
    printed = capsys.readouterr()
    assert status == 2
    assert reason in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
