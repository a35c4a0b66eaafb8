"""Files from elsewhere: opens regular files only, reads a bounded size, and parses JSON within a
bound on memory.

Every small file that a user names is opened here. Reading a pipe would wait for a writer that may
never come, opening a device can have side effects, and a JSON file of a few megabytes can expand to
gigabytes of Python objects.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from pymerge.errors import OF_THE_PROCESS, CheckpointError

_Found = TypeVar("_Found")

# Limits that no honest file exceeds.
MAX_CONFIG = 16 << 20  # the largest known configs have 1 to 2 MB
MAX_INDEX = 48 << 20  # 26 MB for 200,000 tensors
MAX_TOKENIZER = 128 << 20  # 33 MB for 262,000 tokens
MAX_DEPTH = 64
# Memory that a JSON file's objects may take, as a multiple of the limit on its size; below _SMALL
# bytes it is not limited.
_MEMORY = 6
_SMALL = 1 << 20
# The most bytes of memory that an object, a list and any other value take in Python 3.11.
_OBJECT, _LIST, _VALUE = 256, 112, 72
# Starts a character for which Python stores all of the text in 4 bytes each
_WIDE = re.compile(rb"[\xf0-\xf4]")
# There is no file of that name, and can be none.
_NO_SUCH_NAME = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
)
# Nor is there for this user one that a link leads to.
_NOT_THERE = (*_NO_SUCH_NAME, errno.EACCES, errno.EPERM)
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def exists(path: Path) -> bool:
    """Whether the name is taken, by a dangling link too: that is an error to report, not a missing
    file. CheckpointError where the system does not say.
    """
    return _asked(path, os.lstat, _NO_SUCH_NAME) is not None


def is_there(path: Path) -> bool:
    """The same, links followed; False of what may not be looked at."""
    return _asked(path, os.stat, _NOT_THERE) is not None


def is_folder(path: Path) -> bool:
    """Links followed; False of a name that there cannot be, and of what may not be looked at.
    CheckpointError where the system does not say.
    """
    status = _asked(path, os.stat, _NOT_THERE)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_file(path: Path) -> bool:
    """The same of a regular file."""
    status = _asked(path, os.stat, _NOT_THERE)
    return status is not None and stat.S_ISREG(status.st_mode)


def _asked(
    path: Path, ask: Callable[[Path], os.stat_result], absent: tuple[int, ...]
) -> os.stat_result | None:
    """What the system says of a path; None where it says that there is none. A file system that
    fails or went away says neither, and a file is not left out of a result for that.
    """
    try:
        return ask(path)
    except ValueError:  # no name at all
        return None
    except OSError as error:
        if error.errno in absent:
            return None
        raise CheckpointError(f"{path}: {_cannot_be_looked_at(error)}") from error


def _cannot_be_looked_at(error: OSError) -> str:
    return f"cannot be looked at ({error.strerror})"


def check_searchable(path: Path) -> None:
    """CheckpointError where the system denies access to a path or its content, which would
    otherwise seem to be missing.
    """
    try:
        (path / "config.json").stat()
    except PermissionError as error:
        raise CheckpointError(f"{path}: {_cannot_be_looked_at(error)}") from None
    except (OSError, ValueError):  # what is wrong with the path itself is told by who opens it
        pass


def stays_inside(name: str) -> bool:
    """Whether the name of a file that another file gives is plain and relative. The file itself may
    be a link, as in the hub's cache.
    """
    parts = PurePosixPath(name).parts
    suspicious = "\\" in name or "\0" in name or ":" in name
    return bool(parts) and not name.startswith("/") and ".." not in parts and not suspicious


class IrregularError(OSError):
    """The path is no regular file; `strerror` says what it is."""


def irregular(path: Path) -> str | None:
    """What a path is instead of a regular file, links followed, as a clause after "which"; else
    None.
    """
    try:
        _check(path)
    except (OSError, ValueError) as error:
        return reason(error)
    return None


def reason(error: OSError | ValueError) -> str:
    """Why something could not be opened or read, to be said after its name. Raises the error again
    where that is no fault of the file.
    """
    if isinstance(error, OSError) and error.errno in OF_THE_PROCESS:
        raise error
    if isinstance(error, IrregularError):
        return str(error.strerror)
    return f"cannot be opened ({getattr(error, 'strerror', None) or error})"


def _check(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        text = f"is a link to {path.readlink()}, which is not there"
        raise IrregularError(errno.ENOENT, text, str(path)) from None
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise IrregularError(errno.EINVAL, f"is {kind}, not a regular file", str(path))


class _Unwaited(io.FileIO):
    """A file opened without waiting, under a BufferedReader. Python's answer where there is nothing
    yet is None, which no reader expects; here it is an IrregularError.
    """

    def readinto(self, buffer: Any) -> int:
        return self._given(super().readinto(buffer))

    def readall(self) -> bytes:
        return self._given(super().readall())

    def _given(self, found: _Found | None) -> _Found:
        if found is None:
            raise IrregularError(errno.EAGAIN, "is not a regular file, but waits like a pipe", "")
        return found


def open_regular(path: Path) -> BinaryIO:
    """A regular file opened for reading, links followed. OSError with the reason for anything else,
    then or when it is read; never waits.

    Looked at before it is opened, since opening a device may be all that it takes, and again after.
    """
    _check(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IrregularError(errno.EINVAL, "is not a regular file", str(path))
    return io.BufferedReader(_Unwaited(fd))


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes, whatever its size claims. Raises
    OSError.
    """
    with open_regular(path) as file:
        content = file.read(min(limit, max(0, os.fstat(file.fileno()).st_size)) + 1)
        while len(content) <= limit and (more := file.read(limit + 1 - len(content))):
            content += more
    if len(content) > limit:
        text = f"has more than {limit} bytes, which no such file has"
        raise IrregularError(errno.EFBIG, text, str(path))
    return content


