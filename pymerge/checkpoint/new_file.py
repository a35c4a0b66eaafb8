"""A file that gets its name only when it is complete, and a check beforehand that it can be
written.

Results of long work, such as statistics and measurements, are written this way: neither a full disk
nor a kill leaves half a file, or nothing, in place of an older one.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pymerge.checkpoint.files import exists, is_file, is_folder, open_regular
from pymerge.checkpoint.locks import is_locked, is_named
from pymerge.checkpoint.writer import translated
from pymerge.errors import OutputError

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FIRST = 4096  # bytes by which `check_own` knows a file


def check_place(path: Path) -> None:
    """OutputError, before the work, where no file can get this name. Makes the folder."""
    with translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as (temporary, _):  # only trying tells of each thing in the way
            if not os.access(temporary, os.R_OK):
                raise OutputError(
                    f"{path}: a new file may not be read by who makes it; set another umask"
                )
            temporary.unlink()  # as giving it its name will
        if not os.path.lexists(path):
            return
        folder, own = path.parent.stat(), path.lstat()
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, own.st_uid, folder.st_uid):
            raise OutputError(
                f"{path} belongs to another user and cannot be replaced; give another name"
            )


def check_own(path: Path, begins: re.Pattern[bytes], what: str) -> None:
    """OutputError, before the work, unless the name is free or that of a regular file whose first
    bytes match, as those of files of that kind do: nobody else's file is replaced.

    what: the content of such a file, in messages.
    """
    if path.name in ("", "..") or is_folder(path):
        raise OutputError(f"{path} is a folder; give the name of a file in it")
    if exists(path) and not _begins(path, begins):
        raise OutputError(
            f"{path} exists and holds no {what}; it is never replaced, give another name"
        )


def _begins(path: Path, pattern: re.Pattern[bytes]) -> bool:
    if not is_file(path):
        return False
    try:
        with open_regular(path) as file:
            return pattern.match(file.read(_FIRST)) is not None
    except OSError:  # which cannot be read
        return False


@contextmanager
def file_beside(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in the folder of `path`, open for writing, for the body to rename. Under its own
    name it is gone at the end; those of processes that were killed go first.

    What OSErrors the body raises are reported as of `path` (DiskFullError, OutputError).
    """
    with translated(path):
        _check_no_device(path)
        _remove_leftovers(path)
        temporary, descriptor = _create(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield temporary, file
        finally:
            with suppress(OSError):  # the body is done, or its error is the one to tell
                temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write a small file, or replace it. DiskFullError, OutputError."""
    with file_beside(path) as (temporary, file):
        file.write(content)
        file.flush()
        temporary.replace(path)


def _check_no_device(path: Path) -> None:
    """/dev/null, a pipe or a socket would be a file afterwards."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
        raise OutputError(f"{path} is a device, a pipe or a socket; give the name of a file")


def _create(path: Path) -> tuple[Path, int]:
    """A new file under a name that nobody can guess, take or turn into a link beforehand. It is
    locked as long as it is open, which tells it from a leftover.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, _NEW, 0o666)
        # Another process may have taken it for a leftover before it was locked.
        if is_locked(descriptor) and is_named(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this user left of `path`. Where files cannot be locked, it
    stays.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
        for leftover in found:
            with suppress(OSError):
                _remove_leftover(leftover)


def _remove_leftover(path: Path) -> None:
    descriptor = os.open(path, _OLD)
    try:
        status = os.fstat(descriptor)
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if own and is_locked(descriptor, unknown=False) and is_named(descriptor, path):
            path.unlink()
    finally:
        os.close(descriptor)
