"""What somebody may do to a file that is in use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def truncate(path: Path) -> None:
    os.truncate(path, 5000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def rewrite(path: Path) -> None:
    """Other values in the same inode, and the old times put back."""
    before = path.stat()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes(len(content) // 2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """By a rename, as careful programs write; size and times are the same."""
    beside = path.with_name("beside")
    shutil.copy2(path, beside)
    beside.replace(path)


def delete(path: Path) -> None:
    path.unlink()


def touch(path: Path) -> None:
    path.touch()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[Callable[[Path], None], str] = {
    truncate: r"was (truncated|made longer), from \d+ to 5000 bytes,",
    empty: r"was truncated, from \d+ to 0 bytes,",
    lengthen: r"was made longer, from \d+ to \d+ bytes,",
    rewrite: "was written to",
    replace: "was replaced by another file",
    delete: "was deleted or moved away",
    touch: "was written to or touched",
    pipe: "was (replaced|truncated)",  # a pipe may get the deleted file's inode
}
