"""Protocols: what their files say, and what they make of a data set."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from workspace import wait_until

from nnunetv2_selfreg.benchmark import commands, protocols
from nnunetv2_selfreg.benchmark.protocol import Protocol
from nnunetv2_selfreg.errors import UserError


@pytest.mark.parametrize("name", protocols.names())
def test_protocols_of_the_package_load_at_every_scale(name):
    scales = scales_of(name)
    assert {"cpu", "full"} <= set(scales)
    for scale in scales:
        loaded = Protocol.load(name, scale)
        assert loaded.device == ("cpu" if scale in ("cpu", "short", "long") else "cuda")
        assert bool(loaded.folds) != bool(loaded.split)


def scales_of(name: str) -> list[str]:
    content = load_json(str(protocols.FOLDER / f"{name}.json"))
    return list(content["scales"]) if "scales" in content else scales_of(content["inherits_from"])


@pytest.mark.parametrize("name", ["left-atrium-8", "left-atrium-16"])
def test_published_patch_of_the_left_atrium(name):
    """112x112x80, in nnU-Net's order of axes, and a network that it divides."""
    published = Protocol.load(name, "published")
    assert published.settings == {"batch_size": 2, "patch_size": [80, 112, 112]}
    assert published.epochs * published.iterations == 6000
    factors = torch.tensor(published.architecture["strides"]).prod(0)
    assert (torch.tensor(published.settings["patch_size"]) % factors == 0).all()
    lengths = {key: len(value) for key, value in published.architecture.items() if isinstance(value, list)}
    assert lengths.pop("n_conv_per_stage_decoder") == published.architecture["n_stages"] - 1
    assert set(lengths.values()) == {published.architecture["n_stages"]}


def own(folder, **content):
    file = folder / "mine.json"
    save_json(content, str(file))
    return file


SCALE = {"plans": "nnUNetPlans", "configuration": "2d", "epochs": 3, "iterations": 5}


def test_protocol_of_ones_own(tmp_path):
    scales = {"small": {**SCALE, "device": "cpu"}, "long": {"inherits_from": "small", "epochs": 30}}
    file = own(tmp_path, dataset="Dataset004_Hippocampus", folds=[1, 2], scales=scales)
    long = Protocol.read(file, "long")
    assert (long.name, long.epochs, long.iterations, long.device) == ("mine-long", 30, 5, "cpu")
    assert long.folds == [1, 2]


def test_protocol_of_ones_own_that_inherits_from_one_of_the_package_has_the_scales_of_both(tmp_path):
    scales = {"longer": {"inherits_from": "cpu", "epochs": 50}}
    file = own(tmp_path, inherits_from="hippocampus-2d-20", split={"labeled": 8}, scales=scales)
    longer, cpu = Protocol.read(file, "longer"), Protocol.load("hippocampus-2d", "cpu")
    assert longer.dataset == "Dataset004_Hippocampus"
    assert (longer.split, longer.epochs, longer.architecture) == ({"labeled": 8}, 50, cpu.architecture)
    assert Protocol.read(file, "full").epochs == 250


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scales": None}, "mine.json: a protocol, its 'scales' and each of these are JSON objects"),
        ({"scales": {"cpu": 3}}, "mine.json: a protocol, its 'scales' and each of these are JSON objects"),
        ({"scales": {}}, "mine.json has no 'scales'"),
        ({"scales": {"full": SCALE}}, "mine.json has no scale cpu; it has full. Name one of these."),
        ({"scales": {"cpu": {"inherits_from": "x"}}}, "mine.json has no scale x; it has "),
        ({"scales": {"cpu": {"inherits_from": "cpu"}}}, "mine.json has no scale cpu; it has "),
        (
            {"scales": {"cpu": {**SCALE, "epoch": 3}}},
            "mine.json, scale cpu: unknown are epoch. Known are dataset,",
        ),
        ({"scales": {"cpu": {"plans": "p", "epochs": 2}}}, "scale cpu lacks configuration, iterations. Add"),
        ({"scales": {"cpu": {**SCALE, "epochs": "3"}}}, "scale cpu: epochs is '3'. Give a whole number from 1."),
        ({"scales": {"cpu": {**SCALE, "iterations": 0}}}, "scale cpu: iterations is 0. Give a whole number from 1."),
        ({"name": "x"}, "unknown are name."),
        ({"folds": 0}, "folds is 0. Give a list in brackets."),
        ({"folds": ["0"]}, "'0' in folds is no number of a fold"),
        ({"folds": [0.5]}, "0.5 in folds is no number of a fold. Give whole ones from 0."),
        ({"folds": [True]}, "True in folds is no number of a fold"),
        ({"folds": [0], "split": {"labeled": 3}}, "folds and split exclude each other"),
        ({"scales": {"cpu": {**SCALE, "epochs": True}}}, "scale cpu: epochs is True. Give a whole number"),
        ({"scales": {"cpu": {"inherits_from": ["a"]}}}, "mine.json has no scale ['a']; it has "),
        ({"device": "gpu"}, "device is 'gpu'. Give cpu or cuda."),
        ({"settings": {"batch_size": 2}}, "settings would change nothing. Name a configuration as 'base'."),
        ({"split": {"labeled": 3, "valid": 2}}, "split: unknown are valid. Known are labeled, val, seed, in_order."),
        ({"split": {"val": 2}}, "split lacks labeled."),
        ({"dataset": "Hippocampus"}, "dataset is 'Hippocampus'. Write its whole name, as Dataset004_Hippocampus."),
        ({"inherits_from": "x"}, "mine.json: there is no protocol x; there are hippocampus,"),
    ],
)
def test_mistake_in_a_protocol_of_ones_own_is_named_with_the_file(change, reason, tmp_path):
    content = {"dataset": "Dataset004_Hippocampus", "scales": {"cpu": SCALE}}
    with pytest.raises(UserError) as error:
        Protocol.read(own(tmp_path, **{**content, **change}), "cpu")
    assert reason in str(error.value)


