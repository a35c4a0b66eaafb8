"""MaTS, RegMean and Fisher merging of state dicts, by the same plan and solver as for folders: a
few layers at a time, while the next layers' statistics are read ahead.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, get_args

import torch
from typing_extensions import Unpack

from pymerge.backends import registry
from pymerge.checkpoint.types import ModelHeader, Source
from pymerge.dtypes import MERGEABLE
from pymerge.engine.mappings import DictSink, Mappings, OpExecutor, StateDict, in_turn
from pymerge.engine.readers import Reader, StatisticsInputs
from pymerge.engine.solver import (
    Layer,
    Solved,
    merge_by_fisher,
    refuse_non_finite,
    report_of_fisher,
    slices_of,
    solve_layers,
    solve_of,
)
from pymerge.errors import MismatchError
from pymerge.messages.arguments import argument, check_flags, checked_options
from pymerge.messages.words import shown, some_names, type_of
from pymerge.methods._statistics import SolveOptions, needs_base
from pymerge.ops.mats.api import MatsResult, mats_many
from pymerge.ops.mats.layer import MatsLayer, to_device
from pymerge.ops.mats.report import warnings_of
from pymerge.ops.mats.weighted_average import damage_of, negative_of
from pymerge.ops.tensors import check_differences, check_list
from pymerge.planning.plan import WINDOW, Plan, PlannedTensor
from pymerge.planning.solves import SolvePlanner, batches, leaders
from pymerge.recipe.model import MergeRecipe, TensorTask
from pymerge.rules.mats import (
    INITS,
    OPTIONS,
    given_task_weights,
    off_diagonal_factor,
    resolve,
)
from pymerge.rules.report import MatsReport, of_slices, without_statistics
from pymerge.rules.ties import TiesOptions, _choice, _integer, _number, _plain, resolve_options
from pymerge.rules.types import InitName, NonFinite, StatisticsKeywords, StatisticsMethod

METHODS: tuple[str, ...] = get_args(StatisticsMethod)


def merge_with_statistics(
    models: Sequence[StateDict],
    base: StateDict | None,
    statistics: Sequence[Reader | str | os.PathLike[str]],
    method: StatisticsMethod = "mats",
    *,
    init: InitName | StateDict = "average",
    init_options: Mapping[str, Any] | None = None,
    output_grams: bool | None = None,
    allow_unsolved: bool = False,
    device: torch.device | str | None = None,
    window: int = WINDOW,
    non_finite: NonFinite = "error",
    strict: bool = False,
    **options: Unpack[StatisticsKeywords],
) -> tuple[dict[str, torch.Tensor], list[MatsReport]]:
    """Merge K state dicts with the statistics of each: `pymerge.mats`, `regmean` or
    `weighted_average` for every tensor.

    models, base: mappings of tensors with the same names and shapes; they may read each tensor when
        it is asked for. base is needed by the initialisations that use it, and gives the integer
        tensors.
    statistics: one reader or statistics file per model, in the order of the models.
    method: "mats", "regmean" or "fisher" (diagonal).
    init: "average", "pretrained", "task_arithmetic", "ties", "zero", or a whole state dict (any
        merged model): where solvers start, and what parameters without statistics become.
        init_options: see `pymerge.mats`.
    output_grams: mats alone; False leaves the output Grams out, True insists on them, None uses
        them where they are.
    allow_unsolved: go on where less than half of the linear layers' elements have statistics.
    device: where to solve; by default where the weights are. The results come back to the weights'
        device.
    window: bytes that layers which are solved together take, beside as many read ahead; a layer
        that takes more is solved alone.
    non_finite: what NaN and infinity in a model are: "error", or "allow", which leaves that model
        out of the tensor's initialisation, the result (N2). strict: make an error of tensors that
        not all models have; by default they are copied from the base or left out, with a warning.
    options: of `pymerge.mats` (iterations, damping, flavor, task_weights, ...), of
        `pymerge.regmean` (off_diagonal, task_weights), or of `pymerge.weighted_average` (minimum,
        task_weights).

    Returns (state dict in the base's order, one report per floating-point tensor). Tensors keep the
    first model's dtype; those that are one memory in every state dict stay one. Warns of layers
    that fell back and of large steps. Raises ValueError and TypeError for models, statistics and
    options that do not fit each other, and for NaN or infinity; TypeError for tensors whose values
    are not in their memory (DTensor, meta, ...; it says what to pass); RuntimeError for a backend
    that is not available.
    """
    given: dict[str, Any] = dict(options)
    merge = _Merge(
        models,
        base,
        statistics,
        method,
        (init, init_options),
        output_grams,
        allow_unsolved,
        device,
        non_finite,
        strict,
        given,
    )
    reports = [report for _, _, report in merge.stream(window) if report is not None]
    merge.warn(stacklevel=3)
    for sentence in warnings_of(reports):
        warnings.warn(sentence, stacklevel=2)
    return merge.sink.ordered(), reports


def stream_with_statistics(
    models: Sequence[StateDict],
    base: StateDict | None,
    statistics: Sequence[Reader | str | os.PathLike[str]],
    method: StatisticsMethod = "mats",
    *,
    init: InitName | StateDict = "average",
    init_options: Mapping[str, Any] | None = None,
    output_grams: bool | None = None,
    allow_unsolved: bool = False,
    device: torch.device | str | None = None,
    window: int = WINDOW,
    non_finite: NonFinite = "error",
    strict: bool = False,
    **options: Unpack[StatisticsKeywords],
) -> Iterator[tuple[str, torch.Tensor, MatsReport | None]]:
    """As `merge_with_statistics`, a tensor at a time: (name, merged tensor, report; None for an
    integer tensor).

    Tensors that are one memory in every state dict come once. The order is the base's.
    """
    given: dict[str, Any] = dict(options)
    merge = _Merge(
        models,
        base,
        statistics,
        method,
        (init, init_options),
        output_grams,
        allow_unsolved,
        device,
        non_finite,
        strict,
        given,
    )
    for each in merge.stream(window):
        del merge.sink.result[each[0]]
        yield each
    merge.warn(stacklevel=3)


class _Merge:
    """One merge of state dicts by statistics: inputs, plan and result."""

    def __init__(
        self,
        models: Sequence[StateDict],
        base: StateDict | None,
        statistics: Sequence[Reader | str | os.PathLike[str]],
        method: str,
        start: tuple[InitName | StateDict, Mapping[str, Any] | None],
        output_grams: bool | None,
        allow_unsolved: bool,
        device: torch.device | str | None,
        non_finite: str,
        strict: bool,
        options: dict[str, Any],
    ) -> None:
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(
                f"method={shown(method)} is not one of {', '.join(map(repr, METHODS))}"
            )
        check_flags(allow_unsolved=allow_unsolved, strict=strict)
        if output_grams is not None:
            check_flags(output_grams=output_grams)
        check_list(models, base)
        init, init_options = start
        init_options = checked_options("init_options", init_options)
        if not isinstance(init, (str, Mapping)):
            raise TypeError(
                f"init is {type_of(init)}; pass {', '.join(map(repr, INITS))} or a state dict"
            )
        self.inputs = Mappings(models, base, None if isinstance(init, str) else init)
        if isinstance(init, Mapping):
            missing = [name for name in self.inputs.like if name not in init]
            if missing:
                check_differences(models, base)  # whose errors are more specific
                raise ValueError(f"init lacks {some_names(missing)}; pass a whole state dict")
        self.statistics = StatisticsInputs(statistics, self.inputs)
        backend = options.pop("backend", None)
        named = init if isinstance(init, str) else "given"
        solve = _solve_options(
            method, len(models), named, dict(init_options), output_grams, backend, options
        )
        solve = replace(solve, allow_unsolved=allow_unsolved)
        if needs_base(named) and base is None:
            raise ValueError(f"init={init!r} needs the pretrained model; pass base=")
        fallback, name = _fallback(solve, named, len(models), non_finite)
        recipe = _recipe(self.inputs, named, solve, fallback, name, non_finite)
        self.plan = self.inputs.plan(replace(recipe, strict=strict), stacklevel=5)
        self.sink = DictSink(self.plan, self.inputs)
        self._ops = OpExecutor(self.inputs, self.sink)
        self._solver = _WhereTensorsAre(device)
        self._asked = SolvePlanner(self.inputs.headers)

    def stream(self, window: int) -> Iterator[tuple[str, torch.Tensor, MatsReport | None]]:
        """Yield every tensor as it is made."""
        window = _integer("window", window)
        tensors = [*in_turn(self.plan.tensors, self.sink.owners)]
        # Tensors that are not solved count with the bytes of their inputs, which may be read on
        # access.
        needs = [each.solve_memory or each.nbytes * len(each.inputs) for each in tensors]
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pymerge-statistics") as pool:
            pieces = batches(needs, range(len(tensors)), window)

            def ahead() -> Future[list[Layer | PlannedTensor]] | None:
                piece = next(pieces, None)
                if piece is None:
                    return None
                return pool.submit(self._read, [tensors[index] for index in piece])

            coming = ahead()
            while coming:
                held = coming.result()
                coming = ahead()
                yield from self._make(held)
        problems = self._asked.unused()
        if problems:
            raise MismatchError(problems)

    def warn(self, stacklevel: int) -> None:
        """Warn of copied tensors that differ."""
        self._ops.warn(stacklevel + 1)

    def _read(self, tensors: Sequence[PlannedTensor]) -> list[Layer | PlannedTensor]:
        """Read all that the tensors of a batch need; runs on a thread of its own."""
        decided = dict(enumerate(map(self._decided, tensors)))
        problems = self._asked.seen()
        if problems:
            raise MismatchError(problems)
        leader_of = leaders(decided)
        found: list[Layer | PlannedTensor] = []
        layers: dict[int, Layer] = {}
        for place, tensor in decided.items():
            if tensor.solve is None:
                found.append(tensor)
                continue
            weights, base = self._inputs_of(tensor)
            held = [*weights, *([] if base is None else [base])]
            bad = [k for k, each in enumerate(held) if not bool(each.isfinite().all())]
            way = argument("non_finite", "allow")
            refuse_non_finite(tensor, bad, self.inputs.references, way)
            if tensor.solve.slices:  # whose statistics are read one by one
                found.append(Layer(tensor, weights, base, [], None))
                continue
            leader = leader_of.get(place)
            inputs = (
                self.statistics.means(tensor, tensor.solve.inputs)
                if leader is None
                else layers[leader].inputs
            )
            outputs = tensor.solve.outputs
            means = None if outputs is None else self.statistics.means(tensor, outputs)
            layers[place] = Layer(tensor, weights, base, inputs, means)
            found.append(layers[place])
        self.statistics.forget()
        return found

    def _inputs_of(self, tensor: PlannedTensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        found = [self.inputs.tensor(each, tensor.shape).detach() for each in tensor.inputs]
        return found[: len(tensor.sources)], None if tensor.base is None else found[-1]

    def _decided(self, tensor: PlannedTensor) -> PlannedTensor:
        """The planned tensor, or its fallback where it turns out to have no statistics."""
        if tensor.solve is None or not tensor.solve.asks:
            return tensor
        options = tensor.solve.options
        task = TensorTask(
            tensor.name, tensor.sources, tensor.base, None, tensor.method, solve=options
        )
        solve = self._asked.found(task, tensor.shape, tensor.sources)
        if solve is not None:
            return replace(tensor, solve=solve, otherwise=None)
        assert tensor.otherwise is not None
        return tensor.otherwise

    def _make(
        self, held: Sequence[Layer | PlannedTensor]
    ) -> Iterator[tuple[str, torch.Tensor, MatsReport | None]]:
        self._ops.make([each for each in held if isinstance(each, PlannedTensor)], stacklevel=5)
        systems = [
            each for each in held if isinstance(each, Layer) and not solve_of(each.tensor).in_parts
        ]
        solved = dict(
            zip(
                [layer.tensor.name for layer in systems],
                solve_layers(systems, self._solver),
                strict=True,
            )
        )
        for each in held:
            if isinstance(each, PlannedTensor):
                report = None
                if each.dtype in MERGEABLE:
                    report = without_statistics(each.name, each.method)
                yield each.name, self.sink.result[each.name], report
                continue
            name = each.tensor.name
            if name in solved:
                tensor, made = solved[name]
            else:
                by_slices = bool(solve_of(each.tensor).slices)
                tensor, made = self._slices(each) if by_slices else _fisher(each)
            self.sink.result[name] = tensor
            yield name, tensor, made

    def _slices(self, whole: Layer) -> Solved:
        """The matrices of a tensor, one after the other."""
        parts, reports = [], []
        size = solve_of(whole.tensor).slice_shape
        weights = [each.reshape(-1, *size) for each in whole.weights]
        base = None if whole.base is None else whole.base.reshape(-1, *size)
        for place, part in enumerate(slices_of(whole.tensor)):
            solve = solve_of(part)
            layer = Layer(
                part,
                [each[place] for each in weights],
                None if base is None else base[place],
                self.statistics.means(part, solve.inputs),
                None if solve.outputs is None else self.statistics.means(part, solve.outputs),
            )
            (solved,) = solve_layers([layer], self._solver)
            parts.append(solved.tensor)
            reports.append(solved.report)
        merged = torch.stack(parts).reshape(whole.tensor.shape)
        return Solved(merged, of_slices(whole.tensor.name, reports))


def _fisher(layer: Layer) -> Solved:
    weights = layer.weights
    fishers = [fisher.to(weights[0].device) for fisher in layer.inputs]
    damage = damage_of(weights, fishers)
    merged = merge_by_fisher(layer.tensor, weights, layer.base, fishers, damage)
    totals = [float(fisher.sum(dtype=torch.float64)) for fisher in fishers]
    return Solved(merged, report_of_fisher(layer.tensor, totals, damage, negative_of(fishers)))


class _WhereTensorsAre:
    """Solves layers on a device, by default that of the weights, and returns results to the
    weights' device.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        try:
            self._device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise ValueError(
                f"{argument('device', device)} is no device of torch; pass 'cpu' or 'cuda'"
            ) from None

    def solve(
        self,
        layers: Sequence[MatsLayer],
        tensors: Sequence[PlannedTensor],
        options: Mapping[str, Any],
    ) -> list[MatsResult]:
        copies: dict[int, Any] = {}
        own = [layer.weights[0].device for layer in layers]
        there = [
            to_device(layer, self._device or device, copies)
            for layer, device in zip(layers, own, strict=True)
        ]
        results = mats_many(there, **options)
        return [
            MatsResult(result.weight.to(device), result.report)
            for result, device in zip(results, own, strict=True)
        ]

    def notes(self) -> list[str]:
        return []


def _solve_options(
    method: str,
    count: int,
    init: str,
    init_options: dict[str, Any],
    output_grams: bool | None,
    backend: str | None,
    options: dict[str, Any],
) -> SolveOptions:
    """The checked options of the solve."""
    if output_grams is not None and method != "mats":
        raise ValueError(f"output_grams={output_grams!r} is given; {method} uses none")
    allowed = {
        "mats": (*OPTIONS, "backend"),
        "regmean": ("off_diagonal", "task_weights"),
        "fisher": ("minimum", "task_weights"),
    }[method]
    for name in (*options, *([] if backend is None else ["backend"])):
        if name not in allowed:
            raise TypeError(f"{method} has no option {name!r}; it has {', '.join(allowed)}")
    if method == "mats":
        resolve(count, **options)
    off_diagonal_factor(options.get("off_diagonal", 1.0))
    if options.get("task_weights") is not None:
        options["task_weights"] = given_task_weights(options["task_weights"], count)
    if backend is not None:
        registry.check_word(backend)
        options["backend"] = backend
    named: Any = init if init == "given" else _choice("init", init, INITS)
    if init in ("given", "pretrained", "average", "zero") and init_options:
        raise ValueError(
            f"init_options={shown(init_options)} are given, but init={init!r} takes none"
        )
    if init == "pretrained":
        named = "given"
    return SolveOptions(
        method, named, tuple(init_options.items()), tuple(options.items()), output_grams
    )


def _fallback(
    solve: SolveOptions, init: str, count: int, non_finite: str
) -> tuple[TiesOptions | None, str]:
    """(options, name) of what a tensor without statistics becomes (M4); None copies the initial
    tensor.
    """
    if solve.init == "given":
        return None, "pretrained" if init == "pretrained" else "init model"
    given = dict(solve.init_options)
    if init == "ties":
        rule: dict[str, Any] = {**given, "scope": "tensor"}
    else:
        rule = {"trim": "none", "elect": "none", "density": 1.0}
    if init == "task_arithmetic":
        scaling = _number("init_options['scaling']", given.pop("scaling", 1.0))
        if given:
            raise ValueError(f"init_options={shown(given)}: task_arithmetic takes only 'scaling'")
        rule |= {"merge": "sum", "scaling": scaling}
    rule["non_finite"] = _plain("non_finite", non_finite)
    return resolve_options(count, **rule), "average" if init == "zero" else init


def _recipe(
    inputs: Mappings,
    init: str,
    solve: SolveOptions,
    fallback: TiesOptions | None,
    name: str,
    non_finite: str,
) -> MergeRecipe:
    start = inputs.base_index if needs_base(init) else None
    if init == "given":
        start = len(inputs.states) - 1

    def tasks(headers: Sequence[ModelHeader]) -> list[TensorTask]:
        return [
            TensorTask(
                tensor,
                tuple(Source(model, tensor) for model in range(len(inputs.models))),
                None if start is None else Source(start, tensor),
                fallback,
                name,
                solve=solve,
            )
            for tensor in headers[inputs.base_index or 0].tensors
        ]

    return MergeRecipe(
        tuple(inputs.references), inputs.base_index, solve.method, tasks, non_finite=non_finite
    )


__all__ = ["METHODS", "Plan", "Reader", "merge_with_statistics", "stream_with_statistics"]
