"""The executor of the tensors that a GPU makes, through a pipeline of copies and kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pymerge.backends import native
from pymerge.checkpoint.ahead import Loaded
from pymerge.checkpoint.inputs import Inputs
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.writer import BLOCK, ShardWriter
from pymerge.dtypes import item_size
from pymerge.engine.executor import Buffer, Executor, Made, TensorRules
from pymerge.engine.gpu.batches import DeviceTensor
from pymerge.engine.gpu.device import Device, can_merge, default_memory
from pymerge.engine.gpu.pipeline import Pipeline
from pymerge.errors import ConfigError
from pymerge.messages.arguments import argument
from pymerge.planning.plan import Plan
from pymerge.rules.ties import TiesOptions, TiesRule, is_elementwise, with_majority


def memory_of(device: Device, memory: int | None, useful: int) -> int:
    """Bytes of the device's memory that may be taken, where `memory` were asked for; ConfigError
    for too few. useful: `Plan.gpu_memory`.
    """
    if memory is None:
        return default_memory(device, useful)
    least = device.sizes.least
    if memory < least:
        raise ConfigError(
            f"{argument('device_memory', memory)} bytes is too little; allow {least} or more"
        )
    return memory


class GpuExecutor(Executor):
    """Takes the tensors that the kernels of `ties` can merge: no copies, nothing with too many
    models for them.

    memory: bytes of the device that the pipeline may take. large: memory for a tensor as a whole.
    """

    def __init__(
        self,
        plan: Plan,
        stored: Inputs,
        rules: TensorRules,
        threads: int,
        large: Callable[[int], Region],
        device: Device,
        memory: int,
    ) -> None:
        self._plan = plan
        self._stored = stored
        self._rules = rules
        self._threads = threads
        self._large = large
        self._device = device
        self._memory = memory
        self._pipeline: Pipeline | None = None

    def takes(self, index: int) -> bool:
        tensor = self._plan.tensors[index]
        options = tensor.options
        by_ties = isinstance(options, TiesOptions) and options.trim != "magprune"
        return by_ties and tensor.elements > 0 and can_merge(len(tensor.sources))

    @contextlib.contextmanager
    def running(self, indices: Sequence[int]) -> Iterator[None]:
        """Opens the pipeline, which reads by itself, ahead of the tensors that are asked of it."""
        if not indices:
            yield
            return
        tensors = [self._device_tensor(index) for index in indices]
        with Pipeline(self._device, tensors, self._memory, self._rule_of_parts) as self._pipeline:
            yield

    def make(self, index: int, reads: Iterator[Loaded], writer: ShardWriter) -> Made:
        tensor = self._plan.tensors[index]
        assert self._pipeline is not None
        write = functools.partial(writer.put, tensor=(tensor.name, tensor.dtype))
        return Made([*self._pipeline.take(index, write)])

    def notes(self) -> list[str]:
        if self._pipeline is None:
            return []
        device = self._device
        found = [f"computed on {device.name} by the kernels of backend {device.backend!r}"]
        if self._pipeline.halved:
            found.append(
                f"{device.name} ran out of memory: tensors were merged in smaller parts, in"
                f" {self._pipeline.memory} bytes instead of {self._memory}"
            )
        return found

    def _device_tensor(self, index: int) -> DeviceTensor:
        tensor = self._plan.tensors[index]
        rule = self._rules.of(index)
        assert rule is not None
        inputs = tuple(self._stored(source) for source in tensor.inputs)
        alone = is_elementwise(replace(rule, trim="none") if rule.trim == "random" else rule)
        count = len(tensor.sources)
        return DeviceTensor(index, tensor.elements, inputs, count, tensor.dtype, rule, alone)

    # For tensors that do not fit on the device, thresholds and norms of the whole are found on the
    # host, where all inputs are mapped. Their parts can then be merged one by one.

    def _rule_of_parts(self, whole: DeviceTensor) -> TiesRule:
        with self._in_memory(whole.inputs) as buffers:
            models = buffers[: whole.models]
            base = buffers[whole.models] if len(buffers) > whole.models else None
            rule = native.precomputed(
                models, base, whole.dtype, whole.elements, whole.rule, self._threads
            )

            def balance_of(assumed: TiesRule) -> int:
                balance = 0
                step = BLOCK // 8
                with contextlib.closing(Region.anonymous(BLOCK)) as unused:
                    for first in range(0, whole.elements, step):
                        count = min(step, whole.elements - first)
                        stats = native.ties(
                            [_from(buffer, first) for buffer in models],
                            None if base is None else _from(base, first),
                            (unused.address, whole.dtype),
                            count,
                            assumed.part(first, count),
                            self._threads,
                        )
                        balance += stats.positive - stats.negative
                return balance

            return with_majority(rule, balance_of)

    @contextlib.contextmanager
    def _in_memory(self, inputs: Sequence[StoredTensor]) -> Iterator[list[Buffer]]:
        """(address, dtype) of each tensor: mapped, or read as a whole."""
        buffers: list[Buffer] = []
        with contextlib.ExitStack() as held:
            for stored in inputs:
                if not stored.copies:
                    buffers.append((stored.address(), stored.info.dtype))
                    continue
                region = held.enter_context(contextlib.closing(self._large(stored.nbytes)))
                stored.read_into(0, region.view())
                buffers.append((region.address, stored.info.dtype))
            yield buffers


def _from(buffer: Buffer, first: int) -> Buffer:
    address, dtype = buffer
    return address + first * item_size(dtype), dtype
