"""Executes the tensors of model folders that are merged by statistics: reads and unpacks what they
need and hands it to the solver, while the merge streams.

Weights and packed statistics are read ahead like all inputs. The layers of a part of the output
file (`pymerge.planning.solves.batches`) are solved together and written in the order of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from pymerge.backends import native
from pymerge.checkpoint.ahead import Loaded, Unit
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.writer import ShardWriter
from pymerge.dtypes import item_size, torch_dtype
from pymerge.engine.executor import Executor, Made
from pymerge.engine.non_finite import count_non_finite
from pymerge.engine.solver import (
    HostSolver,
    Layer,
    LayerSolver,
    Solved,
    merge_by_fisher,
    refuse_non_finite,
    report_of_fisher,
    slices_of,
    solve_layers,
    solve_of,
    with_zeros,
)
from pymerge.engine.views import tensor_at, threads_of_torch
from pymerge.messages.arguments import argument, takes
from pymerge.ops.mats.weighted_average import Damage, damage_of, negative_of
from pymerge.planning.plan import Plan, PlannedTensor, Sum
from pymerge.planning.solves import leaders
from pymerge.rules.report import of_slices
from pymerge.statistics._file import unpack


class StatisticsExecutor(Executor):
    """Makes the tensors that the plan solves. solver: where to solve; by default on the host.

    Fisher merging is one pass over its inputs, on the CPU, `fisher_chunk` elements at a time.
    """

    def __init__(
        self,
        plan: Plan,
        models: Sequence[OpenModel],
        threads: int,
        fisher_chunk: int,
        solver: LayerSolver | None = None,
    ) -> None:
        self._plan = plan
        self._models = models
        self._references = [model.reference for model in models]
        self._threads = threads
        self._fisher_chunk = fisher_chunk
        self._solver = solver or HostSolver()
        self._solved: dict[int, Solved] = {}
        self._non_finite: dict[int, int] = {}  # non-finite elements of models and sums, by tensor

    def takes(self, index: int) -> bool:
        return self._plan.tensors[index].solve is not None

    def notes(self) -> list[str]:
        return self._solver.notes()

    # What is read.

    def together(self, batch: Sequence[int]) -> list[Unit]:
        return [
            self._unit(index, leader is None) for index, leader in self._layers_of(batch).items()
        ]

    def units(self, index: int) -> list[Unit]:
        """A tensor of a Fisher merge in pieces, since its elements are independent; several
        matrices each with its statistics.
        """
        tensor = self._plan.tensors[index]
        solve = solve_of(tensor)
        if solve.slices:
            return [self._slice(index, place, part) for place, part in enumerate(slices_of(tensor))]
        if solve.options.method != "fisher":
            return []
        step = max(1, tensor.elements if solve.whole else self._fisher_chunk)
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

    def _slice(self, index: int, place: int, part: PlannedTensor) -> Unit:
        inputs = []
        for number, stored in enumerate(self._stored(part, True)):
            own = part.elements * item_size(stored.info.dtype)
            is_weight = number < len(part.inputs)
            inputs.append((stored, place * own, own) if is_weight else (stored, 0, stored.nbytes))
        return Unit(index, place * part.elements, part.elements, tuple(inputs))

    def _layers_of(self, batch: Sequence[int]) -> dict[int, int | None]:
        return leaders({index: self._plan.tensors[index] for index in batch})

    def _unit(self, index: int, with_inputs: bool) -> Unit:
        tensor = self._plan.tensors[index]
        parts = tuple((s, 0, s.nbytes) for s in self._stored(tensor, with_inputs))
        return Unit(index, 0, tensor.elements, parts)

    def _stored(self, tensor: PlannedTensor, with_inputs: bool) -> list[StoredTensor]:
        """The stored sources, base, input sums and output sums, in this order."""
        solve = solve_of(tensor)
        found = [self._models[s.model].tensors[s.tensor] for s in tensor.inputs]
        for sums in (solve.inputs if with_inputs else (), solve.outputs or ()):
            for source, each in zip(tensor.sources, sums, strict=False):
                if each is not None:
                    found.append(self._models[source.model].statistics[each.key])
        return found

    # What is computed.

    def begin(self, batch: Sequence[int], reads: Iterator[Loaded]) -> None:
        layers: dict[int, Layer] = {}
        in_inputs: dict[int, int] = {}  # what is not finite in the sums that others may share
        leaders = self._layers_of(batch)
        for (index, leader), loaded in zip(leaders.items(), reads, strict=True):
            shared = None if leader is None else layers[leader].inputs
            in_inputs[index] = self._count(index, loaded)
            layers[index] = self._layer(self._plan.tensors[index], loaded, shared)
            if leader is not None:
                self._non_finite[index] += in_inputs[leader]
        with threads_of_torch(self._threads):
            results = solve_layers(list(layers.values()), self._solver)
        self._solved = dict(zip(layers, results, strict=True))

    def make(self, index: int, reads: Iterator[Loaded], writer: ShardWriter) -> Made:
        tensor = self._plan.tensors[index]
        solved = self._solved.pop(index, None)
        if solved is None and solve_of(tensor).slices:
            return self._slices(index, reads, writer)
        if solved is None:
            return self._fisher(index, reads, writer)
        writer.put(solved.tensor.data_ptr(), tensor.nbytes, (tensor.name, tensor.dtype))
        return Made(non_finite=self._non_finite[index], report=solved.report)

    def _layer(
        self, tensor: PlannedTensor, loaded: Loaded, shared: list[torch.Tensor] | None
    ) -> Layer:
        """A layer of copies, which outlive the buffers that were read into."""
        solve = solve_of(tensor)
        views = iter(_views(loaded))
        weights = [next(views).clone().reshape(tensor.shape) for _ in tensor.sources]
        base = next(views).clone().reshape(tensor.shape) if tensor.base is not None else None
        inputs = _means(tensor, solve.inputs, views) if shared is None else shared
        outputs = None if solve.outputs is None else _means(tensor, solve.outputs, views)
        return Layer(tensor, weights, base, inputs, outputs)

    def _slices(self, index: int, reads: Iterator[Loaded], writer: ShardWriter) -> Made:
        """One matrix after the other."""
        tensor = self._plan.tensors[index]
        reports = []
        for part, loaded in zip(slices_of(tensor), reads, strict=True):
            self._count(index, loaded)
            with threads_of_torch(self._threads):
                (solved,) = solve_layers([self._layer(part, loaded, None)], self._solver)
            nbytes = part.elements * item_size(tensor.dtype)
            writer.put(solved.tensor.data_ptr(), nbytes, (tensor.name, tensor.dtype))
            reports.append(solved.report)
        report = of_slices(tensor.name, reports)
        return Made(non_finite=self._non_finite[index], report=report)

    def _fisher(self, index: int, reads: Iterator[Loaded], writer: ShardWriter) -> Made:
        tensor = self._plan.tensors[index]
        totals = [0.0] * len(tensor.sources)
        damage: Damage = ((), ())
        negative: set[int] = set()
        for loaded in reads:
            unit = loaded.unit
            slot = writer.slot(unit.count * tensor.nbytes // max(1, tensor.elements))
            self._count(index, loaded)
            views = iter(_views(loaded))
            weights = [next(views) for _ in tensor.sources]
            base = next(views) if tensor.base is not None else None
            fishers = [
                torch.zeros(weights[0].shape, dtype=torch.float32, device="cpu")
                if each is None
                else next(views) / each.count
                for each in solve_of(tensor).inputs
            ]
            if unit.begin == 0:
                whole = unit.count == tensor.elements
                damage = damage_of(weights, fishers) if whole else self._damage_of(tensor)
            merged = merge_by_fisher(tensor, weights, base, fishers, damage)
            if len(slot.view):
                target = torch.frombuffer(slot.view, dtype=torch_dtype(tensor.dtype))
                target.copy_(merged.reshape(-1))
            for k, fisher in enumerate(fishers):
                totals[k] += float(fisher.sum(dtype=torch.float64))
            negative.update(negative_of(fishers))
            writer.done(slot, (tensor.name, tensor.dtype))
        report = report_of_fisher(tensor, totals, damage, negative)
        return Made(non_finite=self._non_finite[index], report=report)

    def _damage_of(self, tensor: PlannedTensor) -> Damage:
        """N1 and N2, over the whole tensor before its first chunk is written."""
        stored = iter(self._stored(tensor, True))
        # If non-finite weights are an error, the chunk that holds them raises it.
        allowed = tensor.non_finite == "allow"
        count = len(tensor.sources)
        weights = [allowed and self._is_bad(x) for x in itertools.islice(stored, count)]
        if tensor.base is not None:
            next(stored)
        fishers = [
            each is not None and self._is_bad(next(stored)) for each in solve_of(tensor).inputs
        ]
        bad = [k for k, is_bad in enumerate(weights) if is_bad]
        self._refuse(tensor, bad)
        return tuple(bad), tuple(k for k, is_bad in enumerate(fishers) if is_bad)

    def _is_bad(self, stored: StoredTensor) -> bool:
        return count_non_finite(stored, self._threads) > 0

    def _count(self, index: int, loaded: Loaded) -> int:
        """Count NaN and infinity in what was read. Returns the count of the input sums."""
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
        self._non_finite[index] = self._non_finite.get(index, 0) + sum(counts)
        self._refuse(tensor, [k for k in range(len(tensor.inputs)) if counts[k]])
        own = sum(each is not None for each in solve_of(tensor).outputs or ())
        return sum(counts[len(tensor.inputs) : len(counts) - own])

    def _refuse(self, tensor: PlannedTensor, bad: Sequence[int]) -> None:
        way = argument("allow_non_finite", True) if takes("allow_non_finite") else ""
        refuse_non_finite(tensor, bad, self._references, way)


def _means(
    tensor: PlannedTensor, sums: Sequence[Sum | None], views: Iterator[torch.Tensor]
) -> list[torch.Tensor]:
    """The means as full matrices; zeros for a model without statistics."""
    found = [None if each is None else unpack(next(views)).div_(each.count) for each in sums]
    return with_zeros(tensor, found)


def _views(loaded: Loaded) -> Iterator[torch.Tensor]:
    """Views of the inputs in place, flat where they are parts. They must not outlive the unit."""
    for address, (stored, _, length) in zip(loaded.addresses, loaded.unit.inputs, strict=True):
        whole = length == stored.nbytes
        shape = stored.info.shape if whole else (length // item_size(stored.info.dtype),)
        yield tensor_at((address, stored.info.dtype), shape)
