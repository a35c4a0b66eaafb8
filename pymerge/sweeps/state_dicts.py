"""`pymerge.sweep`: a merge of state dicts for each of many settings."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pymerge.checkpoint import new_file
from pymerge.engine.mappings import DictSink, Mappings, OpExecutor, in_turn
from pymerge.engine.state_dicts import (
    AskedMerge,
    StateDict,
    merge,
    parse_merge,
    state_dict_of,
)
from pymerge.errors import EvaluationError
from pymerge.messages.arguments import argument, check_flags, of_model, renamed
from pymerge.messages.words import shown, some_names, type_of
from pymerge.methods import find_method
from pymerge.ops.tensors import check_list
from pymerge.ops.ties.together import Together
from pymerge.planning.plan import Plan
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import TiesOptions
from pymerge.sweeps.grid import Grid, Setting, key_of, plain_value, settings_of
from pymerge.sweeps.results import (
    SweepResult,
    SweepRow,
    deciding,
    is_better,
    measures,
    read_progress,
    write_progress,
)
from pymerge.version import __version__

State = dict[str, torch.Tensor]
Evaluate = Callable[[State], "float | Mapping[str, float]"]

# Not of a setting: where the results go.
_NOT_SWEPT = ("out", "statistics", "reports")


def sweep(
    models: Sequence[StateDict | torch.nn.Module],
    base: StateDict | torch.nn.Module | None = None,
    grid: Grid | None = None,
    *,
    evaluate: Evaluate | None = None,
    metric: str | None = None,
    maximize: bool = True,
    results: str | os.PathLike[str] | None = None,
    at_once: int = 1,
    **parameters: Any,
) -> SweepResult:
    """Merge state dicts with every setting of a grid, evaluate each result, keep the best.

    Each result is that of `pymerge.merge` with the setting's parameters, bit for bit. The models
    are looked at once, the thresholds of one density serve all scalings, weights and sign rules,
    and memory of results is used again (docs/sweeps.md).

    models, base: as of `pymerge.merge`.
    grid: parameter -> the values to try, {"density": [0.1, 0.2], "scaling": [0.5, 1.0]}, for all
        combinations, the last changing fastest; or a list of settings, [{"density": 0.1}, ...]. Any
        parameter of `pymerge.merge` and "method"; one value can be a list with one number per
        model.
    evaluate: called with each result, a dict as `pymerge.merge` returns it. Returns a number, or a
        mapping of measures to numbers. The tensors are written anew for later settings: copy what
        is to be kept. It must not write to `models` and `base`: a result is to be loaded into
        another model. None evaluates nothing and keeps every result.
    metric: the measure that decides; by default the first. maximize: whether more is better.
    results: a JSON file for the rows, written after each evaluation. Rows that it has already, of
        the same parameters and of models of the same names, shapes and dtypes, are not evaluated
        again. That values of the models and the evaluation are the same is for the caller to see
        to.
    at_once: how many results are computed together, tensor by tensor, and held in memory beside
        the best one. More pay for mappings that load each tensor when it is asked for, which are
        asked once for all of them.
    parameters: of all settings, as in `pymerge.merge`.

    Returns a SweepResult: `rows`, each with `setting` and `metrics` (and, without an evaluation,
    `merged`), `best` and `merged`, the state dict of the best; `write_csv`, `write_json`, `plot`.

    Raises what `pymerge.merge` raises, for settings that no merge takes before the first merge;
    EvaluationError where `evaluate` returns no number or wrote to an input; OutputError where
    `results` cannot be written or belongs to another sweep; ValueError and TypeError for a grid
    that is none.
    """
    check_list(models, base)
    check_flags(maximize=maximize)
    _check_count(at_once)
    if grid is None:
        raise TypeError(f"{argument('grid')} is missing; pass a mapping of parameters to values")
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"{argument('evaluate')} is {type_of(evaluate)}; pass a function")
    if evaluate is None and results is not None:
        raise ValueError(f"{argument('results')} is for measures; pass {argument('evaluate')} too")
    settings = settings_of(grid)
    sweeper = _Sweeper(models, base, settings, parameters)
    if evaluate is None:
        merged = (each for batch in _batches(settings, at_once) for each in sweeper.merged(batch))
        return SweepResult([SweepRow(s, merged=m) for s, m in zip(settings, merged, strict=True)])

    found = SweepResult([], metric, maximize)
    path, identity = None, ""
    known: list[SweepRow] = []
    if results is not None:
        path, identity = Path(results), sweeper.identity()
        new_file.check_place(path)
        known = read_progress(path, identity)
    keys = [key_of(setting) for setting in settings]
    others = [row for row in known if key_of(row.setting) not in keys]
    done = {key_of(row.setting): row for row in known if row.metrics}
    best: SweepRow | None = None

    def add(row: SweepRow) -> bool:
        """Whether it is the best so far."""
        nonlocal best
        found.metric = deciding(found.metric, row)
        found.rows.append(row)
        if not is_better(row, best, found.metric, maximize):
            return False
        best = row
        return True

    def save() -> None:
        if path is not None:
            write_progress(path, replace(found, rows=[*found.rows, *others]), identity)

    for key in keys:
        if key in done:
            add(done[key])
    left = [setting for key, setting in zip(keys, settings, strict=True) if key not in done]
    for batch in _batches(left, at_once):
        for setting, state in zip(batch, sweeper.merged(batch), strict=True):
            if add(SweepRow(setting, measures(evaluate(dict(state)), setting))):
                sweeper.give_back(found.merged)
                found.merged = state
            else:
                sweeper.give_back(state)
            save()
    found.rows.sort(key=lambda row: keys.index(key_of(row.setting)))
    save()
    chosen = found.best
    if found.merged is None or chosen is not best:
        sweeper.give_back(found.merged)
        found.merged = None if chosen is None else sweeper.merged([chosen.setting])[0]
    return found


@dataclass(frozen=True)
class _Asked:
    """One setting: the merge that it asks for, None where that is by statistics."""

    method: str
    parameters: Mapping[str, Any]
    strict: bool
    merge: AskedMerge | None
    options: OpOptions | None


class _Sweeper:
    """Merges with any of the settings, a few at a time."""

    def __init__(
        self,
        models: Sequence[Any],
        base: Any,
        settings: Sequence[Setting],
        parameters: Mapping[str, Any],
    ) -> None:
        self._parameters = parameters
        for name in _NOT_SWEPT:
            if any(name in setting for setting in settings) or (
                name in parameters and name != "statistics"
            ):
                raise TypeError(f"a sweep has no parameter {name!r}; it belongs to pymerge.merge")
        self._models: list[StateDict] = [
            state_dict_of(model, of_model("models", k)) for k, model in enumerate(models)
        ]
        self._base = None if base is None else state_dict_of(base, argument("base"))
        self._inputs: dict[bool, Mappings] = {}
        self._free: dict[object, list[State]] = {}
        self._kinds: dict[int, object] = {}
        self._asked = {key_of(setting): self._ask(setting) for setting in settings}
        asked = [*self._asked.values()]
        if "statistics" in parameters and all(each.merge is not None for each in asked):
            raise TypeError(
                "no setting has a method with a parameter 'statistics'; mats, regmean and fisher do"
            )
        ties = [each.options for each in asked if isinstance(each.options, TiesOptions)]
        backends = {str(each.parameters.get("backend") or "auto") for each in asked}
        self._together = {backend: Together(ties, backend) for backend in backends}
        # What cannot be merged is told before the first merge.
        one_of_each = {(each.method, each.strict): each for each in asked if each.merge}
        for each in one_of_each.values():
            self._plan(each)
        self._versions = {name: _versions(state) for name, state in self._states()}

    def _states(self) -> Iterator[tuple[str, StateDict]]:
        for k, model in enumerate(self._models):
            yield of_model("models", k), model
        if self._base is not None:
            yield argument("base"), self._base

    def _check_inputs(self) -> None:
        """EvaluationError where a tensor was written to since the beginning, from which a further
        result would be merged.
        """
        for name, state in self._states():
            before, now = self._versions[name], _versions(state)
            changed = [each for each in before.keys() | now if before.get(each) != now.get(each)]
            if changed:
                raise EvaluationError(
                    f"{name} was written to after the sweep began: {some_names(sorted(changed))};"
                    " evaluate the results in another model, a copy.deepcopy of it, since those"
                    " of further settings would be merged from what was written"
                )

    def _ask(self, setting: Setting) -> _Asked:
        parameters = {"method": "ties", **self._parameters, **setting}
        found = find_method(parameters.pop("method"))
        if found.statistics:
            return _Asked(found.name, parameters, False, None, None)
        strict = parameters.pop("strict", False)
        check_flags(strict=strict)
        parameters.pop("statistics", None)
        asked = parse_merge(found, self._models, self._base, parameters)
        with renamed(**asked.names):
            options = asked.resolve()
        return _Asked(found.name, parameters, strict, asked, options)

    def _plan(self, asked: _Asked) -> Plan:
        assert asked.merge is not None
        with renamed(**asked.merge.names):
            return asked.merge.plan(
                self._mappings(asked.merge), asked.options, asked.strict, stacklevel=4
            )

    def _mappings(self, asked: AskedMerge) -> Mappings:
        """The inputs, read once for each order in which methods take them."""
        swapped = asked.base is None and self._base is not None
        if swapped not in self._inputs:
            self._inputs[swapped] = Mappings(asked.models, asked.base)
        return self._inputs[swapped]

    def merged(self, settings: Sequence[Setting]) -> list[State]:
        """The results of some settings, for `give_back`."""
        self._check_inputs()
        groups: dict[str, list[Any]] = {}
        others: list[Callable[[], None]] = []
        finished: list[Callable[[], State]] = []
        executors: list[OpExecutor] = []
        once: dict[int, Mappings] = {}
        for setting in settings:
            asked = self._asked[key_of(setting)]
            if asked.merge is None:
                finished.append(functools.partial(self._by_statistics, asked))
                continue
            plan, inputs = self._plan(asked), self._mappings(asked.merge)
            backend = asked.merge.others["backend"]
            kind = asked.merge.base is None, tuple((t.name, t.dtype, t.shape) for t in plan.tensors)
            free = self._free.setdefault(kind, [])
            sink = DictSink(plan, inputs, free.pop() if free else None)
            kept = once.setdefault(id(inputs), inputs.reading_once())
            executor = OpExecutor(kept, sink, backend)
            executors.append(executor)
            with renamed(**asked.merge.names):
                begun = executor.begin([*in_turn(plan.tensors, sink.owners)])
            for options, calls in begun.items():
                if isinstance(options, TiesOptions):
                    groups.setdefault(backend, []).append((options, calls))
                else:
                    others.append(functools.partial(executor.make_each, calls, options, 4))
            finished.append(functools.partial(self._finished, sink, kind))
        for backend, each in groups.items():
            self._together[backend].merge(each, stacklevel=4)
        for make in others:
            make()
        for executor in executors:
            executor.warn(stacklevel=3)
        return [finish() for finish in finished]

    def _finished(self, sink: DictSink, kind: object) -> State:
        state = sink.ordered()
        self._kinds[id(state)] = kind
        return state

    def give_back(self, state: State | None) -> None:
        """Let later settings write to the tensors of a result."""
        kind = self._kinds.pop(id(state), None)
        if state is not None and kind is not None:
            self._free[kind].append(state)

    def _by_statistics(self, asked: _Asked) -> State:
        given: Any = {**asked.parameters, "method": asked.method}
        return merge(self._models, self._base, **given)

    def identity(self) -> str:
        """A hash of what a row depends on beside its setting, but for the tensors' values."""
        digest = hashlib.sha256(__version__.encode())
        for state in (*self._models, *(() if self._base is None else (self._base,))):
            tensors = [(name, str(x.dtype), tuple(x.shape)) for name, x in state.items()]
            digest.update(repr(tensors).encode())
        for name, value in sorted(self._parameters.items()):
            try:
                text = json.dumps(plain_value(name, value))
            except TypeError:
                text = shown(value)
            digest.update(f"{name}={text}\n".encode())
        return digest.hexdigest()


def _versions(state: StateDict) -> dict[str, tuple[int, int]]:
    """Of each tensor what changes where it is replaced or written to; of mappings that may load
    theirs, nothing.
    """
    if not isinstance(state, dict):
        return {}
    with torch._C.DisableTorchFunctionSubclass():
        return {
            name: (id(tensor), 0 if tensor.is_inference() else tensor._version)
            for name, tensor in state.items()
            if isinstance(tensor, torch.Tensor)
        }


def _batches(settings: Sequence[Setting], count: int) -> Iterable[Sequence[Setting]]:
    return (settings[first : first + count] for first in range(0, len(settings), count))


def _check_count(at_once: object) -> None:
    if isinstance(at_once, bool) or not isinstance(at_once, int):
        raise TypeError(
            f"{argument('at_once', at_once)} is {type_of(at_once)}; pass a whole number"
        )
    if at_once < 1:
        raise ValueError(
            f"{argument('at_once', at_once)} is below 1; pass how many results to hold"
        )
