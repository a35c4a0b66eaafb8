"""The output folder: nothing has the final name until it is complete, and what is needed to resume
is kept.

The result is written to a hidden sibling, `.NAME.pymerge-partial`, locked against a second merge of
the same name, and gets its name by one rename. Renames are atomic if the process crashes; files are
not flushed to the disk (a power failure may lose the last seconds, which the hashes in the manifest
show).

Others may write to the folders that hold both names. So the hidden folder is held open and accessed
through its descriptor, and is reused or deleted only if a merge made it; at the end only the folder
that was checked at the start is replaced.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pymerge.checkpoint import contents, paths
from pymerge.checkpoint.contents import LOCK, MANIFEST, Contents
from pymerge.checkpoint.files import is_file
from pymerge.checkpoint.space import check_space
from pymerge.checkpoint.writer import translated
from pymerge.errors import OutputError
from pymerge.interrupt import check
from pymerge.messages.arguments import argument

_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_CHANGED = "did not get that name: what is there changed since the merge began"


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.pymerge-partial")


def can_resume(out: Path) -> bool:
    """Whether an interrupted merge into `out` has finished files."""
    return is_file(_partial(out.expanduser().resolve()) / MANIFEST)


class OutputFolder:
    """Checks the final name, then owns the partial folder from `open` to `publish` or `discard`."""

    def __init__(self, out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
        """inputs: everything that the merge reads. Raises OutputError where `out` must not be
        written. Changes nothing on the disk.
        """
        self.out = paths.resolved(out)
        self.partial = _partial(self.out)
        self._fd = -1  # of the partial folder
        self._lock_fd = -1
        self._spare: list[int] = []  # descriptors to clean up with where there are no more
        self.is_published = False
        self._is_new = False  # whether the partial folder was made, and not taken over
        self._like: os.stat_result | None = None  # the folder that has the final name already
        self._old: tuple[tuple[int, int], Contents] | None = None  # what `publish` may replace
        # Finished files: inode and change time, bytes, SHA-256.
        self._made: dict[str, tuple[tuple[int, ...], int, str]] = {}
        with translated(self.out):
            problems = paths.conflicts(self.out, self.partial, inputs)
            problems = problems or self._occupied(overwrite)
            problems += self._in_the_way()
        if problems:
            raise OutputError(problems)

    def _occupied(self, overwrite: bool) -> list[str]:
        name = f"output {self.out}"
        try:
            status = self.out.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return []
        if not stat.S_ISDIR(status.st_mode):
            return [f"{name} exists and is not a folder; give another name"]
        with suppress(FileNotFoundError):  # the working directory was deleted
            here = Path.cwd()
            if here == self.out or self.out in here.parents:
                return [
                    f"{name} is or holds the working directory, and is replaced as a whole; "
                    "run from another folder, or write elsewhere"
                ]
        if paths.is_mount(self.out):
            return [f"{name} is a mount point and cannot be replaced; write to a folder in it"]
        above = self.out.parent.stat()
        if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, status.st_uid, above.st_uid):
            return [f"{name} belongs to another user and cannot be replaced; give another name"]
        with contents.opened(self.out) as fd:
            found = contents.look(fd)
        self._like = status
        if found.is_empty():
            return []
        if not overwrite:
            return [
                f"{name} is not empty; give another name, or pass {argument('overwrite', True)} to"
                " replace it"
            ]
        if not found.is_model:
            return [f"{name} is not a model folder and is not overwritten; give another name"]
        if found.foreign:
            return [
                f"{name} is not overwritten, because it holds what no merge writes:"
                f" {found.listed()}; move that away, or give another name"
            ]
        self._old = (status.st_dev, status.st_ino), found
        return []

    def _in_the_way(self) -> list[str]:
        """Problems with what has the hidden folder's name."""
        try:
            with contents.opened(self.partial) as fd:
                return self._strange(fd)
        except FileNotFoundError:
            return []
        except OSError as error:
            # Its parent is missing, which `check_space` reports
            if not os.path.lexists(self.partial):
                return []
            if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EACCES):
                raise
            what = "cannot be opened" if error.errno == errno.EACCES else "is not a folder"
            return [self._obstacle(what)]

    def _strange(self, fd: int) -> list[str]:
        """Why an open folder was not left by a merge of this user."""
        if not paths.is_mine(os.fstat(fd), self.partial.parent):
            return [self._obstacle("belongs to another user")]
        found = contents.look(fd, working=True)
        if found.foreign:
            return [self._obstacle(f"holds what no merge writes ({found.listed()})")]
        if found.files and not {LOCK, MANIFEST} & found.files.keys():
            return [self._obstacle(f"was made by no merge: it has no {MANIFEST}")]
        return []

    def _obstacle(self, what: str) -> str:
        return (
            f"{self.partial}, where the result for {self.out} is to be made, {what}; "
            "move it away, or give another name"
        )

    def check_space(self, needed: int) -> None:
        """See `checkpoint.space`."""
        with translated(self.partial.parent):
            check_space(self.out, self.partial, needed)

    def open(self) -> None:
        """Create or take over the partial folder. Raises OutputError where another merge holds it
        or no merge of this user made it.
        """
        try:
            with translated(self.partial):
                self.partial.parent.mkdir(parents=True, exist_ok=True)
                while not self._take():
                    self.close()
        except BaseException:
            self.close()
            if self._is_new:
                with suppress(OSError):
                    self.partial.rmdir()  # what is in it by now is not of this merge
            raise

    def _take(self) -> bool:
        """Lock the partial folder. False where it vanished meanwhile because another merge
        published it.
        """
        with suppress(FileExistsError):
            self.partial.mkdir()
            self._is_new = True
            if not os.access(self.partial, os.R_OK | os.W_OK | os.X_OK):
                raise OutputError(
                    f"{self.partial}: a new folder may not be written to by who makes it; set"
                    " another umask"
                )
        problems = self._in_the_way()
        if problems:
            raise OutputError(problems)
        try:
            self._fd = os.open(self.partial, contents.FOLDER)
            # The folder checked before may have been another one
            problems = self._strange(self._fd)
            if problems:
                raise OutputError(problems)
            while len(self._spare) < 2:  # each is closed if the next one cannot be had
                self._spare.append(os.dup(self._fd))
            if self._like is not None:  # others must not see it now if they must not later
                os.fchmod(self._fd, stat.S_IMODE(self._like.st_mode) | stat.S_IRWXU)
            self._lock_fd = os.open(LOCK, _LOCK_FLAGS, 0o644, dir_fd=self._fd)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another merge is writing {self.out} now; wait for it, or give another name"
            ) from None
        if not self._is_locked():
            return False
        if not self._is_named(self.partial):
            os.unlink(LOCK, dir_fd=self._fd)  # ours, in a result that was published meanwhile
            return False
        return True

    def _is_locked(self) -> bool:
        try:
            status = os.stat(LOCK, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(status, os.fstat(self._lock_fd))

    def _is_named(self, path: Path) -> bool:
        try:
            return os.path.samestat(path.lstat(), os.fstat(self._fd))
        except OSError:
            return False

    def _is_held(self) -> bool:
        """Whether the partial folder is still there and locked by this merge alone. Recreates a
        deleted lock.
        """
        if self._fd < 0 or not self._is_named(self.partial):
            return False
        if self._is_locked():
            return True
        try:
            lock = os.open(LOCK, _LOCK_FLAGS | os.O_EXCL, 0o644, dir_fd=self._fd)
        except OSError:
            return False
        os.close(self._lock_fd)
        self._lock_fd = lock
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return self._is_locked()
        return False

    def manifest(self) -> bytes | None:
        """The manifest of the merge that was interrupted here; None where there is none."""
        try:
            return contents.read(MANIFEST, self._fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(
                f"{self.partial / MANIFEST}: cannot be read ({error.strerror or error}); merge"
                f" without {argument('resume')}, which begins anew"
            ) from None

    def keep_only(self, files: Iterable[str]) -> None:
        """Delete all that an earlier merge left here, except these files."""
        if not self._is_held():
            return
        kept = {*files, LOCK}
        with translated(self.partial):
            problems = contents.remove(self._fd, contents.look(self._fd, working=True), keep=kept)
        if problems:
            raise OutputError(f"{self.partial}: cannot be cleared ({problems[0]}); delete it")
        self._made = {name: made for name, made in self._made.items() if name in kept}

    def create(self, name: str) -> int:
        """A new file, open, for a `ShardWriter`. Raises OSError or OutputError."""
        self._check_named()
        self.remove(name)
        return os.open(name, contents.NEW_FILE, 0o666, dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Delete an unfinished file."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def made(self, name: str, nbytes: int, sha256: str) -> None:
        """Remember a finished file, which must still be there on publishing."""
        try:
            status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            self._check_named()
            raise OutputError(self._lost(name, "vanished")) from None
        self._made[name] = (contents.stamp(status), nbytes, sha256)

    def sha256(self, name: str, nbytes: int) -> str | None:
        """The hash of a file of exactly this size; None where there is none."""
        sha = hashlib.sha256()
        try:
            with os.fdopen(contents.open_file(name, self._fd), "rb") as file:
                if os.fstat(file.fileno()).st_size != nbytes:
                    return None
                while piece := file.read(4 << 20):
                    check()
                    sha.update(piece)
        except OSError:
            return None
        return sha.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        self._check_named()
        with translated(self.partial / name):
            contents.write(name, content, self._fd)
        self.made(name, len(content), hashlib.sha256(content).hexdigest())

    def write_text(self, name: str, text: str) -> None:
        """Write text atomically. What UTF-8 cannot encode, as parts of some file names, is
        escaped.
        """
        self.write(name, text.encode("utf-8", "backslashreplace"))

    def check_complete(self) -> None:
        """Raise OutputError where a finished file is missing or changed."""
        self._check_named()
        if not self._is_held():
            raise OutputError(
                f"another merge took over {self.partial}, where the result was made; run this one"
                " again"
            )
        damages = [(name, self._damage(name)) for name in self._made]
        problems = [self._lost(name, what) for name, what in damages if what is not None]
        if problems:
            raise OutputError(problems)

    def _lost(self, name: str, what: str) -> str:
        return (
            f"{self.partial / name} {what} while the merge ran; find out by what, and run it again"
        )

    def _check_named(self) -> None:
        if not self._is_named(self.partial):
            raise OutputError(
                f"{self.partial}, where the result is made, was deleted or replaced while the merge"
                " ran; find out by what, and run it again"
            )

    def _damage(self, name: str) -> str | None:
        same, nbytes, sha256 = self._made[name]
        try:
            status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return "vanished"
        if not stat.S_ISREG(status.st_mode):
            return "was replaced"
        if status.st_size != nbytes:
            return f"went from {nbytes} to {status.st_size} bytes"
        # Some network file systems change a file's inode, or its time late; the hash decides then.
        if contents.stamp(status) == same or self.sha256(name, nbytes) == sha256:
            return None
        return "was replaced"

    def publish(self) -> list[str]:
        """Give the result its name. A folder that is to be replaced is exchanged atomically where
        Linux can.

        Returns notes on what could not be cleaned up. Raises OutputError where something appeared
        under the name or changed there since the start; the complete result then stays in the
        partial folder.
        """
        try:
            old = None
            if self._old is None:
                self._rename()
            else:
                old = self._replace()
            self.is_published = True
            return self._clear(old)
        except OSError as error:
            raise self._refusal(f"could not get that name ({error.strerror})") from error

    def _rename(self) -> None:
        try:
            self.partial.rename(self.out)  # replaces an empty folder, but nothing else
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
            raise self._refusal(
                "did not get that name: something appeared there since the merge began"
            ) from None

    def _replace(self) -> Path | None:
        """Put the result in place of the old folder. Returns the old folder's new path; None if it
        is gone.
        """
        if not os.path.lexists(self.out):
            self._rename()
            return None
        if not self._is_old(self.out):
            raise self._refusal(_CHANGED)
        aside = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.pymerge-old-", dir=self.out.parent))
        try:
            exchanged = self._swap(aside)
            # Check once more, now that nothing can be written to it by its name.
            if not self._is_old(aside):
                self._swap_back(aside, exchanged)
                raise self._refusal(_CHANGED)
            return aside
        finally:
            with suppress(OSError):
                aside.rmdir()  # fails, as it should, if the old folder is in it

    def _swap(self, aside: Path) -> bool:
        """Move what has the final name to `aside` and the result to the final name, back to back.
        Returns whether it was atomic.
        """
        if paths.exchange(self.partial, self.out):
            try:
                self.partial.rename(aside)
            except OSError:
                paths.exchange_back(self.partial, self.out, LOCK)
                raise
            return True
        self.out.rename(aside)
        try:
            self._rename()
        except BaseException:
            self._put_back(aside)
            raise
        return False

    def _swap_back(self, aside: Path, exchanged: bool) -> None:
        if exchanged and paths.exchange(aside, self.out):
            aside.rename(self.partial)
        else:
            self.out.rename(self.partial)
            self._put_back(aside)

    def _put_back(self, aside: Path) -> None:
        try:
            aside.rename(self.out)
        except OSError as error:
            raise OutputError(
                f"{self.out} changed again and again while the merge was to get that name. The"
                f" result is in {self.partial}, and what was there is in {aside} ({error.strerror})"
            ) from error

    def _is_old(self, path: Path) -> bool:
        """Whether this is the folder from the start, with nothing added or changed."""
        try:
            with contents.opened(path) as fd:
                status = os.fstat(fd)
                return self._old == ((status.st_dev, status.st_ino), contents.look(fd))
        except OSError:
            return False

    def _refusal(self, what: str) -> OutputError:
        with suppress(OSError):
            if self._is_held():
                os.unlink(LOCK, dir_fd=self._fd)  # the folder is already complete
        again = "--resume --overwrite" if self._old else "--resume"
        moved = f"move {self.out} away" if os.path.lexists(self.out) else "mend that"
        return OutputError(
            f"the merge into {self.out} is complete but {what}. It is in {self.partial}: {moved}"
            f" and run the same command with {again}, which takes seconds, or rename that folder"
            " yourself"
        )

    def _clear(self, old: Path | None) -> list[str]:
        notes = []
        problems: list[str] = []
        try:
            # Only now, so that nobody could take the partial folder over before it was renamed.
            os.unlink(LOCK, dir_fd=self._fd)
        except OSError as error:
            notes.append(f"{self.out / LOCK} could not be deleted ({error.strerror}): delete it")
        if self._like is not None:
            with suppress(OSError):
                paths.make_alike(self._fd, self._like)
        if old is not None and self._old is not None:
            try:
                with contents.opened(old) as fd:
                    problems = contents.remove(fd, self._old[1])
                old.rmdir()
            except OSError as error:
                why = problems[0] if problems else error.strerror
                notes.append(
                    f"what {self.out} held before could not be deleted ({why}): it is in {old}"
                )
        self.close()
        return notes

    def discard(self) -> None:
        """Delete the partial folder, after errors that would recur."""
        while self._spare:
            os.close(self._spare.pop())
        with suppress(OSError):
            if self._is_held():
                contents.remove(self._fd, contents.look(self._fd, working=True))
                self.partial.rmdir()
        self.close()

    def close(self) -> None:
        held = (self._lock_fd, self._fd, *self._spare)
        self._spare = []
        self._lock_fd = self._fd = -1
        if held[0] >= 0:  # a process that was forked meanwhile has the file open too
            with suppress(OSError):
                fcntl.flock(held[0], fcntl.LOCK_UN)
        for fd in held:
            if fd >= 0:
                os.close(fd)
