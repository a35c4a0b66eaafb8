"""Copies in, kernels and copies out overlap, each on a stream of its own, in a ring of device
memory.

The thread that calls `take` submits work to the streams and copies results out of pinned memory; it
waits for the device only when a result is needed. A batch's memory is reused once its outputs have
left the device.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pymerge.dtypes import item_size, torch_dtype
from pymerge.engine.gpu.batches import Batch, DeviceTensor, Part, batches, needs_whole, room_for
from pymerge.engine.gpu.device import Device, Event, Job
from pymerge.engine.gpu.staging import Reader, Staging
from pymerge.errors import DeviceError
from pymerge.messages.arguments import without
from pymerge.rules.ties import TiesRule, TiesStats

if TYPE_CHECKING:
    from torch import Tensor

Sink = Callable[[int, int], None]
Whole = Callable[[DeviceTensor], TiesRule]


@dataclass
class _Issued:
    """A batch on the device, at offset `place` of the ring."""

    batch: Batch
    place: int
    merged: Event
    counts: Callable[[], list[TiesStats]]
    stats: list[TiesStats] = field(default_factory=list)
    copies: deque[_Copy] = field(default_factory=deque)


@dataclass
class _Copy:
    """Bytes begin to end of a batch on their way to a pinned buffer, once one is free."""

    issued: _Issued
    begin: int
    end: int
    buffer: Tensor | None = None
    arrived: Event | None = None


class Pipeline:
    """Use as a context; `take` gives the tensors' results in their order.

    whole: finds what a tensor that has to be cut decides as a whole; called once for each, in
        order, on a thread of its own.
    memory: bytes on the device. halved: how often there was not that much.
    """

    def __init__(
        self, device: Device, tensors: Sequence[DeviceTensor], memory: int, whole: Whole
    ) -> None:
        self._device = device
        self._tensors = tensors
        self._whole = whole
        self._rules: dict[int, TiesRule] = {}
        self._finding: dict[int, Future[TiesRule]] = {}
        self._finder = ThreadPoolExecutor(1, "pymerge-whole")
        self._next = 0  # position among the tensors of what `take` gives next
        self.memory = memory
        self.halved = 0
        self._staging = Staging(device)
        self._in, self._compute, self._out = (device.stream() for _ in range(3))
        self._out_buffers = [
            device.pinned(device.sizes.out_buffer) for _ in range(device.sizes.out_buffers)
        ]
        self._running = contextlib.ExitStack()
        self._ring: Tensor | None = None

    def __enter__(self) -> Pipeline:
        self._restart(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._finder.shutdown(cancel_futures=True)
        self._stop()

    def take(self, index: int, sink: Sink) -> list[TiesStats]:
        """The result of the next tensor, whose index is given for proof: sink(address, bytes) is
        called with its bytes in order. Returns the counts of its parts.
        """
        tensor = self._tensors[self._next]
        assert tensor.index == index
        stats, done = [], 0
        while done < tensor.elements:
            issued = self._front(done)
            number = next(
                n for n, part in enumerate(issued.batch.parts) if part.tensor.index == index
            )
            part = issued.batch.parts[number]
            self._empty(issued, part, sink)
            if not issued.stats:
                issued.stats = issued.counts()
            stats.append(issued.stats[number])
            done += part.count
            if part is issued.batch.parts[-1]:
                self._issued.popleft()
        self._next += 1
        return stats

    # Enqueueing work on the device.

    def _restart(self, begin: int) -> None:
        """Start over from element `begin` of the next tensor, with as much memory as is left."""
        while True:
            self._stop()
            try:
                self._ring = self._device.memory(room_for(self.memory, self._device.sizes))
                break
            except self._device.out_of_memory as error:
                self._halve(error)
        self._to_issue = deque(
            batches(self._tensors[self._next :], self.memory, begin, self._device.sizes)
        )
        self._issued: deque[_Issued] = deque()
        self._to_copy: deque[_Copy] = deque()
        self._free_buffers = deque(self._out_buffers)
        self._find_next()
        self._reader: Reader = self._running.enter_context(
            self._staging.reader(list(self._to_issue))
        )

    def _stop(self) -> None:
        self._running.close()
        if self._ring is not None:
            self._device.finish()
            self._ring = None
            self._issued.clear()
            self._device.tidy()

    def _halve(self, error: BaseException) -> None:
        self.halved += 1
        self.memory //= 2
        if self.memory < self._device.sizes.least:
            raise DeviceError(
                f"{self._device.name} has no room even for parts of {2 * self.memory} bytes"
                f" ({error}); free GPU memory (nvidia-smi lists who has it), or"
                f" {without('device', 'cpu')}"
            ) from error

    def _front(self, done: int) -> _Issued:
        """The oldest batch, after issuing as many behind it as fit. Called between batches, before
        any output of the oldest is taken, so that all can be restarted where memory runs out.
        """
        while True:
            try:
                if not self._issued or self._untouched(self._issued[0], done):
                    self._issue_all()
                return self._issued[0]
            except self._device.out_of_memory as error:
                self._halve(error)
                self._restart(done)

    def _untouched(self, issued: _Issued, done: int) -> bool:
        first = issued.batch.parts[0]
        return first.tensor is self._tensors[self._next] and first.first == done

    def _issue_all(self) -> None:
        while self._to_issue:
            place = self._room(self._to_issue[0].nbytes)
            if place is None:
                return
            self._issue(self._to_issue[0], place)
            self._to_issue.popleft()

    def _room(self, nbytes: int) -> int | None:
        """The offset of `nbytes` free bytes in the ring, if any."""
        assert self._ring is not None
        if not self._issued:
            return 0
        size, oldest, newest = len(self._ring), self._issued[0], self._issued[-1]
        end = newest.place + newest.batch.nbytes
        if newest.place >= oldest.place:
            if end + nbytes <= size:
                return end
            return 0 if nbytes <= oldest.place else None
        return end if end + nbytes <= oldest.place else None

    def _issue(self, batch: Batch, place: int) -> None:
        assert self._ring is not None
        cut = needs_whole(batch)
        if cut is not None and cut.index not in self._rules:
            self._rules[cut.index] = self._finding.pop(cut.index).result()
            self._find_next()
        memory = self._ring[place : place + batch.nbytes]
        begin = 0
        while begin < batch.input_bytes:
            filled = self._reader.next()
            length = filled.end - filled.begin
            self._device.copy(memory[filled.begin : filled.end], filled.buffer[:length], self._in)
            self._reader.give_back(filled, self._device.record(self._in))
            begin = filled.end
        self._device.wait(self._compute, self._device.record(self._in))
        counts = self._device.merge(
            [self._job(part, memory) for part in batch.parts], self._compute
        )
        issued = _Issued(batch, place, self._device.record(self._compute), counts)
        self._issued.append(issued)
        size = self._device.sizes.out_buffer
        for begin in range(batch.input_bytes, batch.nbytes, size):
            copy = _Copy(issued, begin, min(begin + size, batch.nbytes))
            issued.copies.append(copy)
            self._to_copy.append(copy)
        self._copy_out()

    def _find_next(self) -> None:
        """Have another thread find the rule of the next tensor that is cut."""
        for batch in self._to_issue:
            cut = needs_whole(batch)
            if cut is not None and cut.index not in self._rules:
                if cut.index not in self._finding:
                    self._finding[cut.index] = self._finder.submit(self._whole, cut)
                return

    def _job(self, part: Part, memory: Tensor) -> Job:
        def view(place: int, dtype: str) -> Tensor:
            taken = memory[place : place + part.count * item_size(dtype)]
            return taken.view(torch_dtype(dtype))

        tensor = part.tensor
        inputs = [
            view(place, stored.info.dtype)
            for place, stored in zip(part.places, tensor.inputs, strict=True)
        ]
        rule = self._rules.get(tensor.index, tensor.rule)
        if not part.all_of_it:
            rule = rule.part(part.first, part.count)
        base = inputs[tensor.models] if len(inputs) > tensor.models else None
        return inputs[: tensor.models], base, rule, view(part.out, tensor.dtype)

    # Taking results from the device.

    def _copy_out(self) -> None:
        """Start copies, oldest first, while buffers are free."""
        while self._to_copy and self._free_buffers:
            copy = self._to_copy.popleft()
            assert self._ring is not None
            copy.buffer = self._free_buffers.popleft()
            place = copy.issued.place
            self._device.wait(self._out, copy.issued.merged)
            source = self._ring[place + copy.begin : place + copy.end]
            self._device.copy(copy.buffer[: copy.end - copy.begin], source, self._out)
            copy.arrived = self._device.record(self._out)

    def _empty(self, issued: _Issued, part: Part, sink: Sink) -> None:
        """Hand the output of a part to the sink."""
        at, end = part.out, part.out + part.out_bytes
        while at < end:
            self._let_go(issued, at)
            copy = issued.copies[0]
            assert copy.buffer is not None and copy.arrived is not None
            copy.arrived.synchronize()
            stop = min(end, copy.end)
            sink(copy.buffer.data_ptr() + at - copy.begin, stop - at)
            at = stop
        self._let_go(issued, issued.batch.nbytes if part is issued.batch.parts[-1] else at)

    def _let_go(self, issued: _Issued, at: int) -> None:
        """Release the buffers of a batch's bytes before `at` to the next copies."""
        while issued.copies and issued.copies[0].end <= at:
            copy = issued.copies.popleft()
            assert copy.buffer is not None  # copies start in order, so none waits for a later one
            self._free_buffers.append(copy.buffer)
            self._copy_out()
