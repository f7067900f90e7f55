"""The benchmark runs and its arithmetic is right; how long a step takes is not tested."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import step_time
import torch

from nnunetv2_selfreg.training.copy_paste import CopyPaste
from nnunetv2_selfreg.training.query_consistency import QueryConsistency
from nnunetv2_selfreg.training.semi_supervised import SemiSupervised


def test_table_of_stock_ours_and_the_straight_port(data_sets, tmp_path, monkeypatch, capsys):
    trainers = ["nnUNetTrainer", "nnUNetTrainerSelfReg", "nnUNetTrainerMeanTeacher", "nnUNetTrainerSelfRegStraightPort"]
    output = tmp_path / "table.json"
    arguments = [data_sets.name("labels"), "3d_fullres", "-tr", *trainers, "-device", "cpu", "--rounds", "3", "-b", "4"]
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "untouched"))
    trials = Path(step_time.__file__).parents[1] / "trials"
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([os.environ["nnUNet_extTrainer"], str(trials)]))
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments, "-o", str(output)])
    step_time.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["trainer"] for row in rows] == trainers
    assert rows[0]["ratio"] == rows[0]["memory_ratio"] == rows[0]["loading_ratio"] == 1
    assert all(row["seconds"] > 0 and row["memory_mib"] > 0 and row["loading_seconds"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| nnUNetTrainer") == 4
    assert not (tmp_path / "untouched").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dataset": "99"}, "There is no data set 99 in nnUNet_raw"),
        ({"configuration": "3d_fulres"}, "-c 3d_fulres: "),
        ({"-f": "99"}, "There is no fold 99: "),
        ({"-f": "first"}, "-f first is no fold"),
        (
            {"-tr": "nnUNetTrainerSelfreg"},
            "-tr nnUNetTrainerSelfreg: There is no trainer nnUNetTrainerSelfreg. Did you",
        ),
        ({"-p": "nnUNetPlan"}, "/Dataset901_labels/nnUNetPlan.json does not exist"),
        ({"-o": "/nowhere/table.json"}, "-o /nowhere/table.json: give a file in a folder that exists"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(changed, said, data_sets, monkeypatch, capsys):
    given = {"dataset": data_sets.name("labels"), "configuration": "2d", "-tr": "nnUNetTrainer", "-device": "cpu"}
    dataset, configuration, *options = ({**given, **changed}).items()
    arguments = [dataset[1], configuration[1], *(text for option in options for text in option)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments])
    monkeypatch.setattr(step_time, "build", None)
    with pytest.raises(SystemExit, match="2"):
        step_time.main()
    assert f"step_time.py: error: {said}" in capsys.readouterr().err.replace(os.environ["nnUNet_preprocessed"], "")


def test_ratio_is_taken_round_by_round():
    """The machine slows down threefold; the ratio of neighbours does not notice."""
    times = {"a": [1.0, 3.0, 3.0], "b": [1.5, 4.5, 4.5]}
    rows = step_time.summary(times, {"a": 100, "b": 110}, times)
    assert rows[1]["ratio"] == 1.5
    assert rows[1]["loading_ratio"] == 1.5
    assert rows[1]["seconds"] == 4.5
    assert rows[1]["memory_ratio"] == 1.1


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_half_of_the_samples_lose_their_labels_for_a_semi_supervised_trainer(deep_supervision):
    scales = [torch.arange(5.0).reshape(5, 1), torch.arange(5.0).reshape(5, 1) + 10]
    batch = {"data": torch.arange(5.0), "target": scales if deep_supervision else scales[0], "keys": list("abcde")}

    class Trainer(SemiSupervised):
        def labeled_stream(self, loader):
            return ({**labeled, "counted": len(labeled["keys"])} for labeled in loader)

    class CopyPasteTrainer(Trainer, CopyPaste):
        pass

    trainer = object.__new__(Trainer)
    trainer.enable_deep_supervision = deep_supervision
    mine = step_time.batch_for(trainer, batch)
    assert mine["counted"] == 3
    assert mine["keys"] == list("abcde")
    assert mine["data"].tolist() == [0, 1, 2, 3, 4]
    assert mine["data_weak"].tolist() == [3, 4]
    target = mine["target"] if deep_supervision else [mine["target"]]
    assert [scale.flatten().tolist() for scale in target] == [[0, 1, 2], [10, 11, 12]][: len(target)]
    pseudo = mine["pseudo_target"] if deep_supervision else [mine["pseudo_target"]]
    assert [scale.flatten().tolist() for scale in pseudo] == [[3, 4], [13, 14]][: len(pseudo)]
    stock = SimpleNamespace(enable_deep_supervision=deep_supervision)
    assert step_time.batch_for(stock, batch) is batch
    without = step_time.batch_for(SimpleNamespace(enable_deep_supervision=False), batch)
    assert without["target"] is scales[0]
    trainer = object.__new__(CopyPasteTrainer)
    trainer.enable_deep_supervision = deep_supervision
    # its network sees 3 labelled samples and one unlabelled one twice
    mine = step_time.batch_for(trainer, batch)
    assert mine["data"].tolist() == [0, 1, 2, 3]
    assert mine["data_weak"].tolist() == [3]
    assert len(mine["target"] if not deep_supervision else mine["target"][0]) == mine["counted"] == 3
    with pytest.raises(ValueError, match="2 samples are too few for CopyPasteTrainer: -b 3 at least"):
        step_time.batch_for(trainer, {**batch, "data": batch["data"][:2]})


def test_both_views_of_a_labelled_sample_are_counted():
    """Of five samples that the network may see, a labelled and an unlabelled one twice."""
    batch = {"data": torch.arange(5.0).reshape(5, 1, 1), "target": torch.zeros(5, 1, 1), "keys": list("abcde")}
    trainer = object.__new__(type("Trainer", (QueryConsistency,), {"enable_deep_supervision": False}))
    mine = step_time.batch_for(trainer, batch)
    assert {name: len(values) for name, values in mine.items()} == {
        "data": 2,
        "data_weak": 1,
        "labeled_weak": 1,
        "pseudo_target": 1,
        "target": 1,
        "keys": 2,
    }
    assert mine["labeled_weak"].shape == mine["data"][:1].shape
    with pytest.raises(ValueError, match="3 samples are too few for Trainer: -b 4 at least"):
        step_time.batch_for(trainer, {**batch, "data": batch["data"][:3]})
