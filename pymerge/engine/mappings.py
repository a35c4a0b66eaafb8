"""State dicts as the models of a merge: headers for the plan, access to tensors, a place for the
result, and errors and warnings in the terms of the Python API.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from pymerge.backends import registry
from pymerge.checkpoint.types import (
    ModelHeader,
    Source,
    StatisticsHeader,
    StatisticsSource,
    TensorInfo,
)
from pymerge.dtypes import BITS, MERGEABLE, elements, name_of, torch_dtype
from pymerge.engine.tensor_ops import merge_tensor
from pymerge.errors import MismatchError, NonFiniteError
from pymerge.messages.arguments import argument, of_model
from pymerge.messages.words import some_names, type_of
from pymerge.ops.differences import NotMerged, warn_of_not_merged
from pymerge.ops.memory import check_readable, check_tensor, new_like, raw_bytes, why_unreadable
from pymerge.ops.sharded.layout import is_dtensor, local, mesh_of
from pymerge.ops.sharded.owners import agreed_owners
from pymerge.ops.sharded.sums import largest
from pymerge.ops.tensors import (
    check_differences,
    check_floats,
    check_out,
    check_out_dict,
    check_spreads,
    check_tensors,
    checked_tensors,
    of_tensor,
)
from pymerge.ops.ties.api import merge_many
from pymerge.ops.ties.overflow import count_all_non_finite, report_overflow
from pymerge.ops.ties.run import TensorCall, refuse_non_finite
from pymerge.planning.coverage import embedding, is_output
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.planning.planner import build_plan
from pymerge.planning.unmergeable import refusals
from pymerge.recipe.model import MergeRecipe
from pymerge.rules.options import Counts, OpOptions
from pymerge.rules.report import MatsReport
from pymerge.rules.ties import TiesOptions
from pymerge.rules.types import Backend

StateDict = Mapping[str, torch.Tensor]


class Mappings:
    """The models, then the base, then a model that solvers start from, in the order in which a
    recipe numbers them.

    Reads every tensor once for its header. Raises ValueError and TypeError for what is no state
    dict of tensors that can be read. shards: whether DTensors can.
    """

    def __init__(
        self,
        models: Sequence[StateDict],
        base: StateDict | None,
        start: StateDict | None = None,
        shards: bool = False,
    ) -> None:
        self.models = models
        self.base = base
        self._shards = shards
        self._kept: dict[tuple[int, str], torch.Tensor] | None = None
        self.states = [*models, *(() if base is None else (base,))]
        self.references = [of_model("models", k) for k in range(len(models))]
        if base is not None:
            self.references.append(argument("base"))
        infos: list[dict[str, TensorInfo]] = [{} for _ in self.states]
        # What was checked of plain dicts, which give the same tensor again; other mappings may read
        # each when asked, so that holding them would hold the models.
        self._checked: list[dict[str, torch.Tensor]] = [{} for _ in self.states]
        plain = [type(state) in (dict, OrderedDict) for state in self.states]
        self.sharded = False  # whether any tensor is a DTensor
        # Floating-point tensors of 8 bits or fewer, which can only be copied
        self._not_merged: dict[str, torch.Tensor] = {}
        for place, name, tensor in checked_tensors(models, base, shards):
            if not isinstance(name, str):
                raise TypeError(
                    f"{self.references[place]} has a key that is {type_of(name)}; the names of"
                    " tensors are text"
                )
            info = TensorInfo(name, name_of(tensor.dtype), tuple(tensor.shape))
            if info.dtype not in MERGEABLE:
                where = self._where(place, name)
                if info.dtype not in BITS:
                    check_floats(where, tensor, "merge", readable=True)
                if tensor.is_floating_point():
                    self._not_merged[where] = tensor
            infos[place][name] = info
            self.sharded = self.sharded or is_dtensor(tensor)
            if plain[place]:
                self._checked[place][name] = tensor
        if self.sharded:
            check_spreads(models, base)
        if start is not None:
            self.states.append(start)
            self._checked.append({})
            self.references.append("init")
            infos.append(_infos_of_start(start, infos[0]))
        self.headers = [
            ModelHeader(reference, held, {}, in_memory=True)
            for reference, held in zip(self.references, infos, strict=True)
        ]
        like = len(models) if base is not None else 0
        if any(held.keys() != infos[like].keys() for held in infos):
            self.headers = [
                replace(header, shared=_shared(held))
                for header, held in zip(self.headers, self._checked, strict=True)
            ]
            if self._has_own_output(like):
                own = {"tie_word_embeddings": False}
                self.headers[like] = replace(self.headers[like], config=own)

    def _has_own_output(self, place: int) -> bool:
        """Whether the values of a state dict's output layer are others than its embedding's."""
        held = self._checked[place]
        outputs = [name for name in held if is_output(name)]
        pairs = [(held[name], held.get(embedding(held, of=name) or "")) for name in outputs]
        return any(
            tokens is not None and output.shape == tokens.shape and not torch.equal(output, tokens)
            for output, tokens in pairs
        )

    @property
    def base_index(self) -> int | None:
        """Index of the base among the states."""
        return None if self.base is None else len(self.models)

    @property
    def like(self) -> StateDict:
        """The state dict that gives the order of the result."""
        return self.models[0] if self.base is None else self.base

    def describe(self, statistics: Sequence[StatisticsHeader | StatisticsSource]) -> None:
        """Attach the models' statistics."""
        self.headers = [
            *(
                replace(header, statistics=each, asks=not isinstance(each, StatisticsHeader))
                for header, each in zip(self.headers, statistics, strict=False)
            ),
            *self.headers[len(statistics) :],
        ]

    def plan(self, recipe: MergeRecipe, stacklevel: int) -> Plan:
        """The plan of a merge. MismatchError where it is impossible; each note becomes a
        UserWarning.
        """
        plan = build_plan(recipe, self.headers)
        if plan.problems or self._not_merged:
            tasks = recipe.tasks(self.headers)
            refused = refusals(self.headers, tasks)
            if refused:
                raise MismatchError(refused)
            if any(task.options is not None or task.solve is not None for task in tasks):
                for where, tensor in self._not_merged.items():
                    check_floats(where, tensor, "merge", readable=True)
        if plan.problems:
            if not recipe.strict:  # which the problems then name
                check_differences(self.models, self.base)
            raise MismatchError(plan.problems)
        for note in plan.notes:
            warnings.warn(note, stacklevel=stacklevel + 1)
        return plan

    def reading_once(self) -> Mappings:
        """The same inputs, which load each tensor of a mapping once and keep it: for several
        merges from one read.
        """
        made = copy.copy(self)
        made._kept = {}
        return made

    def tensor(self, source: Source, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a tensor. One that is gathered from rows of others is returned as a new tensor of
        `shape`.
        """
        rows = source.rows
        if rows is None:
            return self._read(source)
        count, width = rows.shape[0], elements(rows.shape[1:])
        parts = [self._read(each).detach() for each in rows.tensors]
        for each, part in zip(rows.tensors, parts, strict=True):
            if is_dtensor(part):
                raise TypeError(
                    f"{self._where(each.model, each.tensor)} is a DTensor of which rows are to be"
                    " moved, since its shape or its name differs from another model's; pass its"
                    " .full_tensor(), on every rank"
                )
        made = torch.empty((count, width), dtype=torch_dtype(rows.dtype), device=parts[0].device)
        assert (rows.choice >= 0).all()  # other rows come only with a tokenizer
        for place, part in enumerate(parts):
            here = torch.from_numpy((rows.choice == place).nonzero()[0])
            there = torch.from_numpy(rows.places[place]).long()[here]
            made[here.to(made.device)] = part.reshape(-1, width)[there.to(part.device)].to(made)
        return made.view(shape)

    def _read(self, source: Source) -> torch.Tensor:
        """A tensor as its header says: a mapping that reads each when asked, or another thread, may
        have made something else of it.
        """
        key = source.model, source.tensor
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        tensor = self._asked_for(source)
        if self._kept is not None:
            self._kept[key] = tensor
        return tensor

    def _asked_for(self, source: Source) -> torch.Tensor:
        tensor = self.states[source.model][source.tensor]
        checked = self._checked[source.model].get(source.tensor)
        if checked is not None and checked is tensor:
            return checked
        if not isinstance(tensor, torch.Tensor) or why_unreadable(tensor, self._shards):
            check_tensor(self._where(source.model, source.tensor), tensor, self._shards)
        was = self.headers[source.model].tensors[source.tensor]
        dtype = name_of(tensor.dtype)
        if tensor.shape != was.shape or dtype != was.dtype:
            raise MismatchError(
                f"{self._where(source.model, source.tensor)} was {was.dtype} of shape {was.shape}"
                f" when the merge began and is now {dtype} of shape {tuple(tensor.shape)}; pass a"
                " mapping that gives the same tensor whenever it is asked"
            )
        return tensor

    def _where(self, place: int, name: str) -> str:
        """A tensor, for messages."""
        return f"{self.references[place]}[{name!r}]"

    def owners(self, plan: Plan, out: StateDict | None = None) -> dict[str, str]:
        """For each name of the result, the first name whose tensor is the same memory in every
        state dict and in `out`.
        """
        dicts = self.states[: len(self.models) + (self.base is not None)]
        first: dict[tuple[object, ...], PlannedTensor] = {}
        found: dict[str, str] = {}

        def inputs(tensor: PlannedTensor) -> list[torch.Tensor]:
            own = {source.model: source.tensor for source in tensor.inputs}
            names = [(state, own.get(place, tensor.name)) for place, state in enumerate(dicts)]
            found = [state[name] for state, name in names if name in state]
            return found if out is None else [*found, out[tensor.name]]

        for tensor in plan.tensors:
            if any(source.rows is not None for source in tensor.inputs):
                found[tensor.name] = tensor.name
                continue
            held = [local(each) for each in inputs(tensor)]
            key = (held[0].shape, *(each.data_ptr() for each in held))
            owner = first.setdefault(key, tensor) if held[0].numel() else tensor
            # A mapping that reads tensors on access may reuse an earlier tensor's memory, so only
            # tensors that are alive at the same time can be compared.
            if owner is not tensor and _places([*map(local, inputs(owner))]) != _places(held):
                first[key] = owner = tensor
            found[tensor.name] = owner.name
        return agreed_owners(found, self.like) if self.sharded else found


def _shared(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A tensor -> the first one that is the same memory."""
    first: dict[object, str] = {}
    owners = {
        name: first.setdefault(_places([local(tensor)]), name) if local(tensor).numel() else name
        for name, tensor in tensors.items()
    }
    agreed = agreed_owners(owners, tensors)
    return {name: owner for name, owner in agreed.items() if owner != name}


def _places(tensors: Sequence[torch.Tensor]) -> tuple[object, ...]:
    return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)


