"""A GPU made of host memory, for the engine's tests: streams are queues, and how far each has come
is the test's choice.

schedule "late": nothing runs before somebody waits for it. "at once": everything runs when it is
put on a stream. "any": some of what could run does, as a seed says. A wait that the engine forgets
shows as wrong bytes under one of them.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pymerge.engine.gpu.sizes import DeviceSizes
from pymerge.reference import ties as reference
from pymerge.rules.ties import TiesStats

# Small enough that tensors of a few hundred elements fill buffers and are cut.
SMALL = DeviceSizes(
    align=16, scratch=8, least=4 << 10, in_buffer=500, in_buffers=3, piece=300,
    out_buffer=400, out_buffers=2,
)  # fmt: skip


class Event:
    def __init__(self, device: HostDevice, stream: Stream) -> None:
        self.device, self.stream, self.passed = device, stream, False

    def synchronize(self) -> None:
        with self.device.lock:
            while not self.passed:
                self.stream.step(force=True)


class Stream:
    def __init__(self) -> None:
        self.queue: deque[Callable[[], Any] | Event] = deque()

    def step(self, force: bool) -> bool:
        """Run the next thing; False where it has to wait for another stream and is not forced to
        come about.
        """
        head = self.queue[0]
        if isinstance(head, Event):
            if not head.passed and not force:
                return False
            while not head.passed:
                head.stream.step(force=True)
        self.queue.popleft()
        if not isinstance(head, Event):
            head()
        return True


def merge_by_reference(jobs: Sequence[Any]) -> list[TiesStats]:
    return [reference.ties(*job) for job in jobs]


class HostDevice:
    """memory: bytes that it has. sizes: of its buffers. out_at: the numbers of the calls of `merge`
    that run out of memory.
    """

    name = "host memory"
    backend = "test"
    out_of_memory = torch.OutOfMemoryError

    def __init__(
        self,
        schedule: str = "late",
        *,
        memory: int = 1 << 30,
        sizes: DeviceSizes = SMALL,
        ties_many: Callable[[Sequence[Any]], Sequence[Any]] = merge_by_reference,
        out_at: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.schedule, self.capacity, self.ties_many = schedule, memory, ties_many
        self.sizes = sizes
        self.out_at = set(out_at)
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self.merges = self.most_memory = self.jobs = 0

    def free(self) -> int:
        return self.capacity

    def memory(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.capacity:
            raise torch.OutOfMemoryError(f"{nbytes} bytes asked for, {self.capacity} there")
        self.most_memory = max(self.most_memory, nbytes)
        return torch.full((nbytes,), 0xAB, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xCD, dtype=torch.uint8)

    def stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def put(self, stream: Stream, what: Callable[[], Any] | Event) -> None:
        with self.lock:
            stream.queue.append(what)
            if self.schedule == "at once":
                while stream.queue:
                    stream.step(force=True)
            elif self.schedule == "any":
                for _ in range(self.random.randrange(4)):
                    chosen = self.random.choice(self.streams)
                    if chosen.queue:
                        chosen.step(force=False)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        assert target.shape == source.shape
        self.put(stream, lambda: target.copy_(source))

    def merge(self, jobs: Sequence[Any], stream: Stream) -> Callable[[], list[TiesStats]]:
        self.merges += 1
        if self.merges in self.out_at:
            raise torch.OutOfMemoryError("no room for the kernels' own memory")
        self.jobs += len(jobs)
        done: list[TiesStats] = []

        def run() -> None:
            stats = self.ties_many(jobs)
            done.extend(s if isinstance(s, TiesStats) else s.resolve() for s in stats)

        def counts() -> list[TiesStats]:
            assert done, "the counts were asked for before the stream has passed"
            return done

        self.put(stream, run)
        return counts

    def record(self, stream: Stream) -> Event:
        event = Event(self, stream)

        def passed() -> None:
            event.passed = True

        self.put(stream, passed)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        self.put(stream, event)

    @contextlib.contextmanager
    def solving(self) -> Iterator[torch.device]:
        yield torch.device("cpu")

    def finish(self) -> None:
        with self.lock:
            for stream in self.streams:
                while stream.queue:
                    stream.step(force=True)

    def tidy(self) -> None:
        pass
