"""Names of folders: which can be had, and how one takes the place of another."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from pymerge.errors import OutputError

_EXCHANGE = 2  # of renameat2


def resolved(out: Path) -> Path:
    """The folder that is meant; links are followed, and stay. Raises OutputError where there can be
    none.
    """
    try:
        found = out.expanduser().resolve()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            # As long as the longest name that is used.
            os.lstat(found.parent / f".{found.name}.pymerge-old-12345678")
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, a NUL
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"output {str(out)!r} cannot be a folder ({why}); give another name"
        ) from None
    if not found.name:
        raise OutputError(f"output {found} is the root of the file system; give a folder's name")
    return found


def is_mine(status: os.stat_result, parent: Path) -> bool:
    """Whether this user made it. Some network file systems give what root makes to another user: a
    new file tells.
    """
    if status.st_uid == os.geteuid():
        return True
    with suppress(OSError), tempfile.TemporaryFile(dir=parent) as file:
        return os.fstat(file.fileno()).st_uid == status.st_uid
    return False


def is_mount(path: Path) -> bool:
    """Also of a folder of the same file system, which `os.path.ismount` cannot tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    escaped = os.fsencode(path).replace(b"\\", rb"\134").replace(b" ", rb"\040")
    escaped = escaped.replace(b"\t", rb"\011").replace(b"\n", rb"\012")
    return any(line.split()[4] == escaped for line in lines)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where this system or file system cannot. Raises
    OSError.
    """
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
