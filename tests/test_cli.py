"""`nnUNetv2_selfreg` from a checkout."""

import os
import re
import subprocess
import sys

import pytest

from nnunetv2_selfreg import __version__, cli, discovery


def test_trainers_of_a_checkout_are_found_through_the_variable(capsys):
    assert cli.main(["trainers"]) == 0
    printed = capsys.readouterr().out
    assert "nnUNetTrainerSelfReg " in printed
    assert "MICCAI 2024" in printed
    assert f"{discovery.trainers_folder()} ({discovery.VARIABLE} names it)" in printed


def test_what_to_export_where_they_are_not_found(capsys, monkeypatch):
    monkeypatch.delenv(discovery.VARIABLE)
    assert cli.main(["trainers"]) == 1
    printed = capsys.readouterr()
    assert "nnUNetTrainerSelfReg " in printed.out  # listed all the same
    assert f'export nnUNet_extTrainer="{discovery.trainers_folder()}"' in printed.err


def test_export_line_keeps_what_is_set(monkeypatch):
    monkeypatch.setenv(discovery.VARIABLE, "/mine")
    assert discovery.export_line() == f'export nnUNet_extTrainer="${{nnUNet_extTrainer}}:{discovery.trainers_folder()}"'


def test_another_copy_that_comes_first_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "nnUNetTrainerSelfReg.py").write_text(
        (discovery.trainers_folder() / "nnUNetTrainerSelfReg.py").read_text()
    )
    monkeypatch.setenv(discovery.VARIABLE, f"{tmp_path}{os.pathsep}{discovery.trainers_folder()}")
    assert cli.main(["trainers"]) == 0
    assert f"finds them in {tmp_path}" in capsys.readouterr().out


def test_own_trainers_are_listed_and_folders_that_are_not_there_named(capsys, monkeypatch, tmp_path):
    own = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n\n\n"
    (tmp_path / "own.py").write_text(f'{own}class nnUNetTrainerOfMine(nnUNetTrainer):\n    """What mine does."""\n')
    folders = [discovery.trainers_folder(), tmp_path, tmp_path / "typo"]
    monkeypatch.setenv(discovery.VARIABLE, os.pathsep.join(map(str, folders)))
    assert cli.main(["trainers"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"Others, in nnUNet_extTrainer:\nnnUNetTrainerOfMine +What mine does\.\n", printed.out)
    assert printed.err == f"nnUNet_extTrainer names {tmp_path / 'typo'}, and there is no such folder.\n"


@pytest.mark.parametrize("content", ["import a_package_that_is_not_there", "class nnUNetTrainerHalf("])
def test_file_that_cannot_be_imported_is_named(content, capsys, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text(content)
    monkeypatch.setenv(discovery.VARIABLE, f"{tmp_path}{os.pathsep}{discovery.trainers_folder()}")
    assert cli.main(["trainers"]) == 1
    error = capsys.readouterr().err
    reason = rf"\w+Error: .* \({tmp_path / 'broken.py'} cannot be imported\)"
    assert re.fullmatch(rf"nnU-Net does not find \w+, \w+, \w+ and \d+ more: {reason}\n", error)


def test_every_trainer_file_says_what_it_is():
    assert all(trainer.summary for trainer in discovery.list_trainers())


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_subcommand_is_required():
    with pytest.raises(SystemExit):
        cli.main([])


def test_help_does_not_wait_for_pytorch():
    imports = "import sys, nnunetv2_selfreg.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", imports], check=True)


def test_error_of_the_file_system_is_one_line(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "splits_final.json.part")

    monkeypatch.setattr("nnunetv2_selfreg.data.splits.append_fold", full)
    assert cli.main(["split", "-d", "2", "--labeled", "8"]) == 2
    printed = capsys.readouterr().err
    assert "No space left on device: 'splits_final.json.part'" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["preprocess_unlabeled", "-d", "2", "-c", "2d"], "Finished cases are kept: the same command goes on"),
        (["benchmark", "run", "-d", "2", "-c", "2d", "-o", "runs"], "Finished runs are kept: the same command goes on"),
        (["split", "-d", "2", "--labeled", "8"], "Nothing was changed."),
        (["preprocess_unlabeled", "-d", "2", "-c", "2d", "--overwrite"], "Each case is whole, as it was or made anew"),
    ],
)
def test_interrupt_says_what_is_kept(arguments, kept, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    for place in ("data.preprocessing.preprocess_unlabeled", "benchmark.runs.benchmark", "data.splits.append_fold"):
        monkeypatch.setattr(f"nnunetv2_selfreg.{place}", interrupted)
    assert cli.main(arguments) == 130
    printed = capsys.readouterr().err
    assert printed.startswith(f"nnUNetv2_selfreg: interrupted. {kept}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("subcommand", ["benchmark", "preprocess_unlabeled", "split", "trainers"])
def test_each_subcommand_explains_itself(subcommand, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([subcommand, "--help"])
    assert f"usage: nnUNetv2_selfreg {subcommand}" in capsys.readouterr().out
