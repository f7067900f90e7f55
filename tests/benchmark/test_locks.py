"""One run in a folder at a time, whoever was killed."""

import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
from workspace import wait_until

from nnunetv2_selfreg.benchmark import locks


def test_lock_is_waited_for_and_names_who_holds_it(tmp_path, capsys):
    entered = threading.Event()

    def second():
        with locks.locked(tmp_path / "lock"):
            entered.set()

    with locks.locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(1)
    assert entered.wait(30)
    thread.join()
    assert f"{tmp_path / 'lock'} is locked by another process" in capsys.readouterr().err


@pytest.mark.parametrize("note", ["{host} 1", "{host} 1 0.5", "elsewhere 1 2e10"])
def test_half_a_note_or_another_machines_or_an_older_one_is_not_waited_for(note, tmp_path, monkeypatch):
    (tmp_path / "lock").write_text(note.format(host=socket.gethostname()))
    monkeypatch.setattr(locks, "kill_group", lambda group: pytest.fail("a stranger's group is ended"))
    with locks.locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("leader_is_dead", [False, True])
def test_what_a_killed_process_left_behind_is_waited_for_and_its_workers_are_ended(leader_is_dead, tmp_path):
    """The leader of a group with a worker; a dead one stays a zombie, since nobody asks for its status."""
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    leader = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    worker = int(leader.stdout.readline())
    locks.Lock(tmp_path / "lock").works_under_it(leader.pid)
    if leader_is_dead:
        leader.kill()
        wait_until(lambda: psutil.Process(leader.pid).status() == psutil.STATUS_ZOMBIE, 20)
    entered = threading.Event()

    def second():
        with locks.locked(tmp_path / "lock"):
            entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    if not leader_is_dead:
        assert not entered.wait(1.5)
        leader.kill()
    assert entered.wait(20)
    thread.join()
    wait_until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, 20)
    leader.wait()


def test_lock_on_windows_is_tried_until_it_is_free(tmp_path, monkeypatch, capsys):
    """Its module is a stand-in here; what it locks is no part of the note."""
    refusals = [PermissionError(13, "Permission denied")] * 2

    def locking(descriptor, mode, length):
        if refusals:
            raise refusals.pop()

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    with locks.locked(tmp_path / "lock") as lock:
        lock.works_under_it(psutil.Process().pid)
        assert (tmp_path / "lock").read_text().split()[1] == str(psutil.Process().pid)
    assert not refusals
    assert capsys.readouterr().err.count("is locked by another process") == 1
    assert (tmp_path / "lock").read_text() == ""
