"""What the engine asks of a GPU. The only module of pymerge.engine.gpu that calls torch.cuda; tests
substitute host memory.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pymerge.engine.gpu.sizes import SIZES, DeviceSizes
from pymerge.errors import ConfigError, DeviceError
from pymerge.messages.arguments import argument, without
from pymerge.rules.ties import TiesRule, TiesStats

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

DEVICES = "'cpu', 'cuda', 'cuda:1' (a GPU's number)"  # as messages tell them
AUTO = -1  # in a GPU's number's place: the plan decides
_SPARED = 0.1  # of what is free then: other programs' needs change
_MOST_MODELS = 64  # of the kernels

Job = tuple["Sequence[Tensor]", "Tensor | None", TiesRule, "Tensor"]


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Return when the stream has passed this point."""


class Device(Protocol):
    """Memory, streams and kernels of one GPU. Work on a stream runs in order, concurrently with
    other streams.
    """

    name: str
    backend: str
    sizes: DeviceSizes

    @property
    def out_of_memory(self) -> type[BaseException]:
        """The exceptions that `memory` and `merge` raise where memory runs out."""

    def free(self) -> int:
        """Bytes that could be allocated now."""

    def memory(self, nbytes: int) -> Tensor:
        """A buffer on the device, usable by every stream from now on."""

    def pinned(self, nbytes: int) -> Tensor:
        """A buffer of pinned host memory, for copies that overlap with everything else."""

    def stream(self) -> Any:
        """A new stream."""

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Enqueue a copy of bytes on a stream."""

    def merge(self, jobs: Sequence[Job], stream: Any) -> Callable[[], list[TiesStats]]:
        """Enqueue the merge of many tensors on a stream. The result, when called after the stream
        has passed, returns their counts.
        """

    def record(self, stream: Any) -> Event:
        """An event at the stream's current end."""

    def wait(self, stream: Any, event: Event) -> None:
        """Make a stream wait for an event of another one."""

    def solving(self) -> contextlib.AbstractContextManager[torch.device]:
        """A context in which torch's operations run on this device, which it yields."""

    def finish(self) -> None:
        """Wait for every stream."""

    def tidy(self) -> None:
        """Return freed memory to the device."""


class TorchDevice:
    """A GPU by way of torch, with the preferred backend of the package that runs on it."""

    def __init__(self, index: int, backend: str, ties_many: Callable[..., Any]) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", index)
        self._ties_many = ties_many
        self.name = torch.cuda.get_device_name(self._device)
        self.backend = backend
        self.sizes = SIZES
        self._counts = self.stream()

    @property
    def out_of_memory(self) -> type[BaseException]:
        return self._torch.OutOfMemoryError

    def free(self) -> int:
        free, _ = self._torch.cuda.mem_get_info(self._device)
        return int(free)

    def memory(self, nbytes: int) -> Tensor:
        block = self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
        self.finish()  # the memory may be one that a kernel still reads
        return block

    def pinned(self, nbytes: int) -> Tensor:
        with self._torch.cuda.device(self._device):
            return self._torch.empty(nbytes, dtype=self._torch.uint8, device="cpu", pin_memory=True)

    def stream(self) -> torch.cuda.Stream:
        return self._torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
        with self._torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def merge(
        self, jobs: Sequence[Job], stream: torch.cuda.Stream
    ) -> Callable[[], list[TiesStats]]:
        with self._torch.cuda.stream(stream):
            pending = self._ties_many(jobs)

        def counts() -> list[TiesStats]:
            # On a separate stream: the kernels' stream has later work enqueued by now.
            with self._torch.cuda.stream(self._counts):
                return [one.resolve() for one in pending]

        return counts

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = self._torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: Any) -> None:
        stream.wait_event(event)

    @contextlib.contextmanager
    def solving(self) -> Iterator[torch.device]:
        with self._torch.cuda.device(self._device):  # where Triton launches
            yield self._device

    def finish(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def tidy(self) -> None:
        with self._torch.cuda.device(self._device):
            self._torch.cuda.empty_cache()


def parse_device(device: str) -> int | None:
    """The number of the GPU that "cuda" or "cuda:N" names, None for "cpu", AUTO for "auto";
    ConfigError for anything else.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device, re.ASCII) if isinstance(device, str) else None
    if match is not None:
        return int(match.group(1) or 0)
    if device in ("cpu", "auto"):
        return None if device == "cpu" else AUTO
    raise ConfigError(f"{argument('device', device)} is not one of {DEVICES}, 'auto'")


def _named(index: int) -> str:
    return f"cuda:{index}" if index else "cuda"


def open_device(index: int) -> TorchDevice:
    """The GPU of that number; DeviceError with the way out where it cannot be used."""
    if importlib.util.find_spec("torch") is None:
        raise DeviceError(
            f"{argument('device', _named(index))} takes torch, which is not installed; pip install"
            f" torch, or {without('device', 'cpu')}"
        )
    import torch

    from pymerge.backends import registry

    elsewhere = f"or {without('device', 'cpu')}"
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            raise DeviceError(
                f"torch {torch.__version__} is a build without CUDA; install one that has it,"
                f" {elsewhere}"
            )
        raise DeviceError(
            "no CUDA device is visible to torch; see what nvidia-smi and CUDA_VISIBLE_DEVICES say, "
            + elsewhere
        )
    count = torch.cuda.device_count()
    if index >= count:
        names = ", ".join(f"cuda:{i}" for i in range(count))
        raise DeviceError(f"{argument('device', f'cuda:{index}')} is not there; torch sees {names}")
    try:
        backend, ties_many = registry.pick_many()
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"{argument('device', _named(index))}: {error}; mend that, {elsewhere}"
        ) from None
    return TorchDevice(index, backend, ties_many)


def can_merge(models: int) -> bool:
    """Whether the kernels take that many models; otherwise the CPU does."""
    return models <= _MOST_MODELS


def default_memory(device: Device, useful: int) -> int:
    """Nine tenths of what is free, at most what there is a use for (`Plan.gpu_memory`)."""
    return min(useful, int((1 - _SPARED) * device.free()))
