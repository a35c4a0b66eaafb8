"""Solving the tensors that have statistics while a merge streams: MaTS, RegMean and Fisher on
mapped inputs.

Weights and packed statistics are read ahead by the engine's own thread, like all inputs. The layers
of a piece of the output file (`pymerge.planning.solves.batches`) are unpacked, solved together and
written in their turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pymerge.backends import native
from pymerge.checkpoint.ahead import Loaded, ReadAhead, Unit
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.dtypes import item_size
from pymerge.engine.non_finite import count_non_finite
from pymerge.errors import NonFiniteError
from pymerge.messages.arguments import argument, takes
from pymerge.ops.mats.api import MatsResult, mats_many
from pymerge.ops.mats.layer import Init, MatsLayer
from pymerge.ops.mats.weighted_average import (
    Damage,
    averaged,
    damage_of,
    fisher_report,
    negative_of,
)
from pymerge.planning.plan import FISHER_CHUNK, Plan, PlannedTensor, Solve, Sum
from pymerge.rules.mats import MatsReport
from pymerge.statistics._file import unpack


def _way_out() -> str:
    if not takes("allow_non_finite"):
        return "mend or leave out the model"
    return (
        f"mend or leave out the model, or let it through ({argument('allow_non_finite', True)}): "
        "the tensor is then the initialisation without it"
    )


@dataclass(frozen=True)
class _Part:
    """A layer of a batch: what is read for it, and the layer of the batch whose input matrices it
    shares.
    """

    index: int
    unit: Unit
    like: int | None


class Solver:
    """The solved tensors of one merge. `reports` fills in the order of the output.

    non_finite: elements of the models and their sums that are NaN or infinite, by the tensor's
        place in the plan.
    """

    def __init__(self, plan: Plan, models: Sequence[OpenModel], threads: int) -> None:
        self.reports: list[MatsReport] = []
        self.non_finite: dict[int, int] = {}
        self._in_inputs: dict[int, int] = {}  # of those, in sums that other layers may share
        self._plan = plan
        self._models = models
        self._threads = threads
        # Of the Fisher tensor at hand, by model.
        self._totals: list[float] = []
        self._damage: Damage = ((), ())
        self._negative: set[int] = set()

    # What is read.

    def parts(self, batch: Sequence[int]) -> list[_Part]:
        """The layers among these tensors that are solved before any of them is written."""
        found: list[_Part] = []
        first: dict[Any, int] = {}
        for index in batch:
            tensor = self._plan.tensors[index]
            solve = tensor.solve
            if solve is None or solve.options.method == "fisher":
                continue
            key = tuple(
                None if each is None else (source.model, each.key)
                for source, each in zip(tensor.sources, solve.inputs, strict=True)
            )
            like = first.setdefault(key, index)
            like_or_none = None if like == index else like
            found.append(_Part(index, self._unit(index, like_or_none is None), like_or_none))
        return found

    def chunks(self, index: int) -> list[Unit]:
        """A tensor of Fisher merging, whose elements stand for themselves, in pieces."""
        tensor = self._plan.tensors[index]
        solve = _of(tensor)
        step = max(1, tensor.elements if solve.whole else FISHER_CHUNK)
        units = []
        for begin in range(0, max(1, tensor.elements), step):
            count = min(step, tensor.elements - begin)
            inputs = [
                (stored, begin * size, count * size)
                for stored in self._stored(tensor, True)
                for size in [item_size(stored.info.dtype)]
            ]
            units.append(Unit(index, begin, count, tuple(inputs)))
        return units

    def _unit(self, index: int, with_inputs: bool) -> Unit:
        tensor = self._plan.tensors[index]
        parts = tuple((s, 0, s.nbytes) for s in self._stored(tensor, with_inputs))
        return Unit(index, 0, tensor.elements, parts)

    def _stored(self, tensor: PlannedTensor, with_inputs: bool) -> list[StoredTensor]:
        """The sources, the base, the input sums, the output sums."""
        solve = _of(tensor)
        found = [self._models[s.model].tensors[s.tensor] for s in tensor.inputs]
        for sums in (solve.inputs if with_inputs else (), solve.outputs or ()):
            for source, each in zip(tensor.sources, sums, strict=False):
                if each is not None:
                    found.append(self._models[source.model].statistics[each.key])
        return found

    # What is computed.

    def solve(self, batch: Sequence[int], ahead: ReadAhead) -> dict[int, torch.Tensor]:
        """The merged tensors of a batch's layers, by their place in the plan, in the output's
        dtype.
        """
        layers: dict[int, MatsLayer] = {}
        for part in self.parts(batch):
            loaded = ahead.next()
            shared = None if part.like is None else layers[part.like].input_grams
            layers[part.index] = self._layer(part.index, loaded, shared)
            if part.like is not None:
                self.non_finite[part.index] += self._in_inputs[part.like]
            ahead.give_back(loaded)
        groups: dict[Any, list[int]] = {}
        for index in layers:
            options = _of(self._plan.tensors[index]).options
            groups.setdefault((options.method, options.options), []).append(index)
        solved: dict[int, torch.Tensor] = {}
        reports: dict[int, MatsReport] = {}
        for (method, options), members in groups.items():
            chosen = dict(options) | ({"solver": "exact"} if method == "regmean" else {})
            with self._quietly():
                results = self._results({index: layers[index] for index in members}, chosen)
            for index, result in zip(members, results, strict=True):
                tensor = self._plan.tensors[index]
                turned = result.weight.T if _of(tensor).transposed else result.weight
                solved[index] = turned.to(_dtype(tensor.dtype)).contiguous()
                reports[index] = result.report
        self.reports += [_noted(reports[index], _of(self._plan.tensors[index])) for index in layers]
        return solved

    def _results(
        self, layers: Mapping[int, MatsLayer], options: Mapping[str, Any]
    ) -> list[MatsResult]:
        """Solve layers with equal options, on the host or, where a run computes elsewhere,
        there.
        """
        return mats_many(layers.values(), **options)

    def notes(self) -> list[str]:
        """What is to be said of where it was computed."""
        return []

    def _layer(self, index: int, loaded: Loaded, shared: Any) -> MatsLayer:
        tensor = self._plan.tensors[index]
        solve = _of(tensor)
        self._count(index, loaded)
        views = iter(_views(loaded))
        weights = [next(views) for _ in tensor.sources]
        base = next(views) if tensor.base is not None else None
        grams = shared
        if grams is None:
            grams = self._grams(solve.inputs, views)
        outputs = None if solve.outputs is None else self._grams(solve.outputs, views)
        # The result comes in the first weight's dtype: rounded once, to the output's, by the
        # caller.
        work = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        turned = [self._turned(w, solve, work if k == 0 else None) for k, w in enumerate(weights)]
        start = None if base is None else self._turned(base, solve, None)
        init: Init
        if solve.options.init == "given":
            assert start is not None
            init = start
        else:
            init = solve.options.init
        return MatsLayer(
            turned, grams, outputs, start, init, dict(solve.options.init_options), tensor.name
        )

    def _turned(self, view: torch.Tensor, solve: Solve, dtype: torch.dtype | None) -> torch.Tensor:
        """A copy that outlives the mapped input, (d_out, d_in)."""
        own = view.to(dtype or view.dtype, copy=True)
        return own.T if solve.transposed else own

    def _grams(
        self, sums: Sequence[Sum | None], views: Iterator[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Means as full matrices; zeros for a model without."""
        found = [None if each is None else unpack(next(views)).div_(each.count) for each in sums]
        like = next(gram for gram in found if gram is not None)
        return [torch.zeros_like(like) if gram is None else gram for gram in found]

    def fisher(self, index: int, loaded: Loaded, out: memoryview) -> None:
        """One chunk of a tensor, into the output; the last one gives the report."""
        tensor = self._plan.tensors[index]
        solve = _of(tensor)
        self._count(index, loaded)
        views = iter(_views(loaded))
        weights = [next(views) for _ in tensor.sources]
        base = next(views) if tensor.base is not None else None
        fishers = [
            torch.zeros(weights[0].shape, dtype=torch.float32, device="cpu")
            if each is None
            else next(views) / each.count
            for each in solve.inputs
        ]
        unit = loaded.unit
        if unit.begin == 0:
            self._totals = [0.0] * len(weights)
            self._negative = set()
            whole = unit.count == tensor.elements
            self._damage = damage_of(weights, fishers) if whole else self._damage_of(tensor)
        work = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        weights[0] = weights[0].to(work)
        init: Init
        if solve.options.init == "given":
            assert base is not None
            init = base
        else:
            init = solve.options.init
        options = dict(solve.options.options)
        merged = averaged(
            weights,
            fishers,
            self._damage,
            init=init,
            base=base,
            init_options=dict(solve.options.init_options),
            **options,
        )
        if len(out):
            target = torch.frombuffer(out, dtype=_dtype(tensor.dtype))
            target.copy_(merged.reshape(-1))
        for k, fisher in enumerate(fishers):
            self._totals[k] += float(fisher.sum(dtype=torch.float64))
        self._negative.update(negative_of(fishers))
        if unit.begin + unit.count >= tensor.elements:
            shares = options.get("task_weights")
            report = fisher_report(tensor.name, self._totals, self._damage, shares, self._negative)
            self.reports.append(_noted(report, solve))

    def _damage_of(self, tensor: PlannedTensor) -> Damage:
        """N1, N2: looked for in all of a tensor before its first chunk is written."""
        stored = iter(self._stored(tensor, True))
        # Where the weights' are an error, the chunk that has them tells.
        allowed = tensor.non_finite == "allow"
        weights = [
            allowed and self._is_bad(x) for x in itertools.islice(stored, len(tensor.sources))
        ]
        if tensor.base is not None:
            next(stored)
        fishers = [each is not None and self._is_bad(next(stored)) for each in _of(tensor).inputs]
        if all(weights):
            raise NonFiniteError(self._sentence(tensor, range(len(weights))))
        return _true(weights), _true(fishers)

    def _is_bad(self, stored: StoredTensor) -> bool:
        return count_non_finite(stored, self._threads) > 0

    def without(self, tensor: PlannedTensor) -> None:
        """Report a floating-point tensor that has no statistics."""
        self.reports.append(
            MatsReport(
                tensor.name,
                "no_statistics",
                "none",
                message=f"the initialisation's value: {tensor.method}",
            )
        )

    def restore(self, held: Sequence[Mapping[str, Any]]) -> None:
        """Take over the reports of a file that an earlier run finished."""
        self.reports += [report_from(each) for each in held]

    def ordered(self) -> list[MatsReport]:
        """All reports, in the order of the plan."""
        place = {tensor.name: index for index, tensor in enumerate(self._plan.tensors)}
        return sorted(self.reports, key=lambda report: place[report.name])

    def _count(self, index: int, loaded: Loaded) -> None:
        """NaN and infinity in what was read. N2: in a model they are an error by default, as for
        every other method.
        """
        tensor = self._plan.tensors[index]
        counts = [
            native.count_non_finite(
                (address, stored.info.dtype),
                length // item_size(stored.info.dtype),
                self._threads,
            )
            for address, (stored, _, length) in zip(
                loaded.addresses, loaded.unit.inputs, strict=True
            )
        ]
        self.non_finite[index] = self.non_finite.get(index, 0) + sum(counts)
        own = sum(each is not None for each in _of(tensor).outputs or ())
        self._in_inputs[index] = sum(counts[len(tensor.inputs) : len(counts) - own])
        count = len(tensor.sources)
        bad = [k for k in range(len(tensor.inputs)) if counts[k]]
        in_base = bad[-1:] == [count]
        allowed = tensor.non_finite == "allow" and not in_base
        if bad and not (allowed and len(bad) < count):
            raise NonFiniteError(self._sentence(tensor, bad))

    def _sentence(self, tensor: PlannedTensor, bad: Iterable[int]) -> str:
        names = ", ".join(self._models[tensor.inputs[k].model].reference for k in bad)
        return f"tensor {tensor.name} holds NaN or infinite values in {names}; {_way_out()}"

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """Solve with the engine's number of threads; what is warned of is in the reports."""
        before = torch.get_num_threads()
        if self._threads:
            # No more than there are processors: torch ends the process where the system starts no
            # further thread.
            torch.set_num_threads(min(self._threads, os.cpu_count() or 1))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*keeps its initialisation")
                yield
        finally:
            torch.set_num_threads(before)


