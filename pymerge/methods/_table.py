"""The methods by name: their parameters, their inputs, and the op options that they stand for.

Names, defaults and scopes are those of mergekit's YAML, so an existing file keeps its meaning. A
new elementwise method is one `Method(...)` entry: its fixed options of `ties` and the parameters
that a recipe may set.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pymerge.errors import ConfigError
from pymerge.messages.arguments import argument
from pymerge.messages.words import exact, type_of
from pymerge.rules import mats as _rule
from pymerge.rules.types import Flavor


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method, as a recipe names it.

    kind: "number", "integer", "flag", "choice" (of `choices`) or "text".
    scope: "shared" (one value per tensor), "input" (one per model, the base included where it is
        among the models) or "non_base" (one per fine-tuned model).
    option: the option of `ties` that takes the value; "" where the value has no effect.
    default: REQUIRED, or the value where no recipe level sets it.
    hint: what values in the range mean, for the error on one outside it.
    """

    name: str
    kind: str
    scope: str
    option: str
    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    hint: str = ""

    def convert(self, value: Any) -> float | bool | str:
        """The value as float, bool or text. TypeError or ValueError with the reason alone; the
        caller adds the parameter's name.
        """
        if self.kind in ("choice", "text"):
            return self._text(value)
        if self.kind == "flag":
            return _flag(value)
        number = self._number(value)
        if self.kind == "integer" and number != int(number):
            raise ValueError(f"{exact(number)} is not a whole number")
        return number

    def _text(self, value: Any) -> str:
        if not isinstance(value, str) or not value:
            allowed = f"one of {', '.join(self.choices)}" if self.choices else "text"
            raise TypeError(f"{_short(value)} is {_kind(value)}; pass {allowed}")
        if self.kind == "choice" and value not in self.choices:
            hint = nearest(value, self.choices)
            raise ValueError(f"{_short(value)} is not one of {', '.join(self.choices)}{hint}")
        return value

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError(f"{value!r} is {_kind(value)}; pass a number")
        try:
            number = float(value)  # YAML reads 1e-3 as text
        except (ValueError, OverflowError):
            raise TypeError(f"{_short(value)} is not a number") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(f"{value} is not finite; pass a finite number")
        if (self.low is not None and number < self.low) or (
            self.high is not None and number > self.high
        ):
            low = "(-infinity" if self.low is None else f"[{exact(self.low)}"
            allowed = f"{low}, {'infinity)' if self.high is None else f'{exact(self.high)}]'}"
            hint = self.hint
            if not hint and 2 <= number <= 100 and self.high == 1:
                hint = f"for {exact(number)}% pass {exact(number / 100)}"
            raise ValueError(
                f"{exact(number)} is outside {allowed}" + (f"; {hint}" if hint else "")
            )
        return number


@dataclass(frozen=True)
class Method:
    """A merge method: `ties` with fixed options, and parameters that fill in the others.

    takes_base: the base model is subtracted (task vectors). Otherwise a base model among the models
        is an input like the others.
    max_models: at most so many inputs; None for any number.
    divides_by_weights: with normalize, weights that sum to zero have no meaning (an average of
        models).
    copies: the tensors are copied bit for bit where no parameter changes them.
    statistics: the kinds of statistics that it merges by, one file per model (docs/spec/mats.md);
        such a method needs a base only for some initialisations. Empty for the methods of `ties`.
    extra: further parameters that a recipe may set, which mergekit's methods lack.
    """

    name: str
    title: str
    url: str
    fixed: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    takes_base: bool = True
    max_models: int | None = None
    divides_by_weights: bool = False
    copies: bool = False
    statistics: tuple[str, ...] = ()
    extra: tuple[Parameter, ...] = ()
    _by_name: dict[str, Parameter] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self._by_name.update((each.name, each) for each in (*self.parameters, *self.extra))

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name; None where the method has none."""
        return self._by_name.get(name)

    def options(
        self, shared: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The keyword arguments of `ties`, from the values of shared parameters and those of each
        model. A flavor other than mergekit's brings its own merge rule, which replaces `normalize`.
        """
        options = dict(self.fixed)
        for parameter in self.parameters:
            if not parameter.option:
                continue
            if parameter.scope == "shared":
                value = shared[parameter.name]
                options[parameter.option] = (
                    FLAGS[parameter.name][value] if parameter.kind == "flag" else value
                )
            else:
                values = [model[parameter.name] for model in per_model]
                options[parameter.option] = [1.0 if value is None else value for value in values]
        flavor = shared.get("flavor", "mergekit")
        if self.extra and flavor != "mergekit":
            options.pop("merge", None)
            options["flavor"] = flavor
        return options


# The values of options of `ties` that a recipe's flags stand for.
FLAGS: dict[str, dict[bool, str]] = {
    "normalize": {True: "weighted_mean", False: "sum"},
    "rescale": {True: "l1", False: "none"},
}


def _weight(scope: str) -> Parameter:
    return Parameter("weight", "number", scope, "weights", REQUIRED)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "flag", "shared", "merge", default)


