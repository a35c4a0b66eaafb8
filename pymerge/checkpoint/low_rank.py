"""Low-rank updates as tensors are read: a block of the base and the block's rows of s B A, as if
the sum were stored (docs/spec/low_rank.md).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.backends import native
from pymerge.checkpoint.gather import decoded
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import item_size, storage_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

_PART = 1 << 18  # elements of the base that are read at a time, which stay in the caches
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
    """The matrix s L R, which has the elements of the weight that it is added to, row by row (L1).

    left, right: give L (rows, r) and R (r, columns) when they are called. magnitude: gives DoRA's,
    one for every row, or for every column where `by_column` (L4).
    """

    left: Matrix
    right: Matrix
    scale: float
    magnitude: Matrix | None = None
    by_column: bool = False


class AdaptedTensor(StoredTensor):
    """W + s L R, or DoRA's m (W + s L R) / ||W + s L R||, computed in fp32 (fp64 where W is that)
    and not rounded to the dtype of W (L5).
    """

    def __init__(self, base: StoredTensor, update: LowRank, rows: int) -> None:
        dtype = "float64" if base.info.dtype == "float64" else "float32"
        shape = base.info.shape
        info = TensorInfo(base.info.name, dtype, shape, base.info.result_dtype)
        super().__init__(info, storage_bytes(dtype, shape))
        self.at_once = base.at_once or base.in_place
        self._base = base
        self._update = update
        self._rows = rows
        self._columns = self.nbytes // item_size(dtype) // max(1, rows)
        self._lock = threading.Lock()
        self._held: _Held | None = None  # while the tensor is being read
        self._left = self.nbytes  # bytes to be read until all have been

    @property
    def in_place(self) -> bool:
        return False

    def read_into(self, offset: int, target: memoryview) -> None:
        if not len(target):
            return
        out = np.frombuffer(target, self.info.dtype)
        with np.errstate(all="ignore"):  # who merges it looks for what is not finite
            held = self._hold()
            self._sum(held, offset // out.itemsize, out)
            if held.factors is not None:
                self._scale(held.factors, offset // out.itemsize, out)
        self._done(len(target))

    def let_go(self) -> None:
        """Drop what is held between reads; it is read again when needed."""
        with self._lock:
            self._held = None
            self._left = self.nbytes

    def _blocks(self, begin: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(row, first column, rows, columns) of parts of so many elements: whole rows, or a piece
        of one.
        """
        columns, end = self._columns, begin + count
        while begin < end:
            row, column = divmod(begin, columns)
            rows = 1 if column else min(_PART // columns, (end - begin) // columns)
            width = columns
            if column or not rows:
                rows, width = 1, min(columns - column, end - begin, _PART)
            yield row, column, rows, width
            begin += rows * width

    def _sum(self, held: _Held, begin: int, out: npt.NDArray[Any]) -> None:
        """Elements of W + s L R from `begin` on (L2)."""
        base, rank = self._base, held.left.shape[1]
        size = item_size(base.info.dtype)
        place = out.ctypes.data
        for row, column, rows, columns in self._blocks(begin, out.size):
            raw = np.empty(rows * columns * size, np.uint8)
            base.read_into((row * self._columns + column) * size, raw.data)
            native.add_low_rank(
                (raw.ctypes.data, base.info.dtype),
                held.left.ctypes.data + row * rank * out.itemsize,
                (held.right.ctypes.data + column * out.itemsize, self._columns),
                rank,
                self._update.scale,
                (place, self.info.dtype),
                (rows, columns),
            )
            place += rows * columns * out.itemsize

    def _scale(self, factors: npt.NDArray[Any], begin: int, out: npt.NDArray[Any]) -> None:
        at = 0
        for row, column, rows, columns in self._blocks(begin, out.size):
            part = out[at : at + rows * columns].reshape(rows, columns)
            if self._update.by_column:
                part *= factors[column : column + columns]
            else:
                part *= factors[row : row + rows, None]
            at += part.size

    def _factors(self, held: _Held, magnitude: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """DoRA's m / ||V|| for every row or column of the sum, all of which is read for it (L4)."""
        axis = 0 if self._update.by_column else 1
        total = np.zeros(self._columns if axis == 0 else self._rows, np.float64)
        whole = self._rows * self._columns
        for row, column, rows, columns in self._blocks(0, whole):
            part = np.empty((rows, columns), self.info.dtype)
            self._sum(held, row * self._columns + column, part.reshape(-1))
            squares = np.square(part, dtype=np.float64).sum(axis=axis)
            first, size = (column, columns) if axis == 0 else (row, rows)
            total[first : first + size] += squares
        return magnitude / np.sqrt(total).astype(self.info.dtype)

    def _hold(self) -> _Held:
        with self._lock:
            held = self._held
            if held is None:
                update, dtype = self._update, np.dtype(self.info.dtype)
                left = np.ascontiguousarray(update.left(), dtype)
                right = np.ascontiguousarray(update.right(), dtype)
                found = _Held(left, right)
                if update.magnitude is not None:
                    magnitude = update.magnitude().astype(dtype).reshape(-1)
                    found = _Held(left, right, self._factors(found, magnitude))
                self._held = found
        if held is not None:
            return held
        _holders.add(self)  # with no lock, since it takes another tensor's
        return found

    def _done(self, nbytes: int) -> None:
        """Release the factors once the whole tensor was read."""
        with self._lock:
            self._left -= nbytes
            if self._left <= 0:
                self._held = None
                self._left = self.nbytes


@dataclass(frozen=True)
class _Held:
    """factors: what DoRA multiplies rows or columns by."""

    left: npt.NDArray[Any]
    right: npt.NDArray[Any]
    factors: npt.NDArray[Any] | None = None


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


class ReplacedTensor(StoredTensor):
    """A stored tensor in the place of the base's: read as it is stored, with the base's dtype in
    the result (L6).
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
