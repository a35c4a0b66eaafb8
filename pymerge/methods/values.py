"""The values of a method's parameters as a caller in Python gives them."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from pymerge.messages.words import counted
from pymerge.methods.method import REQUIRED, Method, Parameter
from pymerge.rules.ties import _check_no_gradient, _plain


def values_of(
    method: Method, parameters: Mapping[str, Any], count: int, others: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(shared, per model) values of a method that has an op of its own, checked.

    parameters: named as in a recipe or by their `option`; None counts as not given, and a weight
        that is not given is 1. others: what is accepted beside them, for the error on a name that
        is not. TypeError and ValueError name the parameter, its value and what is allowed.
    """
    own = [*method.parameters, *method.extra]
    names = {name: each for each in own for name in _names(each)}
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in parameters.items():
        parameter = names.get(name)
        if parameter is None:
            known = [*(_names(each)[-1] for each in own), *others]
            near = difflib.get_close_matches(name, [*names, *others], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise TypeError(f"{method.name} has no parameter {name!r}{hint}")
        if parameter.name in said:
            raise TypeError(f"{name} and {said[parameter.name]} say the same; pass one of the two")
        said[parameter.name] = name
        if value is not None:
            values[parameter.name] = value
    shared: dict[str, Any] = {}
    per_model: list[dict[str, Any]] = [{} for _ in range(count)]
    for parameter in own:
        value = values.get(parameter.name, parameter.default)
        if value is REQUIRED:
            if parameter.name != "weight":
                raise TypeError(f"{method.name} needs parameter {parameter.name!r}")
            value = 1.0
        name = said.get(parameter.name, parameter.name)
        if parameter.scope == "shared":
            given = parameter.name in values
            if given:
                value = converted(parameter, _plain(name, value), name)
            shared[parameter.name] = value
            continue
        for each, one in zip(
            per_model, one_per_model(parameter, value, range(count), name), strict=True
        ):
            each[parameter.name] = one
    return shared, per_model


def _names(parameter: Parameter) -> tuple[str, ...]:
    """The names that a parameter has in Python: a recipe's, and its op's where that differs."""
    if parameter.kind == "flag" or parameter.option in ("", parameter.name):
        return (parameter.name,)
    return (parameter.name, parameter.option)


def one_per_model(
    parameter: Parameter, value: Any, keys: Sequence[Hashable], name: str = ""
) -> list[Any]:
    """A value for each model: of one for all, a sequence in their order, or a mapping by key."""
    name = name or parameter.name
    value = _plain(name, value)
    if isinstance(value, Mapping):
        missing = [key for key in keys if key not in value]
        if missing:
            raise ValueError(f"{name} has no value for model {missing[0]!r}")
        values = [value[key] for key in keys]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
        if len(values) != len(keys):
            raise ValueError(
                f"{name} has {counted(len(values), 'value')} for {counted(len(keys), 'model')}"
            )
    else:
        values = [value] * len(keys)
    return [None if item is None else converted(parameter, item, name) for item in values]


def converted(parameter: Parameter, value: Any, name: str = "") -> float | bool | str:
    """The checked value; errors name the parameter."""
    name = name or parameter.name
    _check_no_gradient(name, value)
    try:
        return parameter.convert(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
