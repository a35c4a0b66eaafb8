"""The path of an output folder: whether it may be written, and how a new folder replaces an old
one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pymerge.errors import OutputError

_EXCHANGE = 2  # of renameat2


def resolved(out: Path) -> Path:
    """The absolute path of the output folder, links followed. Raises OutputError where no folder
    can have that path.
    """
    try:
        found = out.expanduser().resolve()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            # Try the longest sibling name that a merge uses.
            os.lstat(found.parent / f".{found.name}.pymerge-old-12345678")
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, a NUL
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"output {str(out)!r} cannot be a folder ({why}); give another name"
        ) from None
    if not found.name:
        raise OutputError(f"output {found} is the root of the file system; give a folder's name")
    return found


def conflicts(out: Path, partial: Path, inputs: Iterable[Path]) -> list[str]:
    """A problem for each of `inputs` that a merge into `out`, made in `partial`, would overwrite.
    Folders are compared by device and inode as well as by path: a bind mount gives one folder
    several paths.
    """
    identities: dict[Path, tuple[int, int] | None] = {}

    def identity(path: Path) -> tuple[int, int] | None:
        if path not in identities:
            try:
                status = path.stat()
                identities[path] = (status.st_dev, status.st_ino) if status.st_ino else None
            except OSError:
                identities[path] = None
        return identities[path]

    def is_among(path: Path, others: Iterable[Path]) -> bool:
        own = identity(path)
        return any(path == each or (own is not None and own == identity(each)) for each in others)

    problems = []
    reported: set[Path] = set()
    for path in inputs:
        source = path.resolve()
        if not reported.isdisjoint(path.parents):
            continue  # its folder was reported already
        around = (source, *source.parents)
        if is_among(out, around) or is_among(source, out.parents):
            reported.add(path)
            problems.append(f"output {out} is, holds or lies in the input {path}; write elsewhere")
        elif is_among(partial, around):
            reported.add(path)
            problems.append(
                f"the input {path} lies in {partial}, where the result for {out} is to be made;"
                " move it"
            )
    return problems


def make_alike(fd: int, like: os.stat_result) -> None:
    """Give an open folder the owner, group and permissions of the one that it replaces, as far as
    the system allows.
    """
    status = os.fstat(fd)
    if (status.st_uid, status.st_gid) != (like.st_uid, like.st_gid):
        with suppress(OSError):
            os.fchown(fd, like.st_uid, like.st_gid)
    os.fchmod(fd, stat.S_IMODE(like.st_mode))


def is_mine(status: os.stat_result, parent: Path) -> bool:
    """Whether this user created it. Some network file systems assign what root creates to another
    user, so the owner of a new file in `parent` counts too.
    """
    if status.st_uid == os.geteuid():
        return True
    with suppress(OSError), tempfile.TemporaryFile(dir=parent) as file:
        return os.fstat(file.fileno()).st_uid == status.st_uid
    return False


def is_mount(path: Path) -> bool:
    """Whether a folder is a mount point; finds bind mounts within a file system, which
    `os.path.ismount` misses.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    escaped = os.fsencode(path).replace(b"\\", rb"\134").replace(b" ", rb"\040")
    escaped = escaped.replace(b"\t", rb"\011").replace(b"\n", rb"\012")
    return any(line.split()[4] == escaped for line in lines)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically; False where the system or file system cannot. Raises OSError."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd = -100
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def exchange_back(one: Path, other: Path, lock: str) -> None:
    """Undo the exchange of a result, in `one`, with what had its name. OutputError where that is
    impossible too: the result then has its name, and its lock goes.
    """
    try:
        exchange(one, other)
    except OSError as error:
        with suppress(OSError):
            (other / lock).unlink()
        raise OutputError(
            f"{other} has the result, but what was there before is in {one} and could not be moved"
            f" ({error.strerror}): delete it, or move it away to keep it, before the next merge"
            " into that name"
        ) from error
