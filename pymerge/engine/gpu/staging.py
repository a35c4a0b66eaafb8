"""Reads inputs ahead into pinned buffers, in the order in which the device takes them."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pymerge.checkpoint.stored import StoredTensor
from pymerge.dtypes import item_size
from pymerge.engine.gpu.batches import Batch
from pymerge.engine.gpu.device import Device, Event
from pymerge.engine.gpu.sizes import DeviceSizes

if TYPE_CHECKING:
    from torch import Tensor

_READERS = 8  # threads


@dataclass
class Filled:
    """Bytes begin to end of a batch's inputs, in `buffer` once `reads` are done."""

    begin: int
    end: int
    buffer: Tensor
    reads: list[Future[None]] = field(default_factory=list)


class Staging:
    """The pinned buffers of a merge, allocated once."""

    def __init__(self, device: Device) -> None:
        self._sizes = device.sizes
        self._buffers = [
            device.pinned(self._sizes.in_buffer) for _ in range(self._sizes.in_buffers)
        ]

    def reader(self, batches: Sequence[Batch]) -> Reader:
        return Reader(self._buffers, batches, self._sizes)


class Reader:
    """A context. `next` returns the batches' inputs piece by piece; `give_back` returns each
    buffer.
    """

    def __init__(
        self, buffers: Sequence[Tensor], batches: Sequence[Batch], sizes: DeviceSizes
    ) -> None:
        self._batches = batches
        self._sizes = sizes
        self._free: queue.SimpleQueue[tuple[Tensor, Event | None] | None] = queue.SimpleQueue()
        for buffer in buffers:
            self._free.put((buffer, None))
        self._ready: queue.SimpleQueue[Filled | BaseException] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(_READERS, "pymerge-reader")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pymerge-read", daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._free.put(None)
        self._thread.join()
        self._readers.shutdown(cancel_futures=True)

    def next(self) -> Filled:
        """The next piece, completely read."""
        filled = self._ready.get()
        if isinstance(filled, BaseException):
            raise filled
        for read in filled.reads:
            read.result()
        return filled

    def give_back(self, filled: Filled, event: Event) -> None:
        """The buffer may be refilled once the event has passed."""
        self._free.put((filled.buffer, event))

    def _run(self) -> None:
        try:
            size = self._sizes.in_buffer
            for batch in self._batches:
                for begin in range(0, batch.input_bytes, size):
                    free = self._free.get()
                    if free is None or self._stop.is_set():
                        return
                    buffer, event = free
                    if event is not None:
                        event.synchronize()
                    end = min(begin + size, batch.input_bytes)
                    self._ready.put(self._fill(batch, begin, end, buffer))
        except BaseException as error:  # raised again by `next`, on the thread that merges
            self._ready.put(error)

    def _fill(self, batch: Batch, begin: int, end: int, buffer: Tensor) -> Filled:
        filled = Filled(begin, end, buffer)
        array = (ctypes.c_ubyte * len(buffer)).from_address(buffer.data_ptr())
        memory = memoryview(array).cast("B")
        for stored, offset, place, length in _reads(batch, begin, end):
            target = memory[place - begin : place - begin + length]
            if not stored.at_once:
                stored.read_into(offset, target)
                continue
            for start in range(0, length, self._sizes.piece):
                piece = target[start : start + self._sizes.piece]
                filled.reads.append(self._readers.submit(stored.read_into, offset + start, piece))
        return filled


def _reads(batch: Batch, begin: int, end: int) -> Iterator[tuple[StoredTensor, int, int, int]]:
    """(tensor, its byte, place in the batch, bytes) for the inputs in bytes begin to end of a
    batch.
    """
    for part in batch.parts:
        for stored, place in zip(part.tensor.inputs, part.places, strict=True):
            size = item_size(stored.info.dtype)
            low, high = max(begin, place), min(end, place + part.count * size)
            if low < high:
                yield stored, part.first * size + low - place, low, high - low
