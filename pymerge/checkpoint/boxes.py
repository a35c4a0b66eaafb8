"""Tensors stored in parts, each a box of the tensor (rows, columns, or a range of every axis), read
as if they were stored whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pymerge.checkpoint.stored import InputFile, StoredTensor
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import item_size, storage_bytes

_MOST_CELLS = 1 << 24  # of the grid of all cuts, to check that parts do not overlap

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Box:
    """A part of a tensor. begin, shape: in elements, one number for each axis. start: of its first
    byte in the file. strides: in elements, where they are not those of a contiguous tensor.
    """

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    file: InputFile
    start: int
    strides: tuple[int, ...] | None = None


def why_not_whole(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Why boxes do not make up a tensor of that shape, each element once; None where they do.

    boxes: of the tensor's number of axes, inside of it.
    """
    boxes = [box for box in boxes if math.prod(box.shape)]
    missing = math.prod(shape) - sum(math.prod(box.shape) for box in boxes)
    if missing > 0:
        return f"lacks {missing} of its {math.prod(shape)} elements"
    if missing < 0:
        return "has parts that overlap"
    if len(boxes) < 2:
        return None
    begins = np.array([box.begin for box in boxes], np.int64)
    ends = begins + np.array([box.shape for box in boxes], np.int64)
    # Between all places where any part begins or ends, each cell of the grid is in one part.
    cuts = [np.unique(np.concatenate(pair)) for pair in zip(begins.T, ends.T, strict=True)]
    cells = tuple(len(each) - 1 for each in cuts)
    if math.prod(cells) > _MOST_CELLS:
        return f"is cut into {len(boxes)} parts in a way that cannot be checked"
    first = [np.searchsorted(cut, low) for cut, low in zip(cuts, begins.T, strict=True)]
    last = [np.searchsorted(cut, high) for cut, high in zip(cuts, ends.T, strict=True)]
    taken = np.zeros(cells, bool)
    for low, high in zip(np.transpose(first), np.transpose(last), strict=True):
        part = taken[tuple(map(slice, low, high))]
        if part.any():
            return "has parts that overlap"
        part[...] = True
    return None


class BoxedTensor(StoredTensor):
    """A tensor of several boxes, which make it up (`why_not_whole`), or of one with strides.

    Axes that no part cuts are one axis with that before them, and the last counts bytes: a tensor
    that is cut into rows has a single axis, and is read without a copy.
    """

    def __init__(self, info: TensorInfo, boxes: Sequence[Box]) -> None:
        super().__init__(info, storage_bytes(info.dtype, info.shape))
        # A box with strides is held while the tensor is read, in order.
        self.at_once = all(box.strides is None for box in boxes)
        self._boxes = [box for box in boxes if math.prod(box.shape)]
        self._held: dict[int, npt.NDArray[np.uint8]] = {}
        shape = np.array([*info.shape] or [1], np.int64)
        axes = len(shape)
        begins = np.array([box.begin or (0,) for box in self._boxes], np.int64).reshape(-1, axes)
        sizes = np.array([box.shape or (1,) for box in self._boxes], np.int64).reshape(-1, axes)
        for each in (shape[None], begins, sizes):
            each[:, -1] *= item_size(info.dtype)
        for axis in range(axes - 1, 0, -1):
            if bool((sizes[:, axis] == shape[axis]).all()):
                for each in (shape[None], begins, sizes):
                    each[:, axis - 1] *= shape[axis]
                shape, begins, sizes = (np.delete(x, axis, -1) for x in (shape, begins, sizes))
        self._shape = tuple(map(int, shape))
        self._begins: Ints = begins
        self._ends: Ints = begins + sizes
        steps = np.ones_like(sizes)
        steps[:, :-1] = np.cumprod(sizes[:, :0:-1], axis=1)[:, ::-1]
        self._steps: Ints = steps  # bytes of a part from one index of each axis to the next

    @property
    def in_place(self) -> bool:
        return False

    def read_into(self, offset: int, target: memoryview) -> None:
        whole = np.frombuffer(target, np.uint8)
        done = 0
        for low, high in _pieces(self._shape, offset, offset + len(target)):
            size = high - low
            count = int(size.prod())
            self._fill(low, high, whole[done : done + count].reshape(size))
            done += count
        if offset + len(target) == self.nbytes:
            self._held.clear()

    def _fill(self, low: Ints, high: Ints, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with what lies between low and high, one of `_pieces`: of each box that is a
        run of consecutive bytes.
        """
        lows, highs = np.maximum(self._begins, low), np.minimum(self._ends, high)
        for place in np.flatnonzero((lows < highs).all(axis=1)):
            mine = tuple(map(slice, lows[place] - low, highs[place] - low))
            part = out[mine]
            first = int(((lows[place] - self._begins[place]) * self._steps[place]).sum())
            if part.flags.c_contiguous:
                self._read(int(place), first, part.reshape(-1))
            else:
                held = np.empty(part.size, np.uint8)
                self._read(int(place), first, held)
                part[...] = held.reshape(part.shape)

    def _read(self, place: int, first: int, out: npt.NDArray[np.uint8]) -> None:
        box = self._boxes[place]
        if box.strides is None:
            box.file.read_into(box.start + first, out.data)
            return
        if place not in self._held:
            self._held[place] = _in_order(box, item_size(self.info.dtype))
        out[...] = self._held[place][first : first + out.size]


def _in_order(box: Box, item: int) -> npt.NDArray[np.uint8]:
    """The bytes of a box with strides, as if it were contiguous."""
    strides = box.strides or ()
    last = sum((size - 1) * step for size, step in zip(box.shape, strides, strict=True))
    held = np.empty(((last + 1) * item,), np.uint8)
    box.file.read_into(box.start, held.data)
    view = np.lib.stride_tricks.as_strided(
        held, (*box.shape, item), (*(step * item for step in strides), 1), writeable=False
    )
    return np.ascontiguousarray(view).reshape(-1)


def _pieces(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[Ints, Ints]]:
    """The boxes (low, high) in which consecutive elements of a contiguous tensor lie, in order: of
    each, the first axes have one index, one has several, and those behind it are whole.
    """
    if begin == end:
        return
    inner = math.prod(shape[1:])
    row, column = divmod(begin, inner)
    if column or end - begin < inner:
        stop = min(end, (row + 1) * inner)
        for low, high in _pieces(shape[1:], column, stop - row * inner):
            yield np.array([row, *low], np.int64), np.array([row + 1, *high], np.int64)
        begin, row = stop, row + 1
    rows = (end - begin) // inner
    if rows:
        low = np.zeros(len(shape), np.int64)
        high = np.array(shape, np.int64)
        low[0], high[0] = row, row + rows
        yield low, high
        begin += rows * inner
    if begin < end:
        yield from _pieces(shape, begin, end)
