"""nnU-Net's commands run from Python, and a small configuration derived from a planned one."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import BinaryIO

from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_selfreg.errors import UserError
from nnunetv2_selfreg.files import replacing

POLL_SECONDS = 0.2
# Without the current folder on the path, as in a script: a file in it may have the name of a module.
ENTRY_POINT = """
import sys
sys.path = [folder for folder in sys.path if folder]
from importlib.metadata import entry_points
sys.argv = sys.argv[1:]
(entry,) = entry_points(group="console_scripts", name=sys.argv[0])
sys.exit(entry.load()())
"""


class ExitStatusError(RuntimeError):
    """A command ended with an error; the message has the end of what it printed, `printed` all of it."""

    def __init__(self, message: str, printed: str) -> None:
        super().__init__(message)
        self.printed = printed


def call(
    *command: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    on_start: Callable[[int], object] = lambda _: None,
    on_line: Callable[[str], object] = lambda _: None,
) -> str:
    """Runs a command of this Python environment in a process group of its own, its output appended to `log`.

    The command writes to the file itself: it can be followed, a killed command leaves what it said, and nothing waits
    for worker processes that outlive it. They are ended with it.

    Args:
        command: program and arguments.
        log: is opened anew for this call.
        environment: variables of the command; default: those of this process.
        on_start: is given the process's number, which is the group's too.
        on_line: is given each line of the output, soon after it was written.

    Returns:
        What the command printed.

    Raises:
        ExitStatusError: its status is not 0.
    """
    variables = {**(os.environ if environment is None else environment), "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output, log.open("rb") as written:
        written.seek(0, os.SEEK_END)
        begin = written.tell()
        process = Popen(
            [*_program(command[0]), *command[1:]],
            env=variables,
            stdin=DEVNULL,
            stdout=output,
            stderr=STDOUT,
            start_new_session=True,
        )
        try:
            with _exit_on_sigterm():
                on_start(process.pid)
                running = True
                while running:
                    running = process.poll() is None
                    for line in _complete_lines(written, wait=running):
                        on_line(line)
        finally:
            kill_group(process.pid)
            process.kill()  # where there are no groups, as on Windows
            process.wait()
        written.seek(begin)
        printed = written.read().decode(errors="replace")
    if process.returncode != 0:
        end = "\n".join(printed.splitlines()[-15:])
        message = f"{shlex.join(command)} failed with status {process.returncode}; the end of {log}:\n{end}"
        raise ExitStatusError(message, printed)
    return printed


def _program(name: str) -> list[str]:
    """How a command of this Python environment is started: by its script beside the interpreter, or by its entry point
    where scripts lie elsewhere, as after `pip install --user`."""
    script = Path(sys.executable).with_name(name)
    return [str(script)] if script.is_file() else [sys.executable, "-c", ENTRY_POINT, name]


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit here, so that the group, which the signal does not reach, is ended too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complete_lines(written: BinaryIO, wait: bool) -> Iterator[str]:
    """The lines that were added to an open file; half a line is left for the next time."""
    if wait:
        time.sleep(POLL_SECONDS)
    while True:
        position = written.tell()
        line = written.readline()
        if not line.endswith(b"\n"):
            written.seek(position)
            return
        yield line.decode(errors="replace")


def kill_group(group: int) -> None:
    """Ends the processes of a group at once, if there are any, and if the system knows groups."""
    if not hasattr(os, "killpg"):
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter of a zombie on macOS
        os.killpg(group, signal.SIGKILL)


def add_configuration(plans_file: Path, name: str, base: str, settings: dict, architecture: dict) -> None:
    """Adds a configuration to plans: that of `base` with other settings and other arguments of its architecture.

    Raises:
        UserError: the plans have a configuration of that name with other content.
    """
    plans = load_json(str(plans_file))
    planned = PlansManager(plans).get_configuration(base).configuration["architecture"]  # it may inherit it
    merged = {**planned, "arch_kwargs": {**planned["arch_kwargs"], **architecture}}
    configuration = {"inherits_from": base, **settings, "architecture": merged}
    existing = plans["configurations"].get(name)
    if existing == configuration:
        return
    if existing is not None:
        raise UserError(f"{plans_file} has a configuration {name} with other content: rename or remove it there")
    plans["configurations"][name] = configuration
    with replacing(plans_file) as part:
        save_json(plans, part, sort_keys=False)
