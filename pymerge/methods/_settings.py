"""A parameter's setting in a recipe (a scalar, a gradient over layers, name filters) and its value
for one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pymerge.methods.method import Parameter, kind_of, short


@dataclass(frozen=True)
class Case:
    """Values for the tensors whose name contains `filter` (None and "*": all). Several values are a
    gradient.
    """

    filter: str | None
    values: tuple[float | bool | str, ...]

    def matches(self, tensor: str) -> bool:
        """Whether the case applies to this tensor."""
        return self.filter is None or self.filter == "*" or self.filter in tensor

    def at(self, t: float) -> float | bool | str:
        """The value at t in [0, 1]: numbers are interpolated linearly between neighbours, flags and
        names taken from the left one.
        """
        values, scaled = self.values, t * (len(self.values) - 1)
        left = int(scaled)
        low, high = values[left], values[min(len(values) - 1, left + 1)]
        if isinstance(low, (bool, str)) or isinstance(high, (bool, str)):
            return low
        part = scaled - left
        return (1 - part) * low + part * high


@dataclass(frozen=True)
class Setting:
    """What a recipe says of one parameter at one level; the first case that matches counts."""

    cases: tuple[Case, ...]

    @property
    def varies(self) -> bool:
        """Whether the value depends on the layer."""
        return any(len(case.values) > 1 for case in self.cases)

    @property
    def always(self) -> bool:
        """Whether the setting has a value for every tensor."""
        return any(case.filter in (None, "*") for case in self.cases)

    def value(self, tensor: str, t: float) -> float | bool | str | None:
        """The value for a tensor in the layer at t; None where no case matches."""
        for case in self.cases:
            if case.matches(tensor):
                return case.at(t)
        return None


Settings = Mapping[str, Setting]


def resolve(parameter: Parameter, levels: Iterable[Settings], tensor: str, t: float) -> Any:
    """The value of a parameter for a tensor: of the first level that has one, else the default,
    which may be REQUIRED.
    """
    for settings in levels:
        setting = settings.get(parameter.name)
        if setting is not None:
            value = setting.value(tensor, t)
            if value is not None:
                return value
    return parameter.default


class SettingError(Exception):
    """Problems of a setting, each with its place inside the setting."""

    def __init__(self, problems: list[tuple[tuple[str | int, ...], str]]) -> None:
        super().__init__(problems)
        self.problems = problems


def parse_setting(parameter: Parameter, raw: Any) -> Setting:
    """A setting from plain data: a scalar, a list of scalars (gradient), {value, filter}, or a list
    of those.

    SettingError lists every problem with its place.
    """
    problems: list[tuple[tuple[str | int, ...], str]] = []
    conditional = isinstance(raw, dict) or (
        isinstance(raw, list) and any(isinstance(item, dict) for item in raw)
    )
    if conditional:
        items = raw if isinstance(raw, list) else [raw]
        cases = []
        for i, item in enumerate(items):
            at: tuple[str | int, ...] = (i,) if isinstance(raw, list) else ()
            if isinstance(item, dict):
                cases.append(_conditional(parameter, item, at, problems))
            else:
                problems.append(
                    (at, f"{short(item)} stands among filters; write it as {{value: ...}}")
                )
    else:
        cases = [Case(None, _values(parameter, raw, (), problems))]
    if problems:
        raise SettingError(problems)
    return Setting(tuple(case for case in cases if case.values))


def _conditional(
    parameter: Parameter,
    item: dict[str, Any],
    at: tuple[str | int, ...],
    problems: list[tuple[tuple[str | int, ...], str]],
) -> Case:
    for key in item:
        if key not in ("value", "filter"):
            problems.append(
                (
                    (*at, key),
                    f"unknown key {short(key)}; a filtered value has 'value' and 'filter'",
                )
            )
    pattern = item.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        problems.append(
            (
                (*at, "filter"),
                f"{short(pattern)} is {kind_of(pattern)}; pass a part of a tensor name",
            )
        )
    if "value" not in item:
        problems.append((at, "a filtered value needs 'value'"))
        return Case(None, ())
    return Case(pattern, _values(parameter, item["value"], (*at, "value"), problems))


def _values(
    parameter: Parameter,
    raw: Any,
    at: tuple[str | int, ...],
    problems: list[tuple[tuple[str | int, ...], str]],
) -> tuple[float | bool | str, ...]:
    values = []
    if isinstance(raw, list) and not raw:
        problems.append((at, "an empty list has no value; pass a number or at least one"))
    for i, item in enumerate(raw if isinstance(raw, list) else [raw]):
        try:
            values.append(parameter.convert(item))
        except (TypeError, ValueError) as error:
            problems.append(((*at, i) if isinstance(raw, list) else at, str(error)))
    return tuple(values)
