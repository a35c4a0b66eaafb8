"""Writes outputs behind the computation: reused staging blocks, one thread that writes and one that
hashes.

A tensor that fits a block is computed into it, in the order of the file, and a full block is
written with one call. A larger one has memory of its own, of an unnamed file in a merge of folders,
so that anonymous memory does not grow with the model; two such files take turns. The output itself
is never mapped: if somebody truncated it, writing to the mapping would kill the process. Measured
(ext4, 2 cores, page cache): a gigabyte written from blocks takes 0.17 s; its SHA-256 0.65 s, which
is why hashing has a thread of its own, and why the writing thread counts non-finite values.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pymerge.backends import native
from pymerge.checkpoint.ahead import copy_bytes
from pymerge.checkpoint.memory import Region
from pymerge.dtypes import MERGEABLE, item_size
from pymerge.errors import OF_THE_PROCESS, DiskFullError, OutputError
from pymerge.messages.arguments import argument, takes

BLOCK = 32 << 20
BLOCKS = 4
_LARGE = 2  # tensors beyond a block: one is computed while the other is written and hashed
_NEW = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Lease:
    """Memory that two threads read; `on_free` runs when both have released it."""

    def __init__(self, region: Region, on_free: Callable[[_Lease], None]) -> None:
        self.region = region
        self._on_free = on_free
        self._users = 2
        self._lock = threading.Lock()

    def let_go(self) -> None:
        with self._lock:
            self._users -= 1
            free = self._users == 0
        if free:
            self._on_free(self)


@dataclass(frozen=True)
class Slot:
    """Room for one output tensor or a chunk of it: fill `view`, at `address`, then call
    `ShardWriter.done`.
    """

    address: int
    view: memoryview
    own: _Lease | None = None  # memory of this slot alone, not part of a block


class BlockPool:
    """The staging blocks, allocated on first use and shared by all shards.

    large: allocates memory for a tensor that does not fit a block.
    """

    def __init__(
        self,
        count: int = BLOCKS,
        size: int = BLOCK,
        large: Callable[[int], Region] = Region.anonymous,
    ) -> None:
        self.size = size
        self._large = large
        self._left = count
        self._larges_left = _LARGE
        self._free: queue.SimpleQueue[Region] = queue.SimpleQueue()
        self._free_large: queue.SimpleQueue[Region] = queue.SimpleQueue()
        self._all: list[Region] = []

    def take(self) -> _Lease:
        """A block; waits until one is free."""
        if self._free.empty() and self._left:
            self._left -= 1
            self._all.append(Region.anonymous(self.size))
            self._free.put(self._all[-1])
        return _Lease(self._free.get(), lambda lease: self._free.put(lease.region))

    def take_large(self, nbytes: int) -> _Lease:
        """At least this much memory; waits until one of the few of this kind is free."""
        region: Region | None = None
        if not self._free_large.empty() or not self._larges_left:
            region = self._free_large.get()
        else:
            self._larges_left -= 1
        if region is None or region.length < nbytes:
            if region is not None:
                region.close()
            region = self._large(nbytes)
            self._all.append(region)
        return _Lease(region, lambda lease: self._free_large.put(lease.region))

    def close(self) -> None:
        for region in self._all:
            region.close()
        self._all.clear()


class _Worker:
    """Makes calls in order, on a thread. After the first failure it makes their clean-up calls
    only.
    """

    def __init__(self, name: str) -> None:
        self.failure: BaseException | None = None
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None], after: Callable[[], None]) -> None:
        """Queue a call and its clean-up, which runs even if the call fails or is skipped."""
        self._queue.put((call, after))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            call, after = item
            try:
                if self.failure is None:
                    call()
            except BaseException as error:  # handed to the thread that waits for the result
                self.failure = error
            finally:
                after()

    def join(self) -> None:
        """Wait for the calls. In the main thread an interrupt may end this early
        (pymerge.interrupt).
        """
        self._queue.put(None)
        self._thread.join()


class ShardWriter:
    """One output file, filled front to back.

    `slot` and `done` alternate, in the order of the file's bytes, on one thread. `finish` returns
    the SHA-256 of the whole file. `abort` is for every other way out; it never raises.

    create: opens the new file, for messages called `path`; may raise OSError.
    non_finite: tensor name -> elements that are NaN or infinite, for the tensors that the writing
        thread is through with.
    """

    def __init__(
        self,
        path: Path,
        header: bytes,
        nbytes: int,
        pool: BlockPool,
        create: Callable[[], int] | None = None,
    ) -> None:
        self.path = path
        self._pool = pool
        self._nbytes = nbytes
        self._block: _Lease | None = None
        self._used = 0
        self._contents: list[tuple[int, str, str]] = []  # of the block: bytes, tensor, dtype
        self._counted = ("", 0)  # of the tensor that the writing thread is in
        self.non_finite: dict[str, int] = {}
        self._position = len(header)  # of the next slot
        self._written = len(header)  # where the current block begins in the file
        self._sha = hashlib.sha256(header)
        with translated(path):
            self._fd = os.open(path, _NEW, 0o666) if create is None else create()
        try:
            with translated(path):
                _allocate(self._fd, nbytes)
                _write(self._fd, memoryview(header), 0)
        except BaseException:
            os.close(self._fd)
            raise
        self._writes = _Worker("pymerge-write")
        self._hashes = _Worker("pymerge-hash")

    def slot(self, nbytes: int) -> Slot:
        """Room for the next `nbytes` of the file."""
        self._check()
        if nbytes > self._pool.size:
            self._flush()
            own = self._pool.take_large(nbytes)
            return Slot(own.region.address, own.region.view(0, nbytes), own)
        if self._block is not None and self._used + nbytes > self._pool.size:
            self._flush()
        if self._block is None:
            self._block = self._pool.take()
            self._used = 0
            self._written = self._position
        region = self._block.region
        return Slot(region.address + self._used, region.view(self._used, nbytes))

    def done(self, slot: Slot, tensor: tuple[str, str]) -> None:
        """The slot now holds elements of a tensor, given by its name and dtype."""
        position = self._position
        self._position += len(slot.view)
        self._contents.append((len(slot.view), *tensor))
        if slot.own is None:
            self._used += len(slot.view)
        else:
            self._hand_over(slot.own, slot.view, position)

    def put(self, address: int, nbytes: int, tensor: tuple[str, str]) -> None:
        """A whole tensor that is in memory elsewhere, as `done` takes it, block by block."""
        for start in range(0, max(1, nbytes), self._pool.size):
            slot = self.slot(min(self._pool.size, nbytes - start))
            copy_bytes(slot.address, address + start, len(slot.view))
            self.done(slot, tensor)

    def _flush(self) -> None:
        if self._block is None:
            return
        block, self._block = self._block, None
        self._hand_over(block, block.region.view(0, self._used), self._written)

    def _hand_over(self, lease: _Lease, view: memoryview, position: int) -> None:
        """Queue the bytes for hashing, counting and writing."""
        contents, self._contents = self._contents, []
        address = lease.region.address
        self._writes.submit(
            functools.partial(self._write, view, address, contents, position), lease.let_go
        )
        self._hashes.submit(functools.partial(self._sha.update, view), lease.let_go)

    def _write(
        self,
        view: memoryview,
        address: int,
        contents: list[tuple[int, str, str]],
        position: int,
    ) -> None:
        for length, tensor, dtype in contents:
            if tensor != self._counted[0]:
                self._keep_count()
                self._counted = (tensor, 0)
            if dtype in MERGEABLE:
                found = native.count_non_finite((address, dtype), length // item_size(dtype), 1)
                self._counted = (tensor, self._counted[1] + found)
            address += length
        self._check_size()  # before writing this piece could hide a truncation
        _write(self._fd, view, position)

    def _check_size(self) -> None:
        size = os.fstat(self._fd).st_size
        if size != self._nbytes:
            raise OutputError(
                f"{self.path}: went from {self._nbytes} to {size} bytes while it was written;"
                " something else writes there. Nothing was kept: find out what it is, and merge"
                " again"
            )

    def _keep_count(self) -> None:
        tensor, found = self._counted
        if found:
            self.non_finite[tensor] = found

    def _check(self) -> None:
        for worker in (self._writes, self._hashes):
            if worker.failure is not None:
                with translated(self.path):
                    raise worker.failure

    def finish(self) -> str:
        self._flush()
        self._writes.join()
        self._hashes.join()
        self._check()
        self._check_size()
        self._close()
        self._keep_count()
        if self._position != self._nbytes:
            raise OutputError(f"{self.path}: {self._position} of {self._nbytes} bytes were written")
        return self._sha.hexdigest()

    def abort(self) -> None:
        self._writes.failure = self._hashes.failure = InterruptedError()
        self._flush()
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            self._writes.join()
            self._hashes.join()
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turns an OSError into a DiskFullError or OutputError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in OF_THE_PROCESS:  # not a fault of the path
            raise
        if error.errno == errno.EFBIG:
            way = f"pass a smaller {argument('out_shard_size')}, " * takes("out_shard_size")
            raise DiskFullError(
                f"{path}: would be larger than this process may make a file, or its file system"
                f" takes ({error.strerror}); {way}raise the limit (ulimit -f), or write elsewhere"
            ) from error
        if error.errno in _FULL:
            raise DiskFullError(
                f"{path}: no room left to write it ({error.strerror}); free some space or write"
                " elsewhere"
            ) from error
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); write elsewhere"
        ) from error


def _allocate(fd: int, nbytes: int) -> None:
    """Allocate the file's blocks now, so that a full disk shows before the work; in a mapped file
    it would be a fatal signal.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, nbytes)


def scratch(folder: Path, nbytes: int) -> Region:
    """Memory backed by an unnamed file in `folder`, so that it need not stay in RAM during a
    merge.
    """
    with translated(folder), tempfile.TemporaryFile(dir=folder) as file:
        _allocate(file.fileno(), nbytes)
        try:
            return Region.of_file(file.fileno(), nbytes)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EACCES, errno.EINVAL):
                raise
            return Region.anonymous(nbytes)  # a file system without shared writable mappings


def _write(fd: int, view: memoryview, position: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], position + done)
