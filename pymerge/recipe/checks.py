"""What a recipe says, beyond its structure: methods, parameters at every level, inputs of every
group.

Works on plain data that may be malformed anywhere, so that these problems are listed together with
those of structure; whatever has the wrong type is passed over here, since the structure check names
it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pymerge.errors import ConfigError
from pymerge.messages.words import some_names
from pymerge.methods._settings import Setting, SettingError, Settings, parse_setting, resolve
from pymerge.methods._statistics import needs_base, solve_options
from pymerge.methods._table import KNOWN_PARAMETERS, find_method
from pymerge.methods.method import REQUIRED, Given, Method, short
from pymerge.recipe.ignored import option_note
from pymerge.recipe.yaml import Path
from pymerge.rules.mats import INITS

# Weights of an average that sum to less than this count as zero (docs/spec/ties.md, T5).
ZERO_SUM = 1e-8
_FORMER_PARAMETERS = ("embed_slerp",)  # of mergekit's slerp, long without effect there

Problem = tuple[Path, str]


@dataclass(frozen=True)
class _Group:
    """Inputs that are merged with one another: `models`, or the sources of one slice."""

    path: Path
    inputs: list[tuple[Path, dict[str, Any]]]
    base: Any
    levels: tuple[dict[str, Any], ...]  # the parameters of slice, module and top level
    sliced: bool


def check_content(
    data: dict[str, Any], reference: Callable[[Any], Any]
) -> tuple[list[Problem], list[Problem]]:
    """(problems, notes on entries without effect). `reference` parses a model reference, or returns
    None.
    """
    problems: list[Problem] = []
    remarks: list[Problem] = []
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        what = f"{' and '.join(given)} are both there" if given else "there are none"
        problems.append(
            (
                (given[-1],) if given else (),
                f"exactly one of models, slices and modules is needed; {what}",
            )
        )
    if data.get("tokenizer") is not None and data.get("tokenizer_source") is not None:
        problems.append(
            (
                ("tokenizer_source",),
                "tokenizer and tokenizer_source are both there; keep one of the two",
            )
        )
    remarks += _base_as_tokenizer(data)
    _check_modules(data, problems)
    method = None
    if "merge_method" in data:
        try:
            method = find_method(data["merge_method"], "merge_method")
        except ConfigError as error:
            problems.append((("merge_method",), str(error)))
    if method is not None:
        for path, per_model, parameters in _levels(data):
            _check_parameters(method, path, per_model, parameters, reference, problems, remarks)
        remarks += _without_normalize(method, data)
        for group in _groups(data):
            _check_group(method, group, reference, problems, remarks)
        if method.statistics:
            _check_one_file_each(data, reference, problems)
    for group in _groups(data):
        _check_ranges(group, problems)
    for path, piece in _slices(data):
        if piece.get("residual_weight") is not None:
            remarks.append(((*path, "residual_weight"), "residual_weight has no effect"))
    return problems, remarks


def _without_normalize(method: Method, data: dict[str, Any]) -> Iterator[Problem]:
    """Notes on `normalize` where a flavor other than mergekit's makes it void."""
    levels = [(path, parameters) for path, _, parameters in _levels(data)]
    flavors = {str(parameters.get("flavor", "mergekit")) for _, parameters in levels}
    for path, parameters in levels if method.parameter("flavor") and not method.statistics else ():
        if "normalize" in parameters and flavors & {"peft", "paper"}:
            named = some_names(sorted(flavors - {"mergekit"}))
            yield (*path, "normalize"), f"normalize has no effect with flavor {named}"


def _base_as_tokenizer(data: dict[str, Any]) -> Iterator[Problem]:
    tokenizer = data.get("tokenizer")
    nested = tokenizer.get("source") if isinstance(tokenizer, dict) else None
    if data.get("base_model") is None and "base" in (data.get("tokenizer_source"), nested):
        path: Path = ("tokenizer", "source") if nested == "base" else ("tokenizer_source",)
        yield path, "there is no base_model, so 'base' is the first model and its tokenizer"


