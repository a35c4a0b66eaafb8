"""The methods that merge by statistics: which parameters go together, and the options for one
tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pymerge.errors import ConfigError
from pymerge.methods._settings import Setting, Settings
from pymerge.methods.method import Method, Parameter
from pymerge.rules import mats
from pymerge.rules.ties import TiesOptions, resolve_options
from pymerge.rules.types import InitName


@dataclass(frozen=True)
class SolveOptions:
    """How a method with statistics merges one tensor (docs/spec/mats.md).

    method: "mats", "regmean" or "fisher". init: "average", "zero", "task_arithmetic", "ties", or
        "given": the task's base, whatever it is.
    allow_unsolved: of linear layers, more than half.
    init_options: of `pymerge.mats`. options: the op's other keyword arguments. output_grams: None
        uses them where they are.
    """

    method: str
    init: InitName | Literal["given"]
    init_options: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    output_grams: bool | None = None
    allow_unsolved: bool = False

    @property
    def exact(self) -> bool:
        """Whether the system is solved directly, in binary64."""
        return self.method == "regmean" or dict(self.options).get("solver") == "exact"

    @property
    def precision(self) -> str:
        """The precision of conjugate gradient; the default of `pymerge.mats` where none is
        given.
        """
        return str(dict(self.options).get("precision", "fp32"))


# Initialisations that need the base, and those that take the parameter `lambda`.
_OF_THE_BASE = ("pretrained", "task_arithmetic", "ties")
_SCALED = ("task_arithmetic", "ties")


def start_models(levels: Sequence[Settings]) -> list[str]:
    """References of models that these parameters name as initialisation."""
    found = []
    for level in levels:
        setting: Setting | None = level.get("init")
        for case in setting.cases if setting is not None else ():
            found += [str(value) for value in case.values if value not in mats.INITS]
    return list(dict.fromkeys(found))


def needs_base(init: str) -> bool:
    """Whether an initialisation uses the base model."""
    return init in _OF_THE_BASE


def solve_options(
    method: Method,
    shared: Mapping[str, Any],
    per_model: Sequence[Mapping[str, Any]],
    non_finite: str = "error",
) -> tuple[SolveOptions, TiesOptions | None, str]:
    """What to do with a tensor that has statistics, and with one that has none: options of `ties`,
    None to copy the base.

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
            mats.resolve(count, **options)
        elif "task_weights" in options:
            mats.given_task_weights(options["task_weights"], count)
    except ValueError as error:
        raise ConfigError(f"merge_method {method.name}: {error}") from None
    given = init == "pretrained" or init not in mats.INITS
    solve = SolveOptions(
        method=method.name,
        init="given" if given else init,
        init_options=tuple(init_options.items()),
        options=tuple(options.items()),
        output_grams=shared.get("output_grams"),
        allow_unsolved=bool(shared.get("allow_unsolved")),
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
    # A norm or a bias of zeros would break the model: without statistics, the average stands in for
    # zero (M4).
    return solve, fallback, "average" if init == "zero" else init


def _weights(
    method: Method, shared: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The option `task_weights` (M3); empty where every weight is 1."""
    numbers = tuple(values["weight"] for values in per_model)
    if not any(numbers):
        raise ConfigError(
            f"merge_method {method.name}: the weights of all models are 0; give at least one a"
            " weight above 0"
        )
    plain = all(number == 1 for number in numbers)
    if shared.get("task_weights") == "trace":
        if not plain:
            raise ConfigError(
                f"merge_method {method.name}: weight is given and task_weights is trace; keep one"
                " of the two"
            )
        return {"task_weights": "trace"}
    return {} if plain else {"task_weights": numbers}


# Of the methods that merge by statistics; names and defaults are those of docs/spec/mats.md.
_COUNTS = Parameter("weight", "number", "non_base", "", 1.0, 0)
_START = (
    Parameter("init", "text", "shared", "", "average"),
    Parameter("lambda", "number", "shared", "", 1.0),  # for the initialisations that have one
    Parameter("density", "number", "non_base", "", 0.2, 0, 1),  # for init: ties
)
_OFF_DIAGONAL = Parameter(
    "off_diagonal",
    "number",
    "shared",
    "off_diagonal",
    1.0,
    0,
    1,
    hint="1 leaves the Gram matrices as they are, 0 keeps their diagonals alone",
)
_UNSOLVED = Parameter("allow_unsolved", "flag", "shared", "", None)
_TASK_WEIGHTS = Parameter("task_weights", "choice", "shared", "", "raw", choices=mats.TASK_WEIGHTS)
_SOLVER = (
    Parameter("flavor", "choice", "shared", "flavor", "default", choices=mats.FLAVORS),
    Parameter("solver", "choice", "shared", "solver", "cg", choices=mats.SOLVERS),
    Parameter("iterations", "integer", "shared", "iterations", None, 0),
    Parameter("damping", "number", "shared", "damping", 0.01, 0),
    Parameter("step_limit", "number", "shared", "step_limit", None, 0),
    Parameter("objective_tolerance", "number", "shared", "objective_tolerance", None, 0),
    Parameter("precision", "choice", "shared", "precision", None, choices=mats.PRECISIONS),
    Parameter("output_grams", "flag", "shared", "", None),
)

BY_STATISTICS = (
    Method(
        "mats",
        "MaTS",
        "https://arxiv.org/abs/2312.04339",
        {},
        (_COUNTS, _TASK_WEIGHTS, *_SOLVER, _OFF_DIAGONAL, *_START, _UNSOLVED),
        op="statistics",
        statistics=("input_gram", "block_fisher"),
    ),
    Method(
        "regmean",
        "RegMean",
        "https://arxiv.org/abs/2212.09849",
        {},
        (_COUNTS, _TASK_WEIGHTS, _OFF_DIAGONAL, *_START, _UNSOLVED),
        op="statistics",
        statistics=("input_gram", "block_fisher"),
    ),
    Method(
        "fisher",
        "Fisher merging",
        "https://arxiv.org/abs/2111.09832",
        {},
        (
            _COUNTS,
            _TASK_WEIGHTS,
            Parameter("minimum", "number", "shared", "minimum", 0.0, 0),
            *_START,
        ),
        op="statistics",
        statistics=("diagonal_fisher",),
    ),
)