@pytest.mark.parametrize(("own_cases", "other"), [({"folds": [0, 1]}, "split"), ({"split": {"labeled": 3}}, "folds")])
def test_cases_of_ones_own_take_the_place_of_inherited_ones(own_cases, other, tmp_path):
    inherited = {"split": "left-atrium-8", "folds": "hippocampus"}[other]
    protocol = Protocol.read(own(tmp_path, inherits_from=inherited, scales={}, **own_cases), "cpu")
    assert not getattr(protocol, other)
    assert {name: getattr(protocol, name) for name in own_cases} == own_cases


def test_configuration_whose_architecture_is_inherited_can_be_a_base(tmp_path):
    file = tmp_path / "plans.json"
    network = {"network_class_name": "x", "arch_kwargs": {"features_per_stage": [32], "n_stages": 1}}
    configurations = {"3d_fullres": {"architecture": network}, "cascade": {"inherits_from": "3d_fullres"}}
    save_json({"configurations": configurations}, str(file))
    commands.add_configuration(file, "small", "cascade", {"batch_size": 2}, {"features_per_stage": [16]})
    made = load_json(str(file))["configurations"]["small"]
    assert made["inherits_from"] == "cascade"
    assert made["architecture"]["arch_kwargs"] == {"features_per_stage": [16], "n_stages": 1}


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "is no file"), ("{", "is not JSON"), ("[]", "JSON objects. Write them in braces.")]
)
def test_file_that_is_no_protocol_is_named(text, reason, tmp_path):
    if text is not None:
        (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.json.*{reason}"):
        Protocol.read(tmp_path / "mine.json", "cpu")


@pytest.mark.matrix
def test_half_preprocessed_folder_is_made_anew_only_if_it_was_begun_here(protocol, quick_commands, tmp_path):
    tiny = Protocol.load("tiny", "cpu")
    folder = tiny.folder / "nnUNetPlans_3d_fullres"
    first, second = load_json(str(tiny.folder / "splits_final.json"))[0]["val"]
    images, label = folder / f"{first}.pkl", tiny.folder / "gt_segmentations" / f"{second}.nii.gz"
    whole = label.read_bytes()
    images.unlink()
    os.truncate(label, 10)
    with pytest.raises(UserError, match=rf"lacks {first}, {second} \(of 2\). Run nnUNetv2_preprocess"):
        tiny.prepare(tmp_path / "log.txt")
    begun = tiny.folder / f"{folder.name}.preprocessing"
    begun.touch()
    images.touch()  # as a kill leaves it
    tiny.prepare(tmp_path / "log.txt")
    assert images.stat().st_size > 0
    assert label.read_bytes() == whole
    assert not begun.exists()


@pytest.mark.matrix
def test_killed_preparation_is_waited_for(protocol, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(protocol / "new"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner sets so many threads
    (protocol / "new").mkdir()
    file = str(protocol / "protocols" / "tiny.json")
    start = [sys.executable, "-m", "nnunetv2_selfreg.cli", "benchmark", "run", "--protocol", file, "--jobs"]
    start += ["-o", str(protocol / "runs")]
    first = subprocess.Popen(start)
    wait_until(lambda: any(file.read_text() for file in (protocol / "new").glob("*.lock")))
    (lock,) = (protocol / "new").glob("*.lock")
    left_behind = int(lock.read_text().split()[1])
    os.kill(left_behind, signal.SIGSTOP)  # so that it does not end before the second one comes
    first.send_signal(signal.SIGKILL)
    first.wait()
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True) as second:
        wait_until(lambda: "was left behind and still works" in second.stderr.readline())
        commands.kill_group(left_behind)
        threading.Thread(target=second.stderr.read).start()
        assert second.wait(timeout=240) == 0  # goes on where the killed ones stopped
