"""Detects input files that change during a merge, by comparing what identifies them at the start
and later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pymerge.checkpoint.memory import is_remote
from pymerge.errors import OF_THE_PROCESS, CheckpointError


@dataclass(frozen=True)
class FileIdentity:
    """Identifies one version of a file without reading it. Times are in nanoseconds."""

    size: int
    modified: int  # of the content
    changed: int  # of the content, the times, links or permissions; no program can set it back
    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(
            status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino
        )

    @property
    def lasting(self) -> dict[str, int]:
        """The part that survives to another run: remounting or copying may change the rest."""
        return {"bytes": self.size, "modified_ns": self.modified}

    def what_changed(self, now: FileIdentity, *, remote: bool) -> str:
        """What changed, in words; "" for nothing. remote: on a file system whose inodes and change
        times are unreliable.
        """
        if not remote and (now.device, now.inode) != (self.device, self.inode):
            return "was replaced by another file"
        if what := self.content_changed(now):
            return what
        if not remote and now.changed != self.changed:
            return "was written to, linked or given other permissions"
        return ""

    def content_changed(self, now: FileIdentity) -> str:
        """As `what_changed` for an open file, whatever its name is by now."""
        if now.size != self.size:
            how = "truncated" if now.size < self.size else "made longer"
            return f"was {how}, from {self.size} to {now.size} bytes,"
        return "was written to or touched" if now.modified != self.modified else ""


class WatchedFile:
    """A file that must not change between opening and the end of the merge."""

    def __init__(self, path: Path) -> None:
        """Create it before reading the file. Raises CheckpointError where the file does not
        exist.
        """
        self.path = path
        try:
            self._at = path.absolute()  # wherever the working directory is later
            self.identity = FileIdentity.of(self._at.stat())
        except OSError as error:
            if error.errno in OF_THE_PROCESS:
                raise
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
        self._remote = is_remote(self._at)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the original file. CheckpointError where it changed or cannot be read."""
        try:
            # Not waiting for a writer, where the path leads to a pipe by now.
            fd = os.open(self._at, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise self.changed("was deleted or moved away") from None
        except OSError as error:
            raise self._unreadable(error) from None
        try:
            self._compare(os.fstat(fd))
            yield fd
        except OSError as error:
            raise self._unreadable(error) from None
        finally:
            os.close(fd)

    def check(self) -> None:
        """Raise CheckpointError where the file changed."""
        if self._remote:
            # Opening asks the server, whereas `stat` may be answered from a cache
            with self.opened():
                return
        try:
            status = self._at.stat()
        except FileNotFoundError:
            raise self.changed("was deleted or moved away") from None
        except OSError as error:
            raise self._unreadable(error) from None
        self._compare(status)

    def _compare(self, status: os.stat_result) -> None:
        what = self.identity.what_changed(FileIdentity.of(status), remote=self._remote)
        if what:
            raise self.changed(what)

    def changed(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {what} while it was in use, so that the result would mix two versions of"
            " it. Nothing was kept: merge again, and let nothing write to the inputs meanwhile"
        )

    def _unreadable(self, error: OSError) -> Exception:
        if error.errno in OF_THE_PROCESS:
            return error
        return CheckpointError(f"{self.path}: cannot be read ({error.strerror})")
