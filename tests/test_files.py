import errno
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from nnunetv2_selfreg.errors import FullDiskError
from nnunetv2_selfreg.files import is_full, replacing


def test_new_content_takes_the_place_in_one_step(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as part:
        with open(part, "w") as file:
            file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_written_replaces_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.part").write_text("half, left by a kill")
    with replacing(path):
        pass
    assert path.read_text() == "old"


def test_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fill_the_disk():
        with replacing(path) as part, open(part, "w") as file:
            file.write("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_is_named_with_its_room(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with replacing(path), open("/dev/full", "w") as full:
            full.write("new")

    with pytest.raises(FullDiskError, match=rf"^{path} could not be written: No space left .*\d+ MiB free.*\. Make"):
        write()
    assert path.read_text() == "old"


def test_error_that_does_not_tell_is_of_a_full_disk_where_there_is_no_room(tmp_path, monkeypatch):
    def write(error):
        with replacing(tmp_path / "file"):
            raise error

    with pytest.raises(RuntimeError, match=r"^unclear$"):
        write(RuntimeError("unclear"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - 1, 1))
    with pytest.raises(FullDiskError, match="0 MiB free"):
        write(RuntimeError("unclear"))
    with pytest.raises(PermissionError):
        write(PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert not is_full(tmp_path)


def _write_slowly(path):
    while True:
        with replacing(path) as part, open(part, "w") as file:
            for _ in range(1000):
                file.write("new " * 100)
                file.flush()


def test_kill_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for delay in (0.05, 0.1, 0.15):
        writer = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(path,))
        writer.start()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert path.read_text() in ("old", "new " * 100_000)
    assert set(os.listdir(tmp_path)) <= {"file", "file.part"}
