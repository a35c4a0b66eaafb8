"""The output folder: nothing under the final name until it is whole, and what is needed to resume.

The result grows in a hidden sibling, `.NAME.pymerge-partial`, locked against a second merge of the same name,
and gets its name by one rename. Renames are atomic against crashes of the process; files are not forced to
the disk (a power failure may lose the last seconds; the hashes in the manifest tell).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pymerge.checkpoint.writer import translated
from pymerge.errors import DiskFullError, OutputError

MANIFEST = "pymerge_manifest.json"
_LOCK = ".lock"
_RENAME_EXCHANGE = 2
_MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json", MANIFEST)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.pymerge-partial")


def can_resume(out: Path) -> bool:
    """Whether an interrupted merge into `out` has finished files."""
    return (_partial(out.expanduser().resolve()) / MANIFEST).is_file()


class OutputFolder:
    """Checks the final name, then owns the partial folder between `open` and `publish` or `discard`."""

    def __init__(self, out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
        """Raises OutputError where `out` must not be written; touches nothing."""
        self.out = out.expanduser().resolve()
        if not self.out.name:
            raise OutputError(
                f"output {self.out} is the root of the file system; give a folder's name"
            )
        self.partial = _partial(self.out)
        self._lock_fd = -1
        problems = []
        told: set[Path] = set()
        for path in inputs:
            source = path.resolve()
            if not told.isdisjoint(path.parents):
                continue  # the folder that it lies in says it all
            if source == self.out or self.out in source.parents or source in self.out.parents:
                told.add(path)
                problems.append(
                    f"output {self.out} is, holds or lies in the input {path}; write elsewhere"
                )
        if not problems and self.out.exists():
            problems.extend(self._occupied(overwrite))
        if problems:
            raise OutputError(problems)

    def _occupied(self, overwrite: bool) -> list[str]:
        if not self.out.is_dir():
            return [f"output {self.out} exists and is not a folder; give another name"]
        if not any(self.out.iterdir()):
            return []
        if not overwrite:
            return [
                f"output {self.out} is not empty; give another name, or overwrite it (overwrite=True, --overwrite)"
            ]
        if not any(any(self.out.glob(pattern)) for pattern in _MODEL_FILES):
            return [
                f"output {self.out} is not a model folder and is not overwritten; give another name"
            ]
        return []

    def check_space(self, needed: int) -> None:
        """Raise DiskFullError where the file system has less room than `needed` plus what is there already.

        OutputError where there can be no folder at all. A file system that tells no size is not asked.
        """
        folder = self.partial.parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise OutputError(
                f"output {self.out} would lie in {folder}, which is not a folder; write elsewhere"
            )
        space = os.statvfs(folder)
        if not space.f_blocks:
            return
        free = space.f_bavail * space.f_frsize
        if self.partial.is_dir():
            free += sum(path.stat().st_blocks * 512 for path in self.partial.iterdir())
        if needed > free:
            raise DiskFullError(
                f"output {self.out} takes {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; "
                "free some space or write elsewhere"
            )

    def open(self) -> None:
        """Create or take over the partial folder. Raises OutputError where another merge holds it."""
        with translated(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            while True:
                self.partial.mkdir(exist_ok=True)
                lock = self.partial / _LOCK
                try:
                    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                except FileNotFoundError:  # the other merge has just published
                    continue
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    raise OutputError(
                        f"another merge is writing {self.out} now; wait for it, or give another name"
                    ) from None
                if lock.exists() and os.path.samestat(os.fstat(fd), lock.stat()):
                    self._lock_fd = fd
                    return
                os.close(fd)

    def keep_only(self, names: Iterable[str]) -> None:
        """Delete all that an earlier merge left here, except these files."""
        kept = {*names, _LOCK}
        with translated(self.partial):
            for path in self.partial.iterdir():
                if path.name not in kept:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()

    def write_text(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""
        path = self.partial / name
        beside = self.partial / f".{Path(name).name}.new"
        with translated(path):
            path.parent.mkdir(exist_ok=True)
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)

    def publish(self) -> None:
        """Give the result its name. A folder that is there already is exchanged in one step where Linux can."""
        with translated(self.out):
            if self.out.is_dir() and any(self.out.iterdir()):
                self._replace()
            else:
                self.partial.rename(self.out)  # over an empty folder too
            # Only now, so that nobody could take the partial folder over before it was renamed.
            (self.out / _LOCK).unlink()
        self.close()

    def _replace(self) -> None:
        old = self.out.with_name(f".{self.out.name}.pymerge-old-{os.getpid()}")
        if _exchange(self.partial, self.out):
            self.partial.rename(old)
        else:
            self.out.rename(old)
            self.partial.rename(self.out)
        shutil.rmtree(old)

    def discard(self) -> None:
        """Delete the partial folder, for errors that a second try would meet again."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.close()

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _exchange(one: Path, other: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd = -100
    return bool(
        renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), _RENAME_EXCHANGE) == 0
    )
