"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a path beside `path` to write to; on success the written file takes the place of `path` in one step.

    A kill or an error while writing leaves `path` as it was. What a kill leaves behind is `<path>.part`, which the next
    writer overwrites and an error removes. One writer at a time.

    Yields:
        `<path>.part`, in the same folder, because only there a rename is atomic.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # half a file, if a kill left it
    try:
        yield str(part)
        if not part.exists():
            return  # nothing was written, nothing to replace
        with open(part, "r+b") as written:
            os.fsync(written.fileno())  # or a power failure could leave the new name with the old blocks
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
