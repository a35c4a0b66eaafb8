"""Executes the tensors that the CPU makes: copies, and merges by ops, which read their inputs in
place.
"""

from __future__ import annotations

import functools
import heapq
import importlib
from collections.abc import Callable, Iterator, Sequence

from pymerge.backends import native
from pymerge.checkpoint.ahead import Loaded, Unit, copy_bytes, same_bytes
from pymerge.checkpoint.inputs import Inputs
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import Source
from pymerge.checkpoint.writer import ShardWriter
from pymerge.dtypes import BITS, elements, item_size
from pymerge.engine.executor import Buffer, Executor, Made, TensorRules
from pymerge.engine.sizes import Sizes
from pymerge.engine.tensor_ops import merge_buffers
from pymerge.messages.words import some_names
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.rules.options import BufferCall, Counts
from pymerge.rules.ties import TiesOptions, TiesRule, TiesStats, is_elementwise


class CpuExecutor(Executor):
    """Takes every tensor that is not solved by statistics; asked last."""

    def __init__(
        self,
        plan: Plan,
        references: Sequence[str],
        stored: Inputs,
        rules: TensorRules,
        threads: int,
        sizes: Sizes,
    ) -> None:
        self._plan = plan
        self._references = references
        self._stored = stored
        self._rules = rules
        self._threads = threads
        self._sizes = sizes
        self._remarks: dict[str, list[str]] = {}

    def takes(self, index: int) -> bool:
        return self._plan.tensors[index].solve is None

    def units(self, index: int) -> list[Unit]:
        tensor = self._plan.tensors[index]
        inputs = [self._stored(source) for source in tensor.inputs]
        return units_of(index, tensor, inputs, self._may_be_cut(index), self._sizes)

    def _may_be_cut(self, index: int) -> bool:
        tensor, rule = self._plan.tensors[index], self._rules.of(index)
        if rule is not None:
            return is_elementwise(rule)
        return tensor.options is None or tensor.options.may_be_cut(tensor.shape)

    def make(self, index: int, reads: Iterator[Loaded], writer: ShardWriter) -> Made:
        tensor = self._plan.tensors[index]
        rule = self._rules.of(index)
        made = Made()
        for loaded in reads:
            unit = loaded.unit
            slot = writer.slot(unit.count * tensor.nbytes // max(1, tensor.elements))
            out = slot.address, tensor.dtype
            if rule is not None:
                made.stats.append(merge_unit(tensor, rule, loaded, out, self._threads))
            elif tensor.options is not None:
                made.stats.append(self._merge_by_op(tensor, loaded, out))
            else:
                copy_bytes(slot.address, loaded.addresses[0], len(slot.view))
                made.different |= self._differing(tensor, loaded)
            writer.done(slot, (tensor.name, tensor.dtype))
        return made

    def _merge_by_op(self, tensor: PlannedTensor, loaded: Loaded, out: Buffer) -> Counts:
        assert tensor.options is not None
        models, base = _buffers(tensor, loaded)
        unit = loaded.unit
        part = unit.begin, unit.count
        call = BufferCall(
            tensor.key_name, tensor.shape, models, base, out, *part, threads=self._threads
        )
        counts = merge_buffers(call, tensor.options)
        if counts.remark:
            self._remarks.setdefault(counts.remark, []).append(tensor.name)
        return counts

    def notes(self) -> list[str]:
        return [f"{some_names(names)}: {remark}" for remark, names in self._remarks.items()]

    def _differing(self, tensor: PlannedTensor, loaded: Loaded) -> set[str]:
        """References of the models whose duplicates differ from what is copied."""
        inputs = zip(loaded.addresses, loaded.unit.inputs, strict=True)
        first, *others = [(at, stored.info.dtype, size) for at, (stored, _, size) in inputs]
        return {
            self._references[source.model]
            for source, other in zip(tensor.duplicates, others, strict=True)
            if not _are_same(first, other)
        }


def units_of(
    index: int,
    tensor: PlannedTensor,
    inputs: Sequence[StoredTensor],
    may_be_cut: bool,
    sizes: Sizes,
) -> list[Unit]:
    """The units of a tensor: one, or several where it may be cut anywhere."""
    widest = max([item_size(tensor.dtype), *(item_size(stored.info.dtype) for stored in inputs)])
    step = max(1, tensor.elements)
    narrow = any(BITS[stored.info.dtype] < 8 for stored in inputs)
    if not narrow and may_be_cut:
        step = sizes.block // widest
        copied = sum(item_size(stored.info.dtype) for stored in inputs if stored.copies)
        if copied:
            step = min(step, sizes.ring // 3 // copied)
        step = max(64, step - step % 64)
    units = []
    for begin in range(0, max(1, tensor.elements), step):
        count = min(step, tensor.elements - begin)
        parts = tuple((stored, *_part(stored, begin, count)) for stored in inputs)
        units.append(Unit(index, begin, count, parts))
    return units


def merge_unit(
    tensor: PlannedTensor, rule: TiesRule, loaded: Loaded, out: Buffer, threads: int
) -> TiesStats:
    """Merge a tensor, or a part of one, whose inputs are in memory."""
    models, base = _buffers(tensor, loaded)
    unit = loaded.unit
    if unit.count != tensor.elements:
        rule = rule.part(unit.begin, unit.count)
    return native.ties(models, base, out, unit.count, rule, threads)


def _buffers(tensor: PlannedTensor, loaded: Loaded) -> tuple[list[Buffer], Buffer | None]:
    """(models, base) of a unit."""
    buffers = [
        (address, stored.info.dtype)
        for address, (stored, _, _) in zip(loaded.addresses, loaded.unit.inputs, strict=True)
    ]
    models = len(tensor.sources)
    return buffers[:models], buffers[models] if tensor.base is not None else None


def scratch_bytes(plan: Plan, stored: Callable[[Source], StoredTensor], sizes: Sizes) -> int:
    """Disk space beside the result: for inputs that are needed whole but cannot be used in place,
    and for tensors that are made whole and do not fit a block of the writer, two at a time.
    """
    needs, together, made = [0], 0, [0]
    for tensor in plan.tensors:
        inputs = [stored(source) for source in tensor.inputs]
        need = sum(each.nbytes for each in inputs if each.copies)
        if tensor.solve is not None:
            need += tensor.solve.nbytes if need else 0
            if tensor.solve.slices:
                need //= len(tensor.solve.slices)
            if tensor.solve.in_chunks:
                need = need * min(sizes.fisher_chunk, tensor.elements) // max(1, tensor.elements)
        elif tensor.options is None or _is_cut(tensor):
            continue
        elif tensor.options.over_all_tensors:
            together += sum(each.nbytes for each in inputs if each.copies)
        by_parts = tensor.solve is not None and (tensor.solve.slices or not tensor.solve.whole)
        if tensor.nbytes > sizes.block and not by_parts:
            made.append(tensor.nbytes)
        needs.append(need)
    return max(*needs, together) + sum(heapq.nlargest(2, made))


def _is_cut(tensor: PlannedTensor) -> bool:
    """Whether a tensor is merged a few elements at a time, before anything is known of others."""
    options = tensor.options
    if isinstance(options, TiesOptions):
        return _ties_is_cut(options)
    return options is not None and options.may_be_cut(tensor.shape)


@functools.lru_cache
def _ties_is_cut(options: TiesOptions) -> bool:
    """For tensors of any size; many have the same options."""
    return is_elementwise(options.rule(1))


def _are_same(one: tuple[int, str, int], other: tuple[int, str, int]) -> bool:
    """Whether two inputs, (address, dtype, bytes), hold equal values, whatever their dtypes."""
    if one[1] == other[1]:
        return same_bytes(one[0], other[0], one[2])
    same: bool = importlib.import_module("pymerge.checkpoint.gather").same_values(one, other)
    return same


def _part(stored: StoredTensor, begin: int, count: int) -> tuple[int, int]:
    """First byte and number of bytes of some elements; of all of them for dtypes below a byte."""
    total = elements(stored.info.shape)
    if count == total:
        return 0, stored.nbytes
    size = item_size(stored.info.dtype)
    return begin * size, count * size
