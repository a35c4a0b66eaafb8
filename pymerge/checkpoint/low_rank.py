"""Low-rank updates as tensors are read: a block of the base and the block's rows of s B A, as if
the sum were stored.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.checkpoint.gather import decoded
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import item_size, storage_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

# Elements that are computed together: whole rows, from fixed places on, so that no bit depends on
# where a read begins or ends.
_TILE = 1 << 18
_MOST_HOLDERS = 64  # more than the models of one merge whose tensors are read at a time

Matrix = Callable[[], "npt.NDArray[Any]"]


def values_of(stored: StoredTensor) -> npt.NDArray[Any]:
    """A stored tensor as float32, or float64 where it is that, in its shape."""
    held = np.empty(stored.nbytes, np.uint8)
    stored.read_into(0, held.data)
    return decoded(held, stored.info.dtype).reshape(stored.info.shape)


def one() -> npt.NDArray[Any]:
    """R of an update that is a vector, as L is."""
    return np.ones((1, 1), np.float32)


@dataclass(frozen=True)
class LowRank:
    """The matrix s L R, which has the elements of the weight that it is added to, row by row.

    left, right: give L (rows, r) and R (r, columns) when they are called. magnitude: gives DoRA's,
    one for every row, or for every column where `by_column`.
    """

    left: Matrix
    right: Matrix
    scale: float
    magnitude: Matrix | None = None
    by_column: bool = False


class AdaptedTensor(StoredTensor):
    """W + s L R, or DoRA's m (W + s L R) / ||W + s L R||, computed in fp32 (fp64 where W is that)
    and not rounded to the dtype of W.
    """

    def __init__(self, base: StoredTensor, update: LowRank, rows: int) -> None:
        dtype = "float64" if base.info.dtype == "float64" else "float32"
        shape = base.info.shape
        info = TensorInfo(base.info.name, dtype, shape, base.info.dtype)
        super().__init__(info, storage_bytes(dtype, shape))
        self.at_once = base.at_once or base.in_place
        self._base = base
        self._update = update
        self._rows = rows
        self._columns = self.nbytes // item_size(dtype) // max(1, rows)
        self._step = max(1, _TILE // max(1, self._columns))  # rows of a tile
        self._lock = threading.Lock()
        self._held: _Held | None = None  # while the tensor is being read
        self._left = self.nbytes  # bytes to be read until all have been
        self._norms: npt.NDArray[Any] | None = None
        self._cut: tuple[int, npt.NDArray[Any]] | None = None  # the last tile read in part

    @property
    def in_place(self) -> bool:
        return False

    def read_into(self, offset: int, target: memoryview) -> None:
        if not len(target):
            return
        held = self._hold()
        size = item_size(self.info.dtype)
        out = np.frombuffer(target, self.info.dtype)
        begin = offset // size
        end, tile = begin + len(out), self._step * self._columns
        for index in range(begin // tile, -(-end // tile)):
            first = index * tile
            values = self._tile(index, held, whole=begin <= first and first + tile <= end)
            low, high = max(begin, first), min(end, first + values.size)
            out[low - begin : high - begin] = values[low - first : high - first]
        self._done(len(target))

    def _tile(self, index: int, held: _Held, *, whole: bool) -> npt.NDArray[Any]:
        """The elements of a tile. whole: all of it is read now, so that it is not kept."""
        cut = self._cut
        if cut is not None and cut[0] == index:
            return cut[1]
        first = index * self._step
        values = self._sum(held, first, min(self._rows, first + self._step))
        if held.magnitude is not None:
            values *= self._factors(held, values, first)
        flat = values.reshape(-1)
        if not whole:
            self._cut = index, flat
        return flat

    def _sum(self, held: _Held, first: int, end: int) -> npt.NDArray[Any]:
        """Rows of W + s L R."""
        width = item_size(self._base.info.dtype) * self._columns
        raw = np.empty((end - first) * width, np.uint8)
        self._base.read_into(first * width, raw.data)
        values = held.left[first:end] @ held.right
        values *= values.dtype.type(self._update.scale)
        values += decoded(raw, self._base.info.dtype).reshape(values.shape)
        return values

    def _factors(self, held: _Held, values: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
        """What DoRA multiplies these rows by."""
        assert held.magnitude is not None
        if not self._update.by_column:
            norms = np.linalg.norm(values, axis=1)
            return (held.magnitude[first : first + len(values)] / norms)[:, None]
        with self._lock:
            if self._norms is None:  # columns are known once all of the weight was read
                total = np.zeros(self._columns, np.float64)
                for begin in range(0, self._rows, self._step):
                    part = self._sum(held, begin, min(self._rows, begin + self._step))
                    total += np.square(part, dtype=np.float64).sum(axis=0)
                self._norms = np.sqrt(total).astype(values.dtype)
            return held.magnitude / self._norms

    def let_go(self) -> None:
        """Drop what is held between reads; it is read again if it is needed."""
        with self._lock:
            self._held = self._cut = None
            self._left = self.nbytes

    def _hold(self) -> _Held:
        with self._lock:
            held = self._held
            if held is None:
                update, dtype = self._update, np.dtype(self.info.dtype)
                magnitude = update.magnitude
                self._held = _Held(
                    np.ascontiguousarray(update.left(), dtype),
                    np.ascontiguousarray(update.right(), dtype),
                    None if magnitude is None else magnitude().astype(dtype).reshape(-1),
                )
        if held is not None:
            return held
        _holders.add(self)  # with no lock, since it takes another tensor's
        return self._hold()

    def _done(self, nbytes: int) -> None:
        """Let the factors go where as much was read as the tensor has."""
        with self._lock:
            self._left -= nbytes
            if self._left <= 0:
                self._held = self._cut = None
                self._left = self.nbytes


class _Holders:
    """The tensors that began to be read last. Of one that is read in part only, as for a
    comparison, the factors would else be held to the end.
    """

    def __init__(self) -> None:
        self._tensors: deque[weakref.ref[AdaptedTensor]] = deque()
        self._lock = threading.Lock()

    def add(self, tensor: AdaptedTensor) -> None:
        with self._lock:
            self._tensors.append(weakref.ref(tensor))
            more = max(0, len(self._tensors) - _MOST_HOLDERS)
            oldest = [self._tensors.popleft()() for _ in range(more)]
        for each in oldest:
            if each is not None and each is not tensor:
                each.let_go()


_holders = _Holders()


@dataclass(frozen=True)
class _Held:
    left: npt.NDArray[Any]
    right: npt.NDArray[Any]
    magnitude: npt.NDArray[Any] | None


class ReplacedTensor(StoredTensor):
    """A stored tensor in the place of the base's: read as it is stored, with the base's dtype in
    the result.
    """

    def __init__(self, stored: StoredTensor, name: str, dtype: str) -> None:
        info = stored.info
        super().__init__(TensorInfo(name, info.dtype, info.shape, dtype), stored.nbytes)
        self.at_once = stored.at_once
        self._stored = stored

    @property
    def in_place(self) -> bool:
        return self._stored.in_place

    @property
    def copies(self) -> bool:
        return self._stored.copies

    def address(self) -> int:
        return self._stored.address()

    def expect(self, offset: int, length: int) -> None:
        self._stored.expect(offset, length)

    def read_into(self, offset: int, target: memoryview) -> None:
        self._stored.read_into(offset, target)