def _infos_of_start(start: StateDict, models: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Headers of the state dict that solvers start from: the models' shapes, and finite values
    where theirs are merged.
    """
    infos = {}
    for name, tensor in start.items():
        where = f"init[{name!r}]"
        like = models.get(name)
        if like is None or like.dtype in MERGEABLE:
            check_floats(where, tensor, "merge")
        check_readable(where, tensor)
        infos[name] = TensorInfo(name, name_of(tensor.dtype), tuple(tensor.shape))
        if like is not None and infos[name].shape != like.shape:
            raise MismatchError(
                f"tensor {name!r}: init has shape {infos[name].shape}, the weights {like.shape};"
                " they must be equal"
            )
    return infos


class DictSink:
    """The tensors of the result by name. out: tensors to write to; None makes new ones.

    owners: for each name, the name whose tensor it shares.
    """

    def __init__(self, plan: Plan, inputs: Mappings, out: StateDict | None = None) -> None:
        self.result: dict[str, torch.Tensor] = {}
        self._out = out
        if out is None:
            self.owners = inputs.owners(plan)
        # Tied in the inputs only: both are written; tied in `out` only: refused, they overlap
        else:
            like = {tensor.name: inputs.like[tensor.name] for tensor in plan.tensors}
            self.owners = check_out_dict(
                out, like, inputs.models, inputs.base, lambda: inputs.owners(plan, out)
            )

    def target(
        self, tensor: PlannedTensor, models: Sequence[torch.Tensor], base: torch.Tensor | None
    ) -> torch.Tensor:
        """The tensor that a computed result is written to."""
        if self._out is not None:
            check_out(self._out[tensor.name], models, base)
            self.result[tensor.name] = self._out[tensor.name]
        else:
            like = models[0] if base is None else base
            made = new_like(like, torch_dtype(tensor.dtype))
            if not self.result:  # torch modes may return special tensors
                check_readable("the result", made, shards=is_dtensor(like))
            self.result[tensor.name] = made
        return self.result[tensor.name]

    def copy(self, tensor: PlannedTensor, source: torch.Tensor) -> torch.Tensor:
        """Store a copy of a tensor."""
        own = None if self._out is None else self._out[tensor.name]
        made = source.detach().clone() if own is None else own.copy_(source)
        self.result[tensor.name] = made
        return made

    def ordered(self) -> dict[str, torch.Tensor]:
        """The result in the order of the plan."""
        return {name: self.result[owner] for name, owner in self.owners.items()}


class OpExecutor:
    """Makes the tensors that are copied or merged by an op, on the device of their state dicts."""

    def __init__(self, inputs: Mappings, sink: DictSink, backend: Backend = "auto") -> None:
        self._inputs = inputs
        self._sink = sink
        registry.check_word(backend)
        self._backend = backend
        self._not_merged: list[NotMerged] = []
        self.reports: list[MatsReport] = []  # of the ops that have one for each tensor

    def make(self, tensors: Sequence[PlannedTensor], stacklevel: int) -> None:
        """Make these tensors. Those with equal options go into one call of `ties`."""
        for options, calls in self.begin(tensors).items():
            if isinstance(options, TiesOptions):
                merge_many(calls, options, self._backend, stacklevel + 1)
            else:
                self.make_each(calls, options, stacklevel + 1)

    def begin(self, tensors: Sequence[PlannedTensor]) -> dict[OpOptions, list[TensorCall]]:
        """Copy the tensors that are copied. Returns the calls that make the others, by options."""
        groups: dict[OpOptions, list[TensorCall]] = {}
        for tensor in tensors:
            if tensor.options is None:
                self._copy(tensor)
            else:
                groups.setdefault(tensor.options, []).append(self._call(tensor))
        return groups

    def make_each(self, calls: Sequence[TensorCall], options: OpOptions, stacklevel: int) -> None:
        """Make tensors by an op that is not `ties`."""
        self.reports += merge_each(calls, options, self._backend, stacklevel + 1)

    def warn(self, stacklevel: int) -> None:
        """Warn, once, of copied tensors that differ between the models."""
        of_base = self._inputs.base is not None
        warn_of_not_merged(self._not_merged, of_base, stacklevel + 1)

    def _call(self, tensor: PlannedTensor) -> TensorCall:
        models = [self._inputs.tensor(source, tensor.shape) for source in tensor.sources]
        base = None
        if tensor.base is not None:
            base = self._inputs.tensor(tensor.base, tensor.shape)
        with of_tensor(tensor.name):
            check_tensors(models, base, readable=True, shards=self._inputs.sharded)
            target = self._sink.target(tensor, models, base)
        return tensor.key_name, models, base, target

    def _copy(self, tensor: PlannedTensor) -> None:
        source = tensor.sources[0]
        made = self._sink.copy(tensor, self._inputs.tensor(source, tensor.shape))
        dtype = tensor.dtype
        if dtype in MERGEABLE and tensor.non_finite == "error":
            (count,) = count_all_non_finite([made])
            if count:
                raise NonFiniteError(
                    f"tensor {tensor.name!r} holds NaN or infinite values:"
                    f" {count} in {self._inputs.references[source.model]}; mend or leave out the"
                    f" model, or pass {argument('non_finite', 'allow')} to let them through"
                )
        different = [
            other.model
            for other in tensor.duplicates
            if not _are_same(self._inputs.tensor(other, tensor.shape), made)
        ]
        if different and tensor.strict:
            raise MismatchError(
                f"tensor {tensor.name!r} is {dtype} and differs between"
                f" {self._inputs.references[source.model]} and"
                f" {some_names(self._inputs.references[model] for model in different)}; {dtype} can"
                " be copied but not merged. Convert the models to bfloat16"
            )
        if different:
            self._not_merged.append((tensor.name, made.dtype, different))


def merge_each(
    calls: Sequence[TensorCall], options: OpOptions, backend: str, stacklevel: int | None
) -> list[MatsReport]:
    """Merge checked tensors one by one, by an op that is not `ties`. Raises for NaN and infinity
    as `ties` does (N3, N4). stacklevel: of remarks, as warnings; None leaves them out. Returns the
    reports of an op that has one for each tensor.
    """
    counted: list[tuple[str, torch.Tensor, Counts | None]] = []
    remarks: dict[str, list[str]] = {}
    for name, models, base, target in calls:
        counts = merge_tensor(models, base, options, target, name, backend)
        if options.non_finite == "error" and any(counts.non_finite):
            refuse_non_finite(counts, target.numel(), name)
        if counts.remark:
            remarks.setdefault(counts.remark, []).append(name)
        counted.append((name, target, counts))
    if stacklevel is not None:
        for remark, names in remarks.items():
            where = f"{some_names(map(repr, names))}: " if any(names) else ""
            warnings.warn(f"{where}{remark}", stacklevel=stacklevel + 1)
    report_overflow(counted, options.non_finite, (stacklevel or 1) + 1)
    found = ((name, counts.report) for name, _, counts in counted if counts is not None)
    return [replace(report, name=name) for name, report in found if report is not None]


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold equal values, whatever their dtypes."""
    if is_dtensor(one) and is_dtensor(other):
        same = torch.tensor([_are_same(local(one), local(other))], dtype=torch.int64, device="cpu")
        (differ,) = largest([(mesh_of(one), 1 - same)])
        return not bool(differ)
    if one.dtype == other.dtype:
        return torch.equal(raw_bytes(one), raw_bytes(other))
    return bool((one == other).all())


def in_turn(tensors: Sequence[PlannedTensor], owners: Mapping[str, str]) -> Iterator[PlannedTensor]:
    """The tensors to compute; the others share the memory of one of them."""
    return (tensor for tensor in tensors if owners[tensor.name] == tensor.name)