def report_from(held: Mapping[str, Any]) -> MatsReport:
    """A report from `MatsReport.as_dict`, numbers that were not finite as NaN."""
    values: dict[str, Any] = {}
    for each in fields(MatsReport):
        value = held[each.name]
        if each.name == "trace_shares":
            value = tuple(value)
        values[each.name] = math.nan if value is None else value
    return MatsReport(**values)


def _noted(report: MatsReport, solve: Solve) -> MatsReport:
    if not solve.note:
        return report
    text = "; ".join(filter(None, (report.message, solve.note)))
    return replace(report, message=text)


def _true(flags: Sequence[bool]) -> tuple[int, ...]:
    return tuple(k for k, flag in enumerate(flags) if flag)


def _of(tensor: PlannedTensor) -> Solve:
    assert tensor.solve is not None
    return tensor.solve


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _views(loaded: Loaded) -> Iterator[torch.Tensor]:
    """The inputs where they lie. A view must not outlive the unit; parts of a tensor come flat."""
    for address, (stored, _, length) in zip(loaded.addresses, loaded.unit.inputs, strict=True):
        dtype = _dtype(stored.info.dtype)
        if length == 0:
            yield torch.empty(stored.info.shape, dtype=dtype, device="cpu")
            continue
        memory = (ctypes.c_ubyte * length).from_address(address)
        flat = torch.frombuffer(memory, dtype=dtype)
        yield flat.view(stored.info.shape) if length == stored.nbytes else flat