def _task_vectors(
    name: str,
    title: str,
    url: str,
    *,
    trim: str,
    elect: str,
    normalize: bool = False,
    rescale: bool = False,
) -> Method:
    """A method on task vectors: trim, elect, merge, scale (docs/spec/ties.md)."""
    trims = trim != "none"
    parameters = [
        _weight("non_base"),
        Parameter("density", "number", "non_base", "density" if trims else "", 1.0, 0, 1),
        _normalize(normalize),
        Parameter("rescale", "flag", "shared", "rescale" if trims else "", rescale),
        Parameter("lambda", "number", "shared", "scaling", 1.0),
        Parameter(
            "int8_mask", "flag", "shared", "", False
        ),  # mergekit's storage of masks; here no mask is stored
    ]
    extra: tuple[Parameter, ...] = ()
    if name == "ties":
        extra = (Parameter("flavor", "choice", "shared", "flavor", "mergekit", choices=_FLAVORS),)
    if trim == "outliers":
        parameters.append(Parameter("gamma", "number", "non_base", "gamma", 0.01, 0, 1))
    fixed = {"trim": trim, "elect": elect} if trims else _PLAIN
    return Method(name, title, url, fixed, tuple(parameters), extra=extra)


_FLAVORS = get_args(Flavor)
_PLAIN = {"trim": "none", "elect": "none", "density": 1.0}
_DARE = "https://arxiv.org/abs/2311.03099"
_BREADCRUMBS = "https://arxiv.org/abs/2312.06795"

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
_TASK_WEIGHTS = Parameter("task_weights", "choice", "shared", "", "raw", choices=_rule.TASK_WEIGHTS)
_SOLVER = (
    Parameter("flavor", "choice", "shared", "flavor", "default", choices=_rule.FLAVORS),
    Parameter("solver", "choice", "shared", "solver", "cg", choices=_rule.SOLVERS),
    Parameter("iterations", "integer", "shared", "iterations", None, 0),
    Parameter("damping", "number", "shared", "damping", 0.01, 0),
    Parameter("step_limit", "number", "shared", "step_limit", None, 0),
    Parameter("objective_tolerance", "number", "shared", "objective_tolerance", None, 0),
    Parameter("precision", "choice", "shared", "precision", None, choices=_rule.PRECISIONS),
    Parameter("output_grams", "flag", "shared", "", None),
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            "Linear",
            "https://arxiv.org/abs/2203.05482",
            _PLAIN,
            (_weight("input"), _normalize(True)),
            takes_base=False,
            divides_by_weights=True,
        ),
        _task_vectors(
            "task_arithmetic",
            "Task Arithmetic",
            "https://arxiv.org/abs/2212.04089",
            trim="none",
            elect="none",
        ),
        _task_vectors(
            "ties",
            "TIES",
            "https://arxiv.org/abs/2306.01708",
            trim="magnitude",
            elect="sum",
            normalize=True,
        ),
        _task_vectors(
            "dare_linear", "Linear DARE", _DARE, trim="random", elect="none", rescale=True
        ),
        _task_vectors("dare_ties", "DARE TIES", _DARE, trim="random", elect="sum", rescale=True),
        _task_vectors(
            "breadcrumbs", "Model Breadcrumbs", _BREADCRUMBS, trim="outliers", elect="none"
        ),
        _task_vectors(
            "breadcrumbs_ties",
            "Model Breadcrumbs with TIES",
            _BREADCRUMBS,
            trim="outliers",
            elect="sum",
        ),
        Method(
            "passthrough",
            "Passthrough",
            "",
            {**_PLAIN, "merge": "sum"},
            (Parameter("scale", "number", "input", "weights", None),),
            takes_base=False,
            max_models=1,
            copies=True,
        ),
        Method(
            "mats",
            "MaTS",
            "https://arxiv.org/abs/2312.04339",
            {},
            (_COUNTS, _TASK_WEIGHTS, *_SOLVER, _OFF_DIAGONAL, *_START, _UNSOLVED),
            statistics=("input_gram", "block_fisher"),
        ),
        Method(
            "regmean",
            "RegMean",
            "https://arxiv.org/abs/2212.09849",
            {},
            (_COUNTS, _TASK_WEIGHTS, _OFF_DIAGONAL, *_START, _UNSOLVED),
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
            statistics=("diagonal_fisher",),
        ),
    )
}

# mergekit's methods that are missing here.
NOT_THERE_YET = (
    "arcee_fusion",
    "della",
    "della_linear",
    "karcher",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
)

# Parameters that some method of mergekit has. Like mergekit, ignore them where the recipe's method
# lacks them.
KNOWN_PARAMETERS = frozenset(
    {p.name for method in METHODS.values() for p in method.parameters}
    | {
        "epsilon",
        "t",
        "eps",
        "tol",
        "max_iter",
        "select_topk",
        "filter_wise",
        "nuslerp_flatten",
        "nuslerp_row_wise",
    }
)


def find_method(name: Any, key: str = "") -> Method:
    """The method of that name; ConfigError that lists the methods for any other.

    key: the recipe's key that names it; by default messages speak of the argument `method`.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    named = f"{key} {_short(name)}" if key else f"{argument('method')}={_short(name)}"
    if isinstance(name, str) and name.lower() in NOT_THERE_YET:
        raise ConfigError(f"{named} is not there yet; there are {', '.join(METHODS)}")
    hint = nearest(name, METHODS)
    raise ConfigError(f"{named} is not one of {', '.join(METHODS)}{hint}")


def nearest(name: Any, names: Iterable[str]) -> str:
    """`; did you mean 'ties'?` for `TIES` or `dare-ties` and the like; "" where no name is
    similar.
    """
    plain = re.sub(r"[\s-]+", "_", str(name).strip().lower())
    near = difflib.get_close_matches(plain, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "t", "y"):
        return True
    if isinstance(value, str) and value.lower() in ("false", "no", "off", "0", "f", "n"):
        return False
    raise TypeError(f"{_short(value)} is {_kind(value)}; pass true or false")


def _kind(value: Any) -> str:
    kinds = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return "empty" if value is None else kinds.get(type(value), type_of(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
