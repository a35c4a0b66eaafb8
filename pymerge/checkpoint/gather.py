"""Token alignment as tensors are read: rows gathered at the result's ids, as if they were stored in
that order (docs/spec/rows.md).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import MEAN, PADDING, ZERO, Rows, TensorInfo
from pymerge.dtypes import MERGEABLE, item_size, storage_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

LONG = 1 << 20  # runs of at least this many bytes are requested at once, not page by page
PIECE = 8 << 20  # bytes of rows of which a mean is taken at a time


def aligned_tensor(name: str, rows: Rows, stored: Sequence[StoredTensor]) -> StoredTensor:
    """A tensor with aligned rows. stored: the tensors `rows.tensors`. Consecutive rows are used in
    place.
    """
    source = stored[max(0, int(rows.choice[0]))]
    whole = GatheredTensor(name, rows, stored)
    runs = whole.runs(0, rows.shape[0])
    _, end, choice, place = next(runs)
    if end == rows.shape[0] and choice >= 0 and source.info.dtype == rows.dtype:
        return PartTensor(whole.info, source, place * whole.width)
    return whole


class PartTensor(StoredTensor):
    """A contiguous part of a stored tensor, from byte `start` on."""

    def __init__(self, info: TensorInfo, stored: StoredTensor, start: int) -> None:
        super().__init__(info, storage_bytes(info.dtype, info.shape))
        self._stored = stored
        self._start = start
        self.at_once = stored.at_once

    @property
    def in_place(self) -> bool:
        return self._stored.in_place

    @property
    def copies(self) -> bool:
        return self._stored.copies

    def address(self) -> int:
        return self._stored.address() + self._start

    def expect(self, offset: int, length: int) -> None:
        self._stored.expect(self._start + offset, length)

    def read_into(self, offset: int, target: memoryview) -> None:
        self._stored.read_into(self._start + offset, target)


class GatheredTensor(StoredTensor):
    """Rows of several stored tensors. width: bytes per row. long, piece: as LONG and PIECE."""

    def __init__(
        self,
        name: str,
        rows: Rows,
        stored: Sequence[StoredTensor],
        *,
        long: int = LONG,
        piece: int = PIECE,
    ) -> None:
        info = TensorInfo(name, rows.dtype, rows.shape)
        super().__init__(info, storage_bytes(info.dtype, info.shape))
        self.at_once = all(each.at_once or each.in_place for each in stored)
        self.width = storage_bytes(info.dtype, info.shape[1:])
        self._rows = rows
        self._long = long
        self._piece = piece
        self._stored = stored
        self._padding: npt.NDArray[np.uint8] | None = None
        self._lock = threading.Lock()

    @property
    def in_place(self) -> bool:
        return False

    def read_into(self, offset: int, target: memoryview) -> None:
        if not len(target):
            return
        end = offset + len(target)
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(target))
        for first, last, choice, place in self.runs(offset // self.width, -(-end // self.width)):
            begin = first * self.width
            low, high = max(offset, begin), min(end, last * self.width)
            here = address + low - offset
            if choice >= 0 and self._stored[choice].info.dtype == self.info.dtype:
                start = place * self.width + low - begin
                self._copy(self._stored[choice], start, here, target[low - offset : high - offset])
            elif choice == ZERO:
                ctypes.memset(here, 0, high - low)
            else:
                made = self._made(first, last, choice, place)
                ctypes.memmove(here, made.ctypes.data + low - begin, high - low)

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """(first, last, choice, place) of rows that are consecutive in the same tensor."""
        choice = self._rows.choice[first:last]
        place = self._rows.places[np.maximum(choice, 0), np.arange(first, last)]
        following = np.where(choice[1:] >= 0, place[1:] == place[:-1] + 1, choice[1:] != MEAN)
        breaks = np.flatnonzero((choice[1:] != choice[:-1]) | ~following) + 1
        starts = [0, *breaks.tolist()]
        for start, end in zip(starts, [*starts[1:], last - first], strict=True):
            yield first + start, first + end, int(choice[start]), int(place[start])

    def _copy(self, stored: StoredTensor, start: int, address: int, target: memoryview) -> None:
        if stored.copies:
            stored.read_into(start, target)
            return
        if len(target) >= self._long:
            stored.expect(start, len(target))
        ctypes.memmove(address, stored.address() + start, len(target))

    def _made(self, first: int, last: int, choice: int, place: int) -> npt.NDArray[np.uint8]:
        """Computed rows (means and zeros), as bytes."""
        if choice == PADDING:
            return np.tile(self._padding_row(), last - first)
        if choice == MEAN:
            places = self._rows.places[:, first].tolist()
            having = [(s, p) for s, p in zip(self._stored, places, strict=True) if p >= 0]
            total = self._values(*having[0], 1)
            for stored, row in having[1:]:
                total = total + self._values(stored, row, 1)
            return encoded(total / np.float32(len(having)), self.info.dtype)
        return encoded(self._values(self._stored[choice], place, last - first), self.info.dtype)

    def _values(self, stored: StoredTensor, place: int, count: int) -> npt.NDArray[Any]:
        width = storage_bytes(stored.info.dtype, stored.info.shape[1:])
        held = np.empty(count * width, np.uint8)
        self._copy(stored, place * width, held.ctypes.data, held.data)
        return decoded(held, stored.info.dtype)

    def _padding_row(self) -> npt.NDArray[np.uint8]:
        with self._lock:
            if self._padding is None:
                kept = int(np.count_nonzero(self._rows.choice != PADDING))
                step = max(1, self._piece // self.width)
                columns = self.width // item_size(self.info.dtype)
                total = np.zeros(columns, np.float64)
                for begin in range(0, kept, step):
                    held = np.empty(min(step, kept - begin) * self.width, np.uint8)
                    self.read_into(begin * self.width, held.data)
                    values = decoded(held, self.info.dtype).reshape(-1, columns)
                    total += values.sum(axis=0, dtype=np.float64)
                self._padding = encoded(total / kept, self.info.dtype)
            return self._padding


def same_values(one: tuple[int, str, int], other: tuple[int, str, int]) -> bool:
    """Whether two buffers, (address, dtype, bytes) each, hold the same numbers."""
    values = []
    for address, dtype, nbytes in (one, other):
        held = np.empty(nbytes, np.uint8)
        if nbytes:
            ctypes.memmove(held.ctypes.data, address, nbytes)
        values.append(decoded(held, dtype) if dtype in MERGEABLE else held.view(np.dtype(dtype)))
    return bool(np.array_equal(values[0], values[1]))


def decoded(held: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    """As float32; float64 stays."""
    if dtype == "bfloat16":
        return (held.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    values = held.view(np.dtype(dtype))
    return values if dtype == "float64" else values.astype(np.float32)


def encoded(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.uint8]:
    """Rounded to nearest, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values.astype(np.dtype(dtype))).view(np.uint8)
    bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.where(np.isnan(values), bits | np.uint32(0x400000), bits + up)
    return (rounded >> np.uint32(16)).astype(np.uint16).view(np.uint8)
