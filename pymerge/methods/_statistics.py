"""The methods that merge by statistics: what their recipes must say, and what that means for one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge._yaml import Path
from pymerge.errors import ConfigError
from pymerge.methods._settings import Setting, Settings
from pymerge.methods._table import Method
from pymerge.ops import _mats_rule
from pymerge.ops._rule import TiesOptions, resolve_options
from pymerge.plan import SolveOptions

# Initialisations that need the base, and those that take the parameter `lambda`.
_OF_THE_BASE = ("pretrained", "task_arithmetic", "ties")
_SCALED = ("task_arithmetic", "ties")

Problem = tuple[Path, str]


def check_statistics(
    method: Method,
    named: Sequence[tuple[Path, Mapping[str, Any], Any]],
    base: Any,
    problems: list[Problem],
    remarks: list[Problem],
) -> None:
    """Every merged model has a statistics file, and nothing else has one. named: (place, entry, model) of a group's inputs."""
    for path, entry, model in named:
        given = entry.get("statistics")
        if not method.statistics:
            if given is not None:
                text = f"statistics has no effect with merge_method {method.name}"
                remarks.append(((*path, "statistics"), text))
        elif model is not None and model == base:
            if given is not None:
                text = (
                    f"{place_of(path)}: {model} is the base model, which initialisations are made from, not one of the "
                    f"merged models; leave its statistics ({given}) out"
                )
                problems.append(((*path, "statistics"), text))
        elif given is None:
            text = (
                f"{'model' if model is None else model}: statistics is missing; merge_method {method.name} needs a file for "
                f"every model: pymerge stats {'MODEL' if model is None else model} TEXTS{_KINDS.get(method.name, '')} --out FILE"
            )
            problems.append((path, text))
    if method.statistics and all(model == base for _, _, model in named if base is not None):
        if named and base is not None:
            problems.append((named[0][0], "there is no model to merge beside the base"))


def place_of(path: Path) -> str:
    """An entry of a recipe: slices[1].sources[0]."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


# What `pymerge stats` must be asked for, beyond its defaults.
_KINDS = {"regmean": " --kinds input_gram", "fisher": " --kinds diagonal_fisher"}


def start_models(levels: Sequence[Settings]) -> list[str]:
    """Models, by reference, that these parameters name as an initialisation."""
    found = []
    for level in levels:
        setting: Setting | None = level.get("init")
        for case in setting.cases if setting is not None else ():
            found += [str(value) for value in case.values if value not in _mats_rule.INITS]
    return list(dict.fromkeys(found))


def needs_base(init: str) -> bool:
    """Whether an initialisation is made from the base model."""
    return init in _OF_THE_BASE


def solve_options(
    method: Method,
    shared: Mapping[str, Any],
    per_model: Sequence[Mapping[str, Any]],
    non_finite: str = "error",
) -> tuple[SolveOptions, TiesOptions | None, str]:
    """What to do with a tensor that has statistics, and with one that has none: options of `ties`, None to copy the base.

    Returns those and the fallback's name. ConfigError for values that do not go together.
    """
    count = len(per_model)
    init = shared["init"]
    init_options: dict[str, Any] = {}
    if init in _SCALED:
        init_options["scaling"] = shared["lambda"]
    if init == "ties":
        init_options["density"] = tuple(values["density"] for values in per_model)
    options = {
        parameter.option: shared[parameter.name]
        for parameter in method.parameters
        if parameter.option and shared[parameter.name] is not None
    }
    if "iterations" in options:
        options["iterations"] = round(options["iterations"])
    options |= _weights(method, shared, per_model)
    try:
        if method.name == "mats":
            _mats_rule.resolve(count, **options)
        elif "task_weights" in options:
            _mats_rule.given_task_weights(options["task_weights"], count)
    except ValueError as error:
        raise ConfigError(f"merge_method {method.name}: {error}") from None
    given = init == "pretrained" or init not in _mats_rule.INITS
    solve = SolveOptions(
        method=method.name,
        init="given" if given else init,
        init_options=tuple(init_options.items()),
        options=tuple(options.items()),
        output_grams=shared.get("output_grams"),
    )
    if given:
        return solve, None, "pretrained" if init == "pretrained" else "init model"
    if init == "ties":
        rule: dict[str, Any] = {"density": init_options["density"]}
    else:
        rule = {"trim": "none", "elect": "none", "density": 1.0}
    if init == "task_arithmetic":
        rule["merge"] = "sum"
    fallback = resolve_options(
        count, scaling=init_options.get("scaling", 1.0), non_finite=non_finite, **rule
    )
    # A norm or a bias of zeros would break the model: without statistics, the average stands in for zero (M4).
    return solve, fallback, "average" if init == "zero" else init


def _weights(
    method: Method, shared: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The option `task_weights` (M3); left out where it says nothing."""
    numbers = tuple(values["weight"] for values in per_model)
    if not any(numbers):
        raise ConfigError(
            f"merge_method {method.name}: the weights of all models are 0; give at least one a weight above 0"
        )
    plain = all(number == 1 for number in numbers)
    if shared.get("task_weights") == "trace":
        if not plain:
            raise ConfigError(
                f"merge_method {method.name}: weight is given and task_weights is trace; keep one of the two"
            )
        return {"task_weights": "trace"}
    return {} if plain else {"task_weights": numbers}
