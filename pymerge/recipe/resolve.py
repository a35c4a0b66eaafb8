"""From a checked configuration to a recipe: its inputs, and the parameters of every output tensor.

Precedence, gradients and filters are mergekit's. For one tensor a parameter is looked up in the
parameters of the model (an entry of `models`, or a slice's source), then of the slice, of the
module, and of the top level; a level whose filters all fail to match passes on to the next. A
gradient is evaluated at t = i / (layers - 1) for layer i of its slice, or of the model where
nothing is sliced (t = 1 where there is one layer), and at t = 0 outside of the layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from pymerge.checkpoint.types import ModelHeader, Source
from pymerge.errors import ConfigError
from pymerge.messages.words import counted, some_names
from pymerge.methods._settings import Setting, Settings, parse_setting, resolve
from pymerge.methods._statistics import SolveOptions, needs_base, solve_options, start_models
from pymerge.methods._table import find_method
from pymerge.methods.method import REQUIRED, Given
from pymerge.recipe.checks import ZERO_SUM, zero_sum
from pymerge.recipe.layers import Layers, Origin, comes_first, position
from pymerge.recipe.model import MergeRecipe, TensorTask, TokenRow
from pymerge.recipe.modules import module_of
from pymerge.recipe.references import ModelReference, find_local, parse_reference
from pymerge.recipe.schema import Config, check_config, read_config
from pymerge.recipe.yaml import Document, as_yaml
from pymerge.rules.mats import INITS
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import TiesOptions

_MOST_LAYERS = 100_000


@dataclass(frozen=True)
class _Input:
    """One input of a group: index of the model, its first layer, its own parameters."""

    model: int
    start: int
    settings: Settings


@dataclass(frozen=True)
class _Group:
    """Inputs that are merged with one another. length: number of layers of the slice; None without
    slices.
    """

    inputs: tuple[_Input, ...]
    base: int | None
    length: int | None
    levels: tuple[Settings, ...]


@dataclass(frozen=True)
class _Spot:
    """A tensor of the output: the group that makes it, its name, its name in each input, its t."""

    group: _Group
    name: str
    sources: tuple[str, ...]
    t: float


def read_recipe(
    config: str | FilePath | Mapping[str, Any], *, seed: int = 0, non_finite: str = "error"
) -> MergeRecipe:
    """The recipe of a YAML file in mergekit's format, or of a mapping of the same keys.

    seed: of the random masks (DARE). non_finite: "error" or "allow" (docs/spec/ties.md, N3). Local
    paths are looked up from the working directory, then from the file's folder. What has no effect
    gives a UserWarning. ConfigError lists every problem.
    """
    recipe, notes = recipe_and_notes(config, seed=seed, non_finite=non_finite)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return recipe


def recipe_and_notes(
    config: str | FilePath | Mapping[str, Any], *, seed: int, non_finite: str
) -> tuple[MergeRecipe, list[str]]:
    """`read_recipe` that returns what it would warn of: catching warnings changes their filters for
    all threads.
    """
    checked, document, notes = read_config(config)
    folder = None if isinstance(config, Mapping) else FilePath(config).parent
    return _Builder(checked, folder, seed, non_finite).recipe(document.data), [*notes]


def recipe_of(
    document: Document, folder: FilePath, *, seed: int, non_finite: str
) -> tuple[MergeRecipe, list[str]]:
    """As `recipe_and_notes`, for one document of a file in `folder`."""
    checked, _, notes = check_config(document, folder)
    return _Builder(checked, folder, seed, non_finite).recipe(document.data), [*notes]


class _Builder:
    def __init__(self, config: Config, folder: FilePath | None, seed: int, non_finite: str) -> None:
        self.config = config
        self.folder = folder
        self.seed = seed
        self.non_finite = non_finite
        self.method = find_method(config.merge_method, "merge_method")
        self.references: list[ModelReference] = []
        self.statistics: dict[int, tuple[str, str]] = {}  # model -> (entry, file)
        self.filters: set[tuple[str, str]] = set()
        self.starts: dict[str, int] = {}  # models that an initialisation names
        self.base = None if config.base_model is None else self.index(config.base_model)
        self.modules = tuple(config.modules or {})  # several have a group each
        self.groups = tuple(self.all_groups())
        if self.method.statistics:
            for reference in start_models([level for g in self.groups for level in g.levels]):
                self.starts[reference] = self.index(self.start_reference(reference))
        self.options: dict[Any, OpOptions] = {}
        self.solves: dict[Any, tuple[SolveOptions, TiesOptions | None, str]] = {}

    def index(self, reference: ModelReference) -> int:
        if reference not in self.references:
            self.references.append(reference)
        return self.references.index(reference)

    def own_statistics(self, model: int, path: str | None, place: str) -> None:
        """Register a model's statistics file; ConfigError where the recipe names two for it."""
        if path is None or not self.method.statistics:
            return
        first, known = self.statistics.setdefault(model, (place, path))
        if known != path:
            raise ConfigError(
                f"{place}: {self.references[model]} has two statistics files, {known} in {first}"
                f" and {path} here; merge them into one (pymerge stats merge), or name the same"
            )

    def start_reference(self, text: str) -> ModelReference:
        try:
            return parse_reference(text, self.folder)
        except ValueError as error:
            raise ConfigError(
                f"init: {error}; or one of {', '.join(INITS)}, or a model to start from"
            ) from None

    def settings(self, parameters: Mapping[str, Any] | None) -> Settings:
        found: dict[str, Setting] = {}
        for name, raw in (parameters or {}).items():
            parameter = self.method.parameter(name)
            if parameter is not None:
                found[name] = parse_setting(parameter, raw)
                filters = (case.filter for case in found[name].cases)
                self.filters.update((name, part) for part in filters if part not in (None, "*"))
        return found

    def all_groups(self) -> Iterator[_Group]:
        config = self.config
        top = self.settings(config.parameters)
        yield from self.groups_of("", config.models, config.slices, (top,))
        for name, module in (config.modules or {}).items():
            levels = (self.settings(module.parameters), top)
            yield from self.groups_of(f"modules.{name}.", module.models, module.slices, levels)

    def groups_of(
        self, place: str, models: Any, slices: Any, levels: tuple[Settings, ...]
    ) -> Iterator[_Group]:
        if models:
            inputs = [
                _Input(self.index(entry.model), 0, self.settings(entry.parameters))
                for entry in models
            ]
            for i, (each, entry) in enumerate(zip(inputs, models, strict=True)):
                self.own_statistics(each.model, entry.statistics, f"{place}models[{i}]")
            if self.base is not None and all(each.model != self.base for each in inputs):
                inputs.append(_Input(self.base, 0, {}))
            yield _Group(tuple(inputs), self.base, None, levels)
        for j, piece in enumerate(slices or ()):
            inputs = [
                _Input(
                    self.index(entry.model), entry.layer_range[0], self.settings(entry.parameters)
                )
                for entry in piece.sources
            ]
            for i, (each, entry) in enumerate(zip(inputs, piece.sources, strict=True)):
                where = f"{place}slices[{j}].sources[{i}]"
                self.own_statistics(each.model, entry.statistics, where)
            base = self.base if piece.base_model is None else self.index(piece.base_model)
            first, end = piece.sources[0].layer_range
            yield _Group(
                tuple(inputs), base, end - first, (self.settings(piece.parameters), *levels)
            )

    def recipe(self, data: Any) -> MergeRecipe:
        config = self.config
        source = config.tokenizer_source
        if config.tokenizer is not None:
            source = config.tokenizer.source or "union"
        inputs = tuple(self.references)
        tokens = tuple(self.token_rows())
        tokenizer = self.index(source) if isinstance(source, ModelReference) else None
        sliced = self.groups[0].length is not None
        layers = sum(group.length or 0 for group in self.groups)
        if layers > _MOST_LAYERS:  # before there is anything of each of them
            raise ConfigError(
                f"the slices have {layers:,} layers, and no model has more than {_MOST_LAYERS:,};"
                " layer_range is [first, end), two layer numbers"
            )
        return MergeRecipe(
            models=tuple(self.located(reference) for reference in self.references),
            base=self.base,
            method=self.method.name,
            tasks=self.tasks,
            dtype=config.dtype,
            out_dtype=config.out_dtype,
            tokenizer=self.base or 0 if source in ("base", "union") else tokenizer,
            union=source == "union",
            tokens=tokens,
            tokenizer_only=isinstance(source, ModelReference) and source not in inputs,
            pad_to_multiple_of=(config.tokenizer and config.tokenizer.pad_to_multiple_of) or 1,
            chat_template=config.chat_template,
            sliced=sliced,
            modular=not sliced and len({frozenset(_models(each)) for each in self.groups}) > 1,
            num_layers=layers if sliced else None,
            layers=tuple(self.origins()),
            non_finite=self.non_finite,
            filters=tuple(sorted(self.filters)),
            text=as_yaml(data),
            statistics=(
                tuple(self.statistics.get(m, ("", None))[1] for m in range(len(self.references)))
                if self.statistics
                else ()
            ),
        )

    def token_rows(self) -> Iterator[TokenRow]:
        """ConfigError for rows of models that are not merged."""
        settings = (self.config.tokenizer and self.config.tokenizer.tokens) or {}
        for token, each in settings.items():
            if each.model is not None and each.model not in self.references:
                raise ConfigError(
                    f"tokenizer.tokens[{token!r}]: its source {each.model} is none of the models"
                    " that are merged, and only these give rows"
                )
            model = None if each.model is None else self.references.index(each.model)
            yield TokenRow(token, model, each.source, each.zero, each.force)

    def origins(self) -> Iterator[Origin]:
        for group in self.groups:
            leader = _leader(group)
            start = next(each.start for each in group.inputs if each.model == leader)
            yield from (Origin(leader, start + i) for i in range(group.length or 0))

    def located(self, reference: ModelReference) -> str:
        if reference.adapter is not None:
            base, adapter = replace(reference, adapter=None), reference.adapter
            return f"{self.located(base)}+{self.located(adapter)}"
        found = None if reference.revision is not None else find_local(reference.path, self.folder)
        return str(reference) if found is None else str(found)

    # From here on, the headers of the models are known.

    def tasks(self, headers: Sequence[ModelHeader]) -> list[TensorTask]:
        problems: list[str] = []
        lacking: dict[tuple[str, int], list[str]] = {}
        zero_sums: list[str] = []
        result = []
        for spot in self.spots(headers):
            task = self.task(spot, lacking, zero_sums)
            if task is not None:
                result.append(task)
        for (name, model), tensors in lacking.items():
            problems.append(
                f"{name} has no value for {self.references[model]} in {some_names(tensors)}: no"
                " filter matches; add a case without a filter"
            )
        if zero_sums:
            problems.append(f"{some_names(zero_sums)}: {zero_sum(self.method)}")
        if problems:
            raise ConfigError(problems)
        return result

    def task(
        self, spot: _Spot, lacking: dict[tuple[str, int], list[str]], zero_sums: list[str]
    ) -> TensorTask | None:
        method, group = self.method, spot.group
        shared = {
            p.name: resolve(p, group.levels, spot.name, spot.t)
            for p in (*method.parameters, *method.extra)
            if p.scope == "shared"
        }
        base, sources, per_model = None, [], []
        complete = True
        inputs = list(zip(group.inputs, spot.sources, strict=True))
        if method.base_first:
            inputs.sort(key=lambda pair: pair[0].model != group.base)
        for each, tensor in inputs:
            if method.takes_base and each.model == group.base:
                base = Source(each.model, tensor)
                continue
            values = {
                p.name: resolve(p, (each.settings, *group.levels), tensor, spot.t)
                for p in method.parameters
                if p.scope != "shared"
            }
            for name, value in values.items():
                if value is REQUIRED:
                    lacking.setdefault((name, each.model), []).append(tensor)
                    complete = False
            sources.append(Source(each.model, tensor))
            per_model.append(values)
        if not complete:
            return None
        if method.statistics:
            return self.solve_task(spot, shared, base, sources, per_model)
        copied = method.copies and all(
            value is None for values in per_model for value in values.values()
        )
        if not sources or copied:
            # Only the base is among the models: there is nothing to add to it.
            only = tuple(sources) if sources or base is None else (base,)
            return TensorTask(spot.name, only, None, None, method.name)
        if method.divides_by_weights and shared["normalize"]:
            total = sum(values["weight"] for values in per_model)
            if abs(total) < ZERO_SUM:
                zero_sums.append(spot.name)
                return None
        return TensorTask(
            spot.name,
            tuple(sources),
            base,
            self.resolved(shared, per_model, base is not None),
            method.name,
        )

    def solve_task(
        self,
        spot: _Spot,
        shared: dict[str, Any],
        base: Source | None,
        sources: list[Source],
        per_model: list[dict[str, Any]],
    ) -> TensorTask:
        """The task of a method with statistics. Its base is read only where the initialisation
        needs it.
        """
        key = (tuple(shared.values()), tuple(tuple(values.values()) for values in per_model))
        if key not in self.solves:
            self.solves[key] = solve_options(self.method, shared, per_model, self.non_finite)
        solve, fallback, name = self.solves[key]
        init = shared["init"]
        start = None
        if needs_base(init):
            if base is None:
                raise ConfigError(f"init: {init} needs base_model, the model that was fine-tuned")
            start = base
        elif init in self.starts:
            start = Source(self.starts[init], spot.name)
        return TensorTask(spot.name, tuple(sources), start, fallback, name, solve=solve)

    def resolved(
        self, shared: dict[str, Any], per_model: list[dict[str, Any]], base: bool
    ) -> OpOptions:
        key = (tuple(shared.values()), tuple(tuple(values.values()) for values in per_model), base)
        if key not in self.options:
            given = Given(shared, per_model, base, self.seed, self.non_finite)
            self.options[key] = self.method.resolve(given)
        return self.options[key]

    def spots(self, headers: Sequence[ModelHeader]) -> Iterator[_Spot]:
        if len(self.modules) > 1:
            yield from self.spots_of_modules(headers)
            return
        if self.groups[0].length is None:
            group = self.groups[0]
            leader = group.inputs[0].model if group.base is None else group.base
            names = list(headers[leader].tensors)
            layers = Layers(names)
            for name in names:
                yield _Spot(group, name, (name,) * len(group.inputs), layers.position(name))
            return
        yield from self.sliced_spots(headers)

    def spots_of_modules(self, headers: Sequence[ModelHeader]) -> Iterator[_Spot]:
        """A module has the tensors of its base or first model. ConfigError for modules without any,
        and for tensors of the model that gives the config that are in no module.
        """
        problems: list[str] = []
        for module, group in zip(self.modules, self.groups, strict=True):
            leader = _leader(group)
            layers = Layers(headers[leader].tensors)
            names = [name for name in layers.names if module_of(name, self.modules) == module]
            for name in names:
                yield _Spot(group, name, (name,) * len(group.inputs), layers.position(name))
            if not names:
                problems.append(
                    f"modules.{module}: no tensor of {self.references[leader]} belongs to it; name"
                    " a module as mergekit does, or as the names of its tensors begin"
                )
        main = _leader(self.groups[0])
        homeless = [n for n in headers[main].tensors if module_of(n, self.modules) is None]
        if homeless:
            problems.append(
                f"modules: {counted(len(homeless), 'tensor')} of {self.references[main]} would be"
                f" missing from the result ({some_names(homeless)}); add their module"
            )
        if problems:
            raise ConfigError(problems)

    def sliced_spots(self, headers: Sequence[ModelHeader]) -> Iterator[_Spot]:
        """Embeddings from the first slice, the renumbered layers of all slices, the rest from the
        last slice.
        """
        layers = [Layers(header.tensors) for header in headers]
        stacks = self.stacks(layers)
        first, last = self.groups[0], self.groups[-1]
        leader = _leader(first)
        yield from self.outside(
            first,
            [n for n in layers[leader].names if comes_first(n)],
            layers[leader],
            stacks[leader],
        )
        done = 0
        for group in self.groups:
            leader = _leader(group)
            own = next(each for each in group.inputs if each.model == leader)
            length = group.length or 0
            places = [
                place
                for place in map(layers[leader].place, layers[leader].names)
                if place is not None and place.stack == stacks[leader]
            ]
            blocks: dict[int, list[Any]] = {}
            for place in places:
                blocks.setdefault(place.index, []).append(place)
            for i in range(length):
                for place in blocks.get(own.start + i, ()):
                    sources = tuple(
                        f"{stacks[each.model]}.{each.start + i}.{place.rest}"
                        for each in group.inputs
                    )
                    yield _Spot(group, place.renumbered(done + i), sources, position(i, length))
            done += length
        leader = _leader(last)
        yield from self.outside(
            last,
            [n for n in layers[leader].names if not comes_first(n)],
            layers[leader],
            stacks[leader],
        )

    def stacks(self, layers: list[Layers]) -> dict[int, str]:
        """Every input's list of layers; ConfigError for a range beyond it."""
        problems: list[str] = []
        stacks: dict[int, str] = {}
        for group in self.groups:
            for each in group.inputs:
                reference = str(self.references[each.model])
                try:
                    stack = stacks.setdefault(each.model, layers[each.model].only_stack(reference))
                except ConfigError as error:
                    problems += [problem for problem in error.problems if problem not in problems]
                    continue
                end = each.start + (group.length or 0)
                if end > layers[each.model].counts[stack]:
                    problems.append(
                        f"layer_range [{each.start}, {end}] of {reference}: it has"
                        f" {layers[each.model].counts[stack]} layers"
                    )
        if problems:
            raise ConfigError(problems)
        return stacks

    def outside(
        self, group: _Group, names: list[str], layers: Layers, stack: str
    ) -> Iterator[_Spot]:
        """What lies in no layer, lists of other modules (Gemma 3n's `altup_projections`) too."""
        for name in names:
            place = layers.place(name)
            if place is None or place.stack != stack:
                yield _Spot(group, name, (name,) * len(group.inputs), 0.0)


def _leader(group: _Group) -> int:
    """The input that gives a slice's tensor names: its base if that is among the sources, else the
    first.
    """
    models = _models(group)
    return group.base if group.base is not None and group.base in models else models[0]


def _models(group: _Group) -> list[int]:
    return [each.model for each in group.inputs]
