"""Checks the free space for a result before any work."""

from __future__ import annotations

import os
from pathlib import Path

from pymerge.errors import DiskFullError, OutputError

_EFFECTIVE = os.access in os.supports_effective_ids


def check_space(out: Path, partial: Path, needed: int) -> None:
    """Raise DiskFullError where the file system of `out` has less room than `needed` bytes. What
    lies in `partial`, the hidden folder, will be replaced and counts as room.

    OutputError where there can be no folder at all, OSError where the system does not tell. A file
    system that tells no size is not asked.
    """
    folder = partial.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(
            f"output {out} would lie in {folder}, which is not a folder; write elsewhere"
        )
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=_EFFECTIVE):
        raise OutputError(f"output {out}: you may not write to {folder}; write elsewhere")
    space = os.statvfs(folder)
    if not space.f_blocks:
        return
    free = space.f_bavail * space.f_frsize
    if partial.is_dir():
        free += sum(path.lstat().st_blocks * 512 for path in partial.iterdir())
    if needed > free:
        raise DiskFullError(
            f"output {out} takes {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; "
            "free some space or write elsewhere"
        )
