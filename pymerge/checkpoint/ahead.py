"""Reads inputs ahead of the computation, in the order of the output, within a bound in bytes."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.stored import StoredTensor
from pymerge.interrupt import check

AHEAD = 256 << 20  # bytes of mapped inputs requested ahead
RING = 128 << 20  # bytes of memory for inputs that cannot be used in place
_ALIGN = 64
PIECE = 8 << 20  # bytes per read; network file systems serve several at once
_READERS = 4


@dataclass(frozen=True)
class Unit:
    """What one call computes: elements begin to begin + count of one output tensor.

    tensor: index into the plan. inputs: (stored tensor, first byte, bytes).
    """

    tensor: int
    begin: int
    count: int
    inputs: tuple[tuple[StoredTensor, int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(length for _, _, length in self.inputs)

    @property
    def copied_bytes(self) -> int:
        """Memory for the inputs that cannot be used in place."""
        return sum(rounded(length) for stored, _, length in self.inputs if stored.copies)


@dataclass
class Loaded:
    """A unit whose inputs are in memory, at `addresses`, until it is given back."""

    unit: Unit
    addresses: list[int]
    own: Region | None = None
    ring: int = 0


class ReadAhead:
    """A context. `next` returns the units in order; `give_back` releases the memory of one.

    large: allocates memory for the inputs of a unit that cannot be used in place, cannot be cut,
        and do not fit the ring. ahead, ring, piece: bytes, as AHEAD, RING and PIECE.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        large: Callable[[int], Region] = Region.anonymous,
        *,
        ahead: int = AHEAD,
        ring: int = RING,
        piece: int = PIECE,
    ) -> None:
        self._units = units
        self._large = large
        self._most_ahead = ahead
        self._ring_size = ring
        self._ready: queue.SimpleQueue[Loaded | BaseException] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._ahead = 0  # bytes read and not given back
        self._ring: Region | None = None
        self._ring_next = 0
        self._ring_used: deque[tuple[int, int]] = deque()  # (begin, end), oldest first
        self._larges: list[Region] = []  # all regions that `large` allocated
        self._spare: queue.SimpleQueue[Region] = queue.SimpleQueue()  # those that were given back
        self._stop = False
        self._readers = _Readers(piece)
        self._thread = threading.Thread(target=self._run, name="pymerge-read", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join()
        self._readers.close()
        for region in self._larges:
            region.close()
        if self._ring is not None:
            self._ring.close()

    def next(self) -> Loaded:
        check()
        loaded = self._ready.get()
        if isinstance(loaded, BaseException):
            raise loaded
        return loaded

    def give_back(self, loaded: Loaded) -> None:
        if loaded.own is not None:
            self._spare.put(loaded.own)
        with self._changed:
            self._ahead -= loaded.unit.nbytes
            if loaded.ring:
                self._ring_used.popleft()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for unit in self._units:
                loaded = self._load(unit)
                if loaded is None:
                    return
                self._ready.put(loaded)
        except BaseException as error:  # raised again by `next`, on the computing thread
            self._ready.put(error)

    def _load(self, unit: Unit) -> Loaded | None:
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stop or self._ahead == 0 or self._ahead + unit.nbytes <= self._most_ahead
                )
            )
            if self._stop:
                return None
            self._ahead += unit.nbytes
        loaded = Loaded(unit, [])
        room = unit.copied_bytes
        position = 0
        if 0 < room <= self._ring_size:
            found = self._take_ring(room)
            if found is None:
                return None
            position = found
            loaded.ring = room
        elif room:
            loaded.own = self._take_large(room)
        region = loaded.own or self._ring
        for stored, offset, length in unit.inputs:
            if region is None or not stored.copies:
                stored.expect(offset, length)
                loaded.addresses.append(stored.address() + offset)
                continue
            self._readers.read(stored, offset, region.view(position, length))
            loaded.addresses.append(region.address + position)
            position += rounded(length)
        return loaded

    def _take_large(self, room: int) -> Region:
        """At least `room` bytes: those of an earlier unit where they suffice, whose pages exist
        already.
        """
        while not self._spare.empty():
            region = self._spare.get()
            if region.length >= room:
                return region
            region.close()
        self._larges.append(self._large(room))
        return self._larges[-1]

    def _take_ring(self, room: int) -> int | None:
        """The offset of `room` free bytes in the ring, once enough units were given back. None when
        stopped.
        """
        if self._ring is None:
            self._ring = Region.anonymous(self._ring_size)
        with self._changed:
            while not self._stop:
                begin = self._fitting(room)
                if begin is not None:
                    self._ring_used.append((begin, begin + room))
                    self._ring_next = begin + room
                    return begin
                self._changed.wait()
        return None

    def _fitting(self, room: int) -> int | None:
        if not self._ring_used:
            return 0
        oldest = self._ring_used[0][0]
        if self._ring_next > oldest:
            if self._ring_next + room <= self._ring_size:
                return self._ring_next
            return 0 if room <= oldest else None
        return self._ring_next if self._ring_next + room <= oldest else None


def rounded(nbytes: int) -> int:
    """The size, rounded up to where the next input may begin."""
    return nbytes + -nbytes % _ALIGN


class _Readers:
    """Threads that read large inputs in several pieces; started on first use."""

    def __init__(self, piece: int) -> None:
        self._piece = piece
        self._requests: queue.SimpleQueue[tuple[StoredTensor, int, memoryview] | None] = (
            queue.SimpleQueue()
        )
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def read(self, stored: StoredTensor, offset: int, target: memoryview) -> None:
        """Fill `target`; returns when that is done."""
        if len(target) <= self._piece or not stored.at_once:
            stored.read_into(offset, target)
            return
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._run, name="pymerge-reader", daemon=True)
                for _ in range(_READERS)
            ]
            for thread in self._threads:
                thread.start()
        starts = range(0, len(target), self._piece)
        for start in starts:
            self._requests.put((stored, offset + start, target[start : start + self._piece]))
        failures = [
            failure for failure in (self._done.get() for _ in starts) if failure is not None
        ]
        if failures:
            raise failures[0]

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            stored, offset, target = request
            try:
                stored.read_into(offset, target)
                self._done.put(None)
            except BaseException as error:  # raised again by `read`
                self._done.put(error)

    def close(self) -> None:
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            thread.join()


def same_bytes(one: int, other: int, nbytes: int) -> bool:
    """Whether two ranges of memory are equal."""
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return nbytes == 0 or compare(one, other, nbytes) == 0


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """memmove."""
    if nbytes:
        ctypes.memmove(target, source, nbytes)
