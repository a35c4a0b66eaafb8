"""What a merge method is: its inputs, its parameters, its op, and how the parameters become the
op's options.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pymerge.messages.words import counted, exact, shown, type_of
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import resolve_options


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
    option: the op's option that takes the value, which is also its name in Python where it is no
        flag; "" where the value has no effect.
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
            raise TypeError(f"{short(value)} is {kind_of(value)}; pass {allowed}")
        if self.kind == "choice" and value not in self.choices:
            hint = nearest(value, self.choices)
            raise ValueError(f"{short(value)} is not one of {', '.join(self.choices)}{hint}")
        return value

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__float__")):
            raise TypeError(f"{short(value)} is {kind_of(value)}; pass a number")
        try:
            number = float(value)  # YAML reads 1e-3 as text
        except (RuntimeError, TypeError, ValueError, OverflowError):
            raise TypeError(f"{short(value)} is not a number") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(f"{short(value)} is not finite; pass a finite number")
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
class Given:
    """What the parameters of a method are for one tensor.

    shared: parameter -> value. per_model: the same for each model, in their order. base: whether
        the op gets a base. seed, non_finite: of the whole merge.
    recipe: whether numbers are to be those of mergekit, as in recipes and in `compat.mergekit`;
        otherwise what others get wrong is mended (docs/methods.md).
    """

    shared: Mapping[str, Any]
    per_model: Sequence[Mapping[str, Any]]
    base: bool = False
    seed: int = 0
    non_finite: str = "error"
    recipe: bool = True


# The values of options of `ties` that a recipe's flags stand for.
FLAGS: dict[str, dict[bool, str]] = {
    "normalize": {True: "weighted_mean", False: "sum"},
    "rescale": {True: "l1", False: "none"},
}


@dataclass(frozen=True)
class Method:
    """A merge method.

    fixed: options of `ties` that are always the same; empty for another op.
    op: the op that merges a tensor (`pymerge.engine.tensor_ops`), or "statistics".
    make: the op's options for the values of the parameters; None for `ties`, whose options the
        parameters name themselves.
    takes_base: the base model is not an input but what task vectors are taken from. Otherwise a
        base model among the models is an input like the others.
    base_optional: such a method merges without a base too, the models themselves.
    base_first: the base is needed, and is the first of the inputs.
    min_models, max_models: the fewest and the most inputs, not counting the base unless it is an
        input; None for any number.
    divides_by_weights: with normalize, weights that sum to zero have no meaning (an average of
        models).
    copies: the tensors are copied bit for bit where no parameter changes them.
    statistics: the kinds of statistics that it merges by, one file per model (docs/spec/mats.md);
        such a method needs a base only for some initialisations. Empty for other methods.
    extra: further parameters that a recipe may set, which mergekit's methods lack.
    """

    name: str
    title: str
    url: str
    fixed: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    op: str = "ties"
    make: Callable[[Given], OpOptions] | None = None
    takes_base: bool = True
    base_optional: bool = False
    base_first: bool = False
    min_models: int = 0
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

    @property
    def needs_base(self) -> bool:
        """Whether there is nothing to merge without a base model."""
        return self.base_first or (
            self.takes_base and not self.base_optional and not self.statistics
        )

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name; None where the method has none."""
        return self._by_name.get(name)

    def resolve(self, given: Given) -> OpOptions:
        """The op's options for one tensor. ValueError for values that do not go together."""
        if self.make is not None:
            return self.make(given)
        options = self.options(given.shared, given.per_model)
        return resolve_options(
            len(given.per_model), seed=given.seed, non_finite=given.non_finite, **options
        )

    def wrong_count(self, inputs: int) -> str:
        """Why the method cannot merge so many inputs, as "takes 2 models, not 3"; "" where it
        can.
        """
        least, most = self.min_models, self.max_models
        if inputs >= least and (most is None or inputs <= most):
            return ""
        if least == most or (most is not None and inputs > most):
            allowed = counted(most or 0, "model")
        else:
            allowed = f"{counted(least, 'model')} or more"
        return f"takes {allowed}, not {inputs}"

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


def nearest(name: Any, names: Iterable[str]) -> str:
    """`; did you mean 'ties'?` for `TIES` or `dare-ties` and the like; "" where no name is
    similar.
    """
    plain = re.sub(r"[\s-]+", "_", (name if isinstance(name, str) else shown(name)).strip().lower())
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
    raise TypeError(f"{short(value)} is {kind_of(value)}; pass true or false")


def kind_of(value: Any) -> str:
    kinds = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return "empty" if value is None else kinds.get(type(value), type_of(value))


def short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 80 else text[:77] + "..."