def read_file(path: Path, limit: int) -> bytes:
    """As `read_bounded`, but raises a CheckpointError that names the file."""
    try:
        return read_bounded(path, limit)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None


def read_json(
    path: Path, limit: int = MAX_CONFIG, *, unique: bool = False, remedy: str = "download it again"
) -> dict[str, Any]:
    """The object in a JSON file. unique: refuse repeated names. Raises CheckpointError."""
    return parse_object(read_file(path, limit), path, limit, unique=unique, remedy=remedy)


def parse_object(
    content: bytes,
    path: Path,
    limit: int = MAX_CONFIG,
    *,
    unique: bool = False,
    remedy: str = "download it again",
) -> dict[str, Any]:
    """The object in JSON text that came from `path`. Raises CheckpointError for malformed, too
    large or too deeply nested text.
    """
    if len(content) > limit or (len(content) > _SMALL and _memory(content) > _MEMORY * limit):
        raise CheckpointError(
            f"{path}: has JSON of {len(content)} bytes with more values than any such file, and is"
            f" not read; {remedy}"
        )
    try:
        value = json.loads(
            content.decode("utf-8-sig"), object_pairs_hook=_unique if unique else None
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not readable JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object; {remedy}")
    if _deep(value):
        raise CheckpointError(f"{path}: is nested deeper than {MAX_DEPTH} levels; {remedy}")
    return value


def _memory(content: bytes) -> int:
    """An upper bound on the memory of a JSON text's objects and of the text itself; measured to be
    1.1 to 4 times what they take.
    """
    width = 4 if _WIDE.search(content) else 2
    return (
        (width + 1) * len(content)
        + _OBJECT * content.count(b"{")
        + _LIST * content.count(b"[")
        + _VALUE * (content.count(b",") + content.count(b":"))
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:80]!r} is in it twice")
            seen.add(name)
    return found


def _deep(value: dict[str, Any]) -> bool:
    """Whether data is nested too deeply. Found level by level: writing, copying or comparing it
    later must not overflow the stack, and neither must this.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def as_json(content: Any) -> bytes:
    """JSON as it is written to a file. Half a surrogate pair, which UTF-8 cannot encode, stays an
    escape.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
