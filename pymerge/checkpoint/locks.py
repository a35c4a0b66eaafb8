"""A folder for one run at a time, where several would take each other's files for leftovers.

The lock is on what is open itself, so that nothing is left of it, not even by a kill. Where the
file system has no such locks (some network file systems), nothing is locked.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pymerge.checkpoint import contents
from pymerge.checkpoint.writer import translated
from pymerge.errors import OutputError


@contextmanager
def held_alone(folder: Path, refusal: str) -> Iterator[None]:
    """The folder, made where it is missing, for the body alone. OutputError with `refusal` where
    somebody has it; DiskFullError and OutputError where it cannot be made.
    """
    fd = -1
    try:
        while fd < 0 or not is_named(fd, folder):  # its holder may remove it at its end
            if fd >= 0:
                os.close(fd)
                fd = -1
            with translated(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    fd = os.open(folder, contents.FOLDER)
            if fd >= 0:
                if not is_locked(fd):
                    raise OutputError(refusal)
        yield
    finally:
        if fd >= 0:
            with suppress(OSError):  # a process that was forked meanwhile has the folder open too
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def is_locked(fd: int, *, unknown: bool = True) -> bool:
    """Whether this open file or folder is locked now for who has it open, until it is closed; False
    where somebody else has the lock. unknown: the answer where the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unknown
    return True


def is_named(fd: int, path: Path) -> bool:
    """Whether what is open still has its name."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except OSError:
        return False
