"""What the scripts do with nnU-Net: run its commands, and derive a small configuration from a planned one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json, save_json

from nnunetv2_selfreg.files import replacing


class ExitStatusError(RuntimeError):
    """A command ended with an error; the message has the end of what it printed."""


def call(
    *command: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], object] = lambda _: None,
    keep_open: Sequence[int] = (),
) -> int:
    """Runs a command of this Python environment, its output appended to `log`.

    Args:
        command: program and arguments.
        log: is written line by line, so that a run can be followed and a killed one leaves what it said.
        environment: variables of the command; default: those of this process.
        on_line: is given each line of the output.
        keep_open: descriptors that the command inherits.

    Returns:
        The most memory that the command or one of its ended subprocesses had at once, in bytes.

    Raises:
        ExitStatusError: its status is not 0.
    """
    program = str(Path(sys.executable).with_name(command[0]))
    variables = {**(os.environ if environment is None else environment), "PYTHONUNBUFFERED": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    text = {"text": True, "errors": "replace"}
    with log.open("a") as file:
        begin = file.tell()
        process = subprocess.Popen([program, *command[1:]], env=variables, pass_fds=keep_open, **streams, **text)
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                on_line(line)
        except BaseException:  # a full disk, Ctrl-C: nobody would read what it prints
            process.kill()
            raise
        finally:
            process.stdout.close()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        with log.open() as file:
            file.seek(begin)
            end = "".join(file.readlines()[-15:])
        raise ExitStatusError(
            f"{shlex.join(command)} failed with status {process.returncode}; the end of {log}:\n{end}"
        )
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_configuration(plans_file: Path, name: str, base: str, settings: dict, architecture: dict) -> None:
    """Adds a configuration to plans: that of `base` with other settings and other arguments of its architecture.

    Raises:
        ValueError: the plans have a configuration of that name with other content.
    """
    plans = load_json(str(plans_file))
    planned = plans["configurations"][base]["architecture"]
    merged = {**planned, "arch_kwargs": {**planned["arch_kwargs"], **architecture}}
    configuration = {"inherits_from": base, **settings, "architecture": merged}
    existing = plans["configurations"].get(name)
    if existing == configuration:
        return
    if existing is not None:
        raise ValueError(f"{plans_file} has a configuration {name} with other content: rename or remove it there")
    plans["configurations"][name] = configuration
    with replacing(plans_file) as part:
        save_json(plans, part, sort_keys=False)
