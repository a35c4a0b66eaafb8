"""Scope "model" (T7) in a merge of folders: thresholds and the majority sign over all tensors,
found before the first is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from pymerge.backends import native
from pymerge.checkpoint.ahead import rounded
from pymerge.checkpoint.inputs import Inputs
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.types import Source
from pymerge.dtypes import item_size
from pymerge.engine.cpu import merge_unit, units_of
from pymerge.engine.executor import Buffer, TensorRules, loaded_units, read_ahead
from pymerge.engine.sizes import Sizes
from pymerge.interrupt import check
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.rules.ties import TiesOptions, TiesRule, is_elementwise, model_rule

Segment = tuple[list[Buffer], Buffer | None, int]
Large = Callable[[int], Region]


def rules_of(plan: Plan, stored: Inputs, threads: int, large: Large, sizes: Sizes) -> TensorRules:
    """The rules of a plan's tensors; reads every input where the scope is "model". large: allocates
    memory for whole tensors.
    """
    scoped = [
        index
        for index, tensor in enumerate(plan.tensors)
        if tensor.options is not None and tensor.options.over_all_tensors
    ]
    options = plan.tensors[scoped[0]].options if scoped else None
    if not isinstance(options, TiesOptions):
        return TensorRules(plan)
    tensors = [plan.tensors[index] for index in scoped]

    def balance_of(rule: TiesRule) -> int:
        return _balance(scoped, TensorRules(plan, rule), stored, threads, large, sizes)

    with contextlib.ExitStack() as held:
        segments: list[Segment] = []

        def select(ranks: Sequence[int], with_zero: bool) -> tuple[float, ...]:
            if not segments:
                segments.extend(_segments(tensors, stored, large, held))
            more = []
            if with_zero:
                zero = held.enter_context(contextlib.closing(Region.anonymous(8)))
                more.append(_one_zero(segments[0], zero))
            return tuple(native.select([*segments, *more], ranks, threads))

        elements = sum(tensor.elements for tensor in tensors)
        return TensorRules(plan, model_rule(options, elements, select, balance_of))


def _segments(
    tensors: Sequence[PlannedTensor], stored: Inputs, large: Large, held: contextlib.ExitStack
) -> Iterator[Segment]:
    """The inputs of all tensors in memory: where they are mapped, or read, until `held` ends, into
    one region, since the system limits the number of mappings.
    """
    sources = [
        source
        for tensor in tensors
        for source in (*tensor.sources, tensor.base)
        if source is not None
    ]
    inputs = [stored(source) for source in sources]
    copied = sum(rounded(each.nbytes) for each in inputs if each.copies)
    region = held.enter_context(contextlib.closing(large(copied)))
    position = 0

    def buffer(source: Source) -> Buffer:
        nonlocal position
        check()
        each = stored(source)
        if not each.copies:
            return each.address(), each.info.dtype
        each.read_into(0, region.view(position, each.nbytes))
        address = region.address + position
        position += rounded(each.nbytes)
        return address, each.info.dtype

    for tensor in tensors:
        models = [buffer(source) for source in tensor.sources]
        base = None if tensor.base is None else buffer(tensor.base)
        yield models, base, tensor.elements


def _one_zero(like: Segment, region: Region) -> Segment:
    """A segment of a single 0, in the dtypes of another segment."""
    models, base, _ = like
    zeros = [(region.address, dtype) for _, dtype in models]
    return zeros, None if base is None else (region.address, base[1]), 1


def _balance(
    scoped: Sequence[int],
    rules: TensorRules,
    stored: Inputs,
    threads: int,
    large: Large,
    sizes: Sizes,
) -> int:
    """A pass that only counts signs; outputs overwrite each other."""
    found = [(index, rules.plan.tensors[index], rules.of(index)) for index in scoped]
    units = [
        units_of(
            index,
            tensor,
            [stored(source) for source in tensor.inputs],
            rule is None or is_elementwise(rule),
            sizes,
        )
        for index, tensor, rule in found
    ]
    widest = max(
        unit.count * item_size(tensor.dtype)
        for (_, tensor, _), own in zip(found, units, strict=True)
        for unit in own
    )
    balance = 0
    with (
        contextlib.closing(large(max(1, widest))) as unused,
        read_ahead([unit for own in units for unit in own], large, sizes) as ahead,
    ):
        for (_, tensor, rule), own in zip(found, units, strict=True):
            for loaded in loaded_units(ahead, len(own)):
                if rule is not None:
                    out = unused.address, tensor.dtype
                    stats = merge_unit(tensor, rule, loaded, out, threads)
                    balance += stats.positive - stats.negative
    return balance
