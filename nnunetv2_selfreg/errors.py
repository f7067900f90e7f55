"""What went wrong in the user's terms, and how a command ends then: with one line."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable
from types import TracebackType


class UserError(Exception):
    """A mistake that the user can mend: the message names the file or value and says what to do.

    The command line prints it as one line instead of a traceback, and so does nnU-Net's, see :func:`show_alone`.
    """


class SettingError(UserError, ValueError):
    """A value, of an attribute, a plan or a data set, that cannot be."""


class UnsupportedError(UserError, NotImplementedError):
    """What a method cannot do."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """An optional package is not installed, or too old."""


class DivergedError(UserError, FloatingPointError):
    """A loss is not finite."""


class FullDiskError(UserError, OSError):
    """A file could not be written, since its disk has no room."""


def one_line(error: BaseException) -> str:
    """The message without line breaks."""
    return " ".join(str(error).split())


def show_alone(log: str | None = None) -> None:
    """From now on a UserError that nobody catches ends this process with its message as the last line, without a
    traceback. nnU-Net's commands catch nothing: the line would stand below dozens of theirs.

    Args:
        log: a text file, to which the traceback is appended.
    """
    if isinstance(sys.excepthook, _Alone):
        sys.excepthook.log = log or sys.excepthook.log
    else:
        sys.excepthook = _Alone(sys.excepthook, log)


Hook = Callable[[type[BaseException], BaseException, "TracebackType | None"], object]


class _Alone:
    """A `sys.excepthook`, in the place of `previous`."""

    def __init__(self, previous: Hook, log: str | None) -> None:
        self.previous = previous
        self.log = log

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        is_users = issubclass(kind, UserError)
        if not is_users or self.previous is not sys.__excepthook__:  # as Weights & Biases', which notes the failure
            self.previous(kind, error, trace)
        if not is_users:
            return
        if self.log is not None:
            with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as file:
                traceback.print_exception(kind, error, trace, file=file)
        print("nnunetv2_selfreg:", one_line(error), file=sys.stderr, flush=True)