def _check_modules(data: dict[str, Any], problems: list[Problem]) -> None:
    modules = data.get("modules")
    if not isinstance(modules, dict):
        return
    for name, module in modules.items():
        if isinstance(module, dict) and bool(module.get("models")) == bool(module.get("slices")):
            problems.append(
                (("modules", name), f"modules.{name} needs exactly one of models and slices")
            )
        elif len(modules) > 1 and isinstance(module, dict) and module.get("slices"):
            text = (
                f"modules.{name}: slices of one of several modules are not there yet; merge"
                " its models whole"
            )
            problems.append((("modules", name, "slices"), text))


def _dicts(items: Any, path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for i, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict):
            yield (*path, i), item


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _holders(data: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The mappings that may have models or slices: the top level and every module."""
    yield (), data
    for name, module in _mapping(data.get("modules")).items():
        if isinstance(module, dict):
            yield ("modules", name), module


def _slices(data: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path, holder in _holders(data):
        yield from _dicts(holder.get("slices"), (*path, "slices"))


def _levels(data: dict[str, Any]) -> Iterator[tuple[Path, bool, dict[str, Any]]]:
    """Every `parameters` mapping: its place, and whether it belongs to one model."""
    for path, holder in _holders(data):
        entries = [(path, False, holder)]
        entries += [
            (p, True, entry) for p, entry in _dicts(holder.get("models"), (*path, "models"))
        ]
        for p, piece in _dicts(holder.get("slices"), (*path, "slices")):
            entries.append((p, False, piece))
            entries += [
                (q, True, entry) for q, entry in _dicts(piece.get("sources"), (*p, "sources"))
            ]
        for p, per_model, entry in entries:
            if isinstance(entry.get("parameters"), dict):
                yield (*p, "parameters"), per_model, entry["parameters"]


def _groups(data: dict[str, Any]) -> Iterator[_Group]:
    top = _mapping(data.get("parameters"))
    base = data.get("base_model")
    for path, holder in _holders(data):
        levels = (top,) if not path else (_mapping(holder.get("parameters")), top)
        models = list(_dicts(holder.get("models"), (*path, "models")))
        if models:
            yield _Group((*path, "models"), models, base, levels, sliced=False)
        for p, piece in _dicts(holder.get("slices"), (*path, "slices")):
            sources = list(_dicts(piece.get("sources"), (*p, "sources")))
            slice_base = base if piece.get("base_model") is None else piece["base_model"]
            yield _Group(
                p, sources, slice_base, (_mapping(piece.get("parameters")), *levels), sliced=True
            )


def _check_parameters(
    method: Method,
    path: Path,
    per_model: bool,
    parameters: dict[str, Any],
    reference: Callable[[Any], Any],
    problems: list[Problem],
    remarks: list[Problem],
) -> None:
    for name, raw in parameters.items():
        here = (*path, name)
        parameter = method.parameter(name)
        if parameter is None:
            if name in KNOWN_PARAMETERS or name in _FORMER_PARAMETERS:
                remarks.append((here, f"{name} has no effect with merge_method {method.name}"))
                continue
            option = option_note(name)
            if option is not None:
                remarks.append((here, option))
                continue
            own = [p.name for p in method.parameters]
            near = difflib.get_close_matches(name, own, n=1)
            hint = (
                f"; did you mean {near[0]!r}?" if near else f"; {method.name} has {', '.join(own)}"
            )
            problems.append((here, f"unknown parameter {short(name)}{hint}"))
            continue
        if parameter.scope == "shared" and per_model:
            remarks.append(
                (
                    here,
                    (
                        f"{name} is one value for all models; it has no effect in a model's own"
                        " parameters"
                    ),
                )
            )
        elif not parameter.option and parameter.name != "int8_mask" and not method.statistics:
            remarks.append((here, f"{name} has no effect with merge_method {method.name}"))
        try:
            setting = parse_setting(parameter, raw)
        except SettingError as error:
            problems += [
                ((*here, *at), f"{_place(name, at)}: {text}") for at, text in error.problems
            ]
            continue
        if name == "init" and method.statistics:
            problems += [
                (here, f"init: {short(value)} is neither one of {', '.join(INITS)} nor a model")
                for value in _values(setting)
                if value not in INITS and reference(value) is None
            ]


def _place(name: str, at: Path) -> str:
    return name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at)


def _check_group(
    method: Method,
    group: _Group,
    reference: Callable[[Any], Any],
    problems: list[Problem],
    remarks: list[Problem],
) -> None:
    named = [(path, entry, reference(entry.get("model"))) for path, entry in group.inputs]
    base = None if group.base is None else reference(group.base)
    first: dict[Any, Path] = {}
    for path, _, model in named:
        if model is not None and model in first:
            problems.append(
                (path, f"{model} is there twice; give it once, with the sum of the weights")
            )
        elif model is not None:
            first[model] = path
    check_statistics(method, named, base, problems, remarks)
    if method.needs_base and group.base is None:
        problems.append((group.path, f"merge_method {method.name} needs base_model"))
    elif (method.takes_base or method.base_first) and group.sliced:
        if base is not None and base not in first:
            text = (
                f"the base model {base} is not among the sources of this slice; add it with its"
                " layer_range"
            )
            problems.append((group.path, text))
    merged = [
        entry for _, entry, model in named if not (method.takes_base and base and model == base)
    ]
    _check_values(method, group, merged, problems)
    inputs = [
        (path, entry.get("parameters"))
        for path, entry, model in named
        if not method.takes_base or model != base
    ]
    if base is not None and not group.sliced and base not in first and not method.takes_base:
        inputs.append((group.path, None))
        if _lacks(method, [], group.levels) and not method.base_first and not method.max_models:
            problems.append(
                (
                    ("base_model",),
                    (
                        f"merge_method {method.name} does not subtract a base: base_model is one"
                        " more input and has no weight; add it to models with a weight, or"
                        " remove it"
                    ),
                )
            )
    wrong = method.wrong_count(len(inputs))
    if wrong:
        beside = _counted_as(method, base, len(inputs) > len(named))
        problems.append((group.path, f"merge_method {method.name} {wrong}{beside}"))
    for path, parameters in inputs:
        if path == group.path or (parameters is not None and not isinstance(parameters, dict)):
            continue
        for name in _lacks(method, [_mapping(parameters)], group.levels):
            problems.append(
                (
                    path,
                    (
                        f"{place_of(path)}: {name} is missing; set it here, or for all models in"
                        " the top-level parameters"
                    ),
                )
            )


def _counted_as(method: Method, base: Any, added: bool) -> str:
    """What a message on a wrong number of models says of the base."""
    if added:
        return " (base_model is one of them)"
    return " beside base_model" if method.takes_base and base is not None else ""


def _check_values(
    method: Method, group: _Group, entries: list[dict[str, Any]], problems: list[Problem]
) -> None:
    """Check combinations of values that are constant over all tensors. Gradients and filters can be
    checked only with the models.
    """
    levels, wrong = _parsed(method, group.levels)
    own, also_wrong = _parsed(method, [_mapping(entry.get("parameters")) for entry in entries])
    for value in _possible("init", levels) if method.statistics and group.base is None else ():
        if needs_base(value):
            text = f"init: {value} needs base_model, the model that was fine-tuned"
            problems.append((group.path, text))
            return
    if wrong or also_wrong:
        return  # reported value by value
    if any(
        len(_values(each)) > 1 or not each.always for s in (*levels, *own) for each in s.values()
    ):
        return
    shared = {p.name: resolve(p, levels, "", 0) for p in method.parameters if p.scope == "shared"}
    per_model = [
        {p.name: resolve(p, (s, *levels), "", 0) for p in method.parameters if p.scope != "shared"}
        for s in own
    ]
    if any(REQUIRED in values.values() for values in (shared, *per_model)) or not per_model:
        return
    if method.statistics:
        try:
            solve_options(method, shared, per_model)
        except ConfigError as error:
            problems += [(group.path, text) for text in error.problems]
        return
    if method.make is not None and not method.wrong_count(len(per_model)):
        try:
            method.resolve(Given(shared, per_model, group.base is not None))
        except ValueError as error:
            problems.append((group.path, f"merge_method {method.name}: {error}"))
    if method.divides_by_weights and shared["normalize"]:
        if abs(sum(values["weight"] for values in per_model)) < ZERO_SUM:
            problems.append((group.path, zero_sum(method)))


def zero_sum(method: Method) -> str:
    """What messages say of weights that cancel."""
    return (
        f"the weights of {method.name} sum to 0, so there is no average; change a weight, or set"
        " normalize: false for a plain sum"
    )


def _parsed(method: Method, levels: Sequence[Mapping[str, Any]]) -> tuple[list[Settings], bool]:
    """The parsed settings, and whether an invalid one was left out."""
    found: list[Settings] = []
    wrong = False
    for level in levels:
        settings: dict[str, Setting] = {}
        for name, raw in level.items():
            parameter = method.parameter(name)
            try:
                if parameter is not None:
                    settings[name] = parse_setting(parameter, raw)
            except SettingError:
                wrong = True
        found.append(settings)
    return found, wrong


def _possible(name: str, levels: Sequence[Settings]) -> list[Any]:
    """The values that some tensor may get."""
    found: list[Any] = []
    for settings in levels:
        if name in settings:
            found += _values(settings[name])
            if settings[name].always:
                break
    return found


def _values(setting: Setting) -> list[Any]:
    return [value for case in setting.cases for value in case.values]


def _check_one_file_each(
    data: dict[str, Any], reference: Callable[[Any], Any], problems: list[Problem]
) -> None:
    """Check that a model in several slices has the same statistics file in all of them."""
    first: dict[Any, tuple[str, str]] = {}
    for group in _groups(data):
        for path, entry in group.inputs:
            model, file = reference(entry.get("model")), entry.get("statistics")
            if model is None or not isinstance(file, str):
                continue
            place, known = first.setdefault(model, (place_of(path), file))
            if FilePath(known) != FilePath(file):
                text = (
                    f"{place_of(path)}: {model} has two statistics files, {known} in {place} and"
                    f" {file} here; merge them into one (pymerge stats merge), or name the same"
                )
                problems.append(((*path, "statistics"), text))


def _lacks(
    method: Method, own: list[dict[str, Any]], levels: tuple[dict[str, Any], ...]
) -> list[str]:
    return [
        parameter.name
        for parameter in method.parameters
        if parameter.default is REQUIRED
        and not any(parameter.name in level for level in (*own, *levels))
    ]


def _check_ranges(group: _Group, problems: list[Problem]) -> None:
    lengths = {}
    for path, entry in group.inputs:
        ends = entry.get("layer_range")
        if not isinstance(ends, list) or [type(end) for end in ends] != [int, int]:
            continue
        if 0 <= ends[0] < ends[1]:  # others are reported with the structure
            lengths[(*path, "layer_range")] = ends[1] - ends[0]
    if len(set(lengths.values())) > 1:
        listed = some_names(lengths.values())
        problems.append(
            (group.path, f"the sources of one slice have the same number of layers, not {listed}")
        )


__all__ = ["check_content"]


def check_statistics(
    method: Method,
    named: Sequence[tuple[Path, Mapping[str, Any], Any]],
    base: Any,
    problems: list[Problem],
    remarks: list[Problem],
) -> None:
    """Check that every merged model has a statistics file, and nothing else has one. named: (place,
    entry, model) of a group's inputs.
    """
    for path, entry, model in named:
        given = entry.get("statistics")
        if not method.statistics:
            if given is not None:
                text = f"statistics has no effect with merge_method {method.name}"
                remarks.append(((*path, "statistics"), text))
        elif model is not None and model == base:
            if given is not None:
                text = (
                    f"{place_of(path)}: {model} is the base model, which initialisations are made"
                    f" from, not one of the merged models; leave its statistics ({given}) out"
                )
                problems.append(((*path, "statistics"), text))
        elif given is None:
            text = (
                f"{'model' if model is None else model}: statistics is missing; merge_method"
                f" {method.name} needs a file for every model: pymerge stats"
                f" {'MODEL' if model is None else model} TEXTS{_KINDS.get(method.name, '')} --out"
                " FILE"
            )
            problems.append((path, text))
    if method.statistics and all(model == base for _, _, model in named if base is not None):
        if named and base is not None:
            problems.append((named[0][0], "there is no model to merge beside the base"))


def place_of(path: Path) -> str:
    """The place of a recipe's entry: slices[1].sources[0]."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


# Kinds that `pymerge stats` collects on request only.
_KINDS = {"regmean": " --kinds input_gram", "fisher": " --kinds diagonal_fisher"}
