"""A merge of folders on a GPU: the engine's run, with the tensors that are computed going through a
pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pymerge.checkpoint.ahead import copy_bytes
from pymerge.checkpoint.folder import OutputFolder
from pymerge.checkpoint.layout import Shard
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.writer import BLOCK, ShardWriter
from pymerge.dtypes import item_size
from pymerge.engine.cpu import Buffer, Run, is_elementwise
from pymerge.engine.gpu.batches import Work
from pymerge.engine.gpu.device import Device, can_merge, default_memory
from pymerge.engine.gpu.pipeline import LEAST, Pipeline
from pymerge.engine.summary import MergeSummary
from pymerge.errors import ConfigError
from pymerge.messages.arguments import argument
from pymerge.planning.plan import Plan
from pymerge.rules.ties import TiesRule, TiesStats


class GpuRun(Run):
    """One merge with its arithmetic on `device`. memory: bytes of it that may be taken; None takes
    the default.
    """

    def __init__(
        self,
        plan: Plan,
        models: Sequence[OpenModel],
        folder: OutputFolder,
        summary: MergeSummary,
        threads: int,
        progress: Callable[[int, int, str], None] | None,
        device: Device,
        memory: int | None,
    ) -> None:
        self._device = device
        self._works: dict[int, Work | None] = {}
        self._memory = default_memory(device, plan.gpu_memory) if memory is None else memory
        if memory is not None and memory < LEAST:
            raise ConfigError(
                f"{argument('device_memory', memory)} bytes is too little; allow {LEAST} or more"
            )
        super().__init__(plan, models, folder, summary, threads, progress)

    def _new_solver(self) -> Any:
        """What is solved and what goes through the pipeline share the memory."""
        solve = importlib.import_module("pymerge.engine.gpu.solve")
        share = self._memory // 2
        self._memory -= share
        return solve.GpuSolver(self._plan, self._models, self._threads, self._device, share)

    @contextlib.contextmanager
    def _beside(self, shards: Sequence[Shard]) -> Iterator[object]:
        indices = [index for shard in shards for index in shard.tensors]
        works = [work for index in indices if (work := self._work(index)) is not None]
        if not works:
            yield None
            return
        with Pipeline(self._device, works, self._memory, self._known) as pipeline:
            self._pipeline = pipeline
            yield pipeline
        self.notes.append(
            f"computed on {self._device.name} by the kernels of backend {self._device.backend!r}"
        )
        if pipeline.halved:
            self.notes.append(
                f"{self._device.name} ran out of memory: tensors were merged in smaller parts, in "
                f"{pipeline.memory} bytes instead of {self._memory}"
            )

    def _is_elsewhere(self, index: int) -> bool:
        return self._work(index) is not None

    def _from_elsewhere(self, index: int, writer: ShardWriter) -> list[TiesStats]:
        tensor = self._plan.tensors[index]
        kind = (tensor.name, tensor.dtype)
        return self._pipeline.take(index, functools.partial(_write, writer, kind))

    def _work(self, index: int) -> Work | None:
        """What the pipeline is to do for a tensor; None where the CPU makes it: copies, what is
        solved, and more models than the kernels take.
        """
        if index not in self._works:
            self._works[index] = self._new_work(index)
        return self._works[index]

    def _new_work(self, index: int) -> Work | None:
        tensor = self._plan.tensors[index]
        rule = self._rule(tensor)
        if rule is None or tensor.elements == 0 or not can_merge(len(tensor.sources)):
            return None
        inputs = tuple(self._stored(source) for source in tensor.inputs)
        alone = is_elementwise(replace(rule, trim="none") if rule.trim == "random" else rule)
        return Work(index, tensor.elements, inputs, len(tensor.sources), tensor.dtype, rule, alone)

    # Tensors that do not fit on the device: what is taken over the whole of them is found on the
    # host, where all of it is mapped. A part of them can then be merged by itself.

    def _known(self, work: Work) -> TiesRule:
        with self._in_memory(work.inputs) as buffers:
            models = buffers[: work.models]
            base = buffers[work.models] if len(buffers) > work.models else None
            rule: TiesRule = self._native.known(
                models, base, work.dtype, work.elements, work.rule, self._threads
            )
            if rule.elect == "none" or rule.zero_sign == "positive" or rule.majority != 0:
                return rule
            rule = rule.with_known(majority=1)
            balance = 0
            step = BLOCK // 8
            with contextlib.closing(Region.anonymous(BLOCK)) as scratch:
                for first in range(0, work.elements, step):
                    count = min(step, work.elements - first)
                    here = replace(rule, first=first)
                    if rule.trim == "none":
                        here = replace(here, ranks=(count,) * work.models)
                    stats = self._native.ties(
                        [_from(buffer, first) for buffer in models],
                        None if base is None else _from(base, first),
                        (scratch.address, work.dtype),
                        count,
                        here,
                        self._threads,
                    )
                    balance += stats.positive - stats.negative
            return rule.with_known(majority=1 if balance > 0 else -1)

    @contextlib.contextmanager
    def _in_memory(self, inputs: Sequence[StoredTensor]) -> Iterator[list[Buffer]]:
        """The tensors by address: mapped, or read as a whole."""
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


def _write(writer: ShardWriter, kind: tuple[str, str], address: int, nbytes: int) -> None:
    for start in range(0, nbytes, writer.chunk):
        slot = writer.slot(min(writer.chunk, nbytes - start))
        copy_bytes(slot.address, address + start, len(slot.view))
        writer.done(slot, kind)
