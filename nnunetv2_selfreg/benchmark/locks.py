"""One run in a folder at a time, whoever was killed."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import psutil
from tqdm import tqdm

from nnunetv2_selfreg.benchmark.commands import kill_group

CLOCK_SECONDS = 5  # by which the time of a process's birth moves with the system's clock
POLL_SECONDS = 0.5
FAR = 2**30  # a position behind any note: nobody can read what is locked on Windows


class Lock:
    """A lock that this process holds, and names the process that works under it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def works_under_it(self, process: int) -> None:
        """Notes a process that may outlive this one: who takes the lock later waits for it."""
        self._file.write_text(f"{socket.gethostname()} {process} {psutil.Process(process).create_time()}")


@contextmanager
def locked(file: Path) -> Iterator[Lock]:
    """Waits until no other process holds the lock, nor works on under the lock of one that was killed.

    The system gives a killed process's lock free; what it had started lives on. Its workers would too, when that is
    killed in turn, so they are ended first.
    """
    with file.open("a+") as handle:
        if not _taken(handle):
            tqdm.write(f"{file} is locked by another process; waiting for it", file=sys.stderr)
            while not _taken(handle):
                time.sleep(POLL_SECONDS)
        _wait_for_what_was_left_behind(file)
        try:
            yield Lock(file)
        finally:
            file.write_text("")


def _taken(handle: TextIO) -> bool:
    """Locks an open file until it is closed, unless another process holds the lock."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return _taken_on_windows(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _taken_on_windows(handle: TextIO) -> bool:
    import msvcrt

    handle.seek(FAR)
    try:
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError:
        return False
    return True


def _wait_for_what_was_left_behind(file: Path) -> None:
    match file.read_text().split():
        case [host, number, birth] if host == socket.gethostname() and float(birth) > psutil.boot_time():
            process, created = int(number), float(birth)
        case _:  # nobody, or half of a note; another machine's, or of before this one started
            return
    try:
        leader = psutil.Process(process)
        if abs(leader.create_time() - created) > CLOCK_SECONDS:
            return  # the number is another's by now, so nothing of the old group is left
        if _works(leader):
            tqdm.write(f"process {process} was left behind and still works; waiting for it ({file})", file=sys.stderr)
        while _works(leader):
            time.sleep(POLL_SECONDS)
    except psutil.NoSuchProcess:
        pass  # its group may outlive it
    kill_group(process)


def _works(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
