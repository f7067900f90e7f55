"""Commands in a process group of their own, which end with what they have started."""

import subprocess
import sys

import psutil
import pytest
from workspace import wait_until

from nnunetv2_selfreg import __version__
from nnunetv2_selfreg.benchmark import commands


def test_command_ends_though_its_workers_live_and_they_end_with_it(tmp_path):
    """A killed nnU-Net leaves loading processes that hold its output."""
    worker = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()']).pid, flush=True)"
    lines = []
    with pytest.raises(commands.ExitStatusError, match="status -9"):
        commands.call(
            "python",
            "-c",
            worker + "; import os; os.kill(os.getpid(), 9)",
            log=tmp_path / "log.txt",
            on_line=lines.append,
        )
    wait_until(lambda: not psutil.pid_exists(int(lines[0])) or psutil.Process(int(lines[0])).status() == "zombie", 20)


def test_sigterm_ends_the_command_too(tmp_path):
    script = f"""
import pathlib; from nnunetv2_selfreg.benchmark import commands
commands.call("python", "-c", "import time; print('up', flush=True); time.sleep(600)",
              log=pathlib.Path({str(tmp_path / "log.txt")!r}), on_start=lambda process: print(process, flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as caller:
        process = int(caller.stdout.readline())
        wait_until(lambda: "up" in (tmp_path / "log.txt").read_text())
        caller.terminate()
        assert caller.wait(20) == 143
    assert not psutil.pid_exists(process)


def test_command_without_a_script_beside_the_interpreter_is_started_by_its_entry_point(tmp_path, monkeypatch):
    """As after `pip install --user`; the current folder has a module of the name of one of Python's."""
    interpreter = tmp_path / "bin" / "python"
    interpreter.parent.mkdir()
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    (tmp_path / "argparse.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    assert commands.call("nnUNetv2_selfreg", "--version", log=tmp_path / "log.txt").strip() == __version__
