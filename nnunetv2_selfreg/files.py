"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2_selfreg.errors import FullDiskError

EXTRA_STATE = "nnunetv2_selfreg"  # the key of our entries in nnU-Net's checkpoints
LITTLE_ROOM = 2**24  # bytes, less than any checkpoint
# What the system, nnU-Net's output and torch, which tells only that a write failed, say of it.
FULL_DISK = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a path beside `path` to write to; on success the written file takes the place of `path` in one step.

    A kill or an error while writing leaves `path` as it was. What a kill leaves behind is `<path>.part`, which the next
    writer overwrites and an error removes. One writer at a time.

    Yields:
        `<path>.part`, in the same folder, because only there a rename is atomic.

    Raises:
        FullDiskError: an error while writing is that of a full disk.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # half a file, if a kill left it
    try:
        with naming_a_full_disk(path):
            yield str(part)
            if not part.exists():
                return  # nothing was written, nothing to replace
            with open(part, "r+b") as written:
                os.fsync(written.fileno())  # or a power failure could leave the new name with the old blocks
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turns an error of a full disk while `path` is written into one that names it, and how much room there is.

    Raises:
        FullDiskError: that one.
    """
    try:
        yield
    except FullDiskError:
        raise
    except (OSError, RuntimeError) as error:  # the latter of torch and of blosc2, which does not tell why
        if not (says_full_disk(str(error)) or is_full(path, error)):
            raise
        free = shutil.disk_usage(existing_folder(path)).free / 2**20
        reason = f"No space left on device ({free:.0f} MiB free), or no quota"
        raise FullDiskError(f"{path} could not be written: {reason}. Make room.") from error


def says_full_disk(text: str) -> bool:
    """Whether an error's message or a command's output is that of a full disk."""
    return any(phrase in text for phrase in FULL_DISK)


def is_full(path: Path, error: Exception | None = None) -> bool:
    """Whether the disk of `path`, which need not exist, has no room, though `error` may not say so."""
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOSPC, errno.EDQUOT):
        return False
    usage = shutil.disk_usage(existing_folder(path))
    return usage.total > 0 and usage.free < LITTLE_ROOM  # /proc has no size at all


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def existing_folder(path: Path) -> Path:
    """The folder of `path`, or the nearest one above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
