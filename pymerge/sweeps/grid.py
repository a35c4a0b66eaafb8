"""The settings of a sweep: which values each parameter takes."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pymerge.errors import ConfigError
from pymerge.messages.arguments import argument
from pymerge.messages.words import counted, shown, type_of

# A setting: parameter -> value, plain data that JSON can hold.
Setting = dict[str, Any]
Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]

MOST_SETTINGS = 10_000
_BEYOND = 10**15  # settings that are not counted any more
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER}):({_NUMBER})", re.ASCII)


def settings_of(grid: object) -> list[Setting]:
    """All combinations of a grid's values, the last parameter changing fastest, or the settings
    that are listed. ConfigError (a ValueError) for none, too many, and settings that repeat,
    TypeError for what is no grid and for values that JSON cannot hold.
    """
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
                values = getattr(values, "tolist", lambda v=values: v)()
            if not isinstance(values, (list, tuple, range)):
                raise TypeError(
                    f"{argument('grid')}[{shown(name)}] is {type_of(values)}; pass a list of the"
                    " values to try"
                )
        count = math.prod(_length(values) for values in grid.values())
        _check_count(count if grid else 0)
        rows = itertools.product(*(_listed(values) for values in grid.values()))
        listed: list[Mapping[str, Any]] = [dict(zip(grid, row, strict=True)) for row in rows]
    elif isinstance(grid, Sequence) and not isinstance(grid, (str, bytes)):
        _check_count(len(grid))
        listed = [*grid]
    else:
        raise TypeError(
            f"{argument('grid')} is {type_of(grid)}; pass a mapping of parameters to lists of"
            " values, or a list of settings"
        )
    found: dict[str, Setting] = {}
    for place, setting in enumerate(listed):
        if not isinstance(setting, Mapping) or not all(isinstance(name, str) for name in setting):
            raise TypeError(
                f"{argument('grid')}[{place}] is {type_of(setting)}; pass a mapping of parameters"
                " to values"
            )
        plain = {name: plain_value(name, value) for name, value in setting.items()}
        if key_of(plain) in found:
            raise ConfigError(
                f"{argument('grid')} has the setting {as_text(plain)!r} twice; list it once"
            )
        found[key_of(plain)] = plain
    return [*found.values()]


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """The grid that a command line names: `density=0.1,0.2`, or `lambda=0.5:1.5:0.25`, a range
    with its end. ConfigError for other texts.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name or not values.strip():
            raise ConfigError(
                f"{argument('grid', text)} is not NAME=VALUES; write density=0.1,0.2 or"
                " lambda=0.5:1.5:0.25"
            )
        if name in grid:
            raise ConfigError(f"{argument('grid', text)}: {name} has values already; list all once")
        grid[name] = _values(text, values.strip())
    _check_count(math.prod(map(len, grid.values())))
    return grid


def key_of(setting: Setting) -> str:
    """Equal for equal settings alone, whatever the order of their parameters."""
    return json.dumps(setting, sort_keys=True)


def as_text(setting: Setting) -> str:
    """`density=0.1 lambda=1.0`, for people."""
    return " ".join(f"{name}={_short(value)}" for name, value in setting.items())


def _values(text: str, values: str) -> list[Any]:
    found = _RANGE.fullmatch(values)
    if found:
        return _range(text, *map(Decimal, found.groups()))
    from pymerge.recipe.yaml import read_yaml

    try:
        listed = read_yaml(f"[{values}]", argument("grid", text)).data
    except ConfigError as error:
        raise ConfigError(
            f"{error}; write values with commas between them, each as in a recipe"
        ) from None
    try:
        return [plain_value(text.partition("=")[0].strip(), value) for value in listed]
    except TypeError as error:
        raise ConfigError(str(error)) from None


def _range(text: str, start: Decimal, stop: Decimal, step: Decimal) -> list[float]:
    """Decimal numbers, so that 0.1:0.3:0.1 ends with the 0.3 that was written."""
    try:
        steps = (stop - start) / step
    except ArithmeticError:  # by 0, or beyond Decimal's exponents
        steps = Decimal(-1)
    if steps < 0:
        raise ConfigError(
            f"{argument('grid', text)}: from {start} in steps of {step} there is no way to {stop}"
        )
    # Neither made nor printed where it has thousands of digits
    count = int(min(steps, Decimal(_BEYOND))) + 1
    _check_count(count)
    return [float(start + place * step) for place in range(count)]


def _check_count(count: int) -> None:
    if count < 1:
        raise ConfigError(f"{argument('grid')} has no setting; pass a parameter and its values")
    if count > MOST_SETTINGS:
        many = counted(count, "setting") if count <= _BEYOND else f"more than {_BEYOND:,} settings"
        raise ConfigError(f"{argument('grid')} has {many}; a sweep has at most {MOST_SETTINGS:,}")


def _length(values: Any) -> int:
    """How many values there are. A range is not made a list before that is known."""
    try:
        return len(values if isinstance(values, range) else _listed(values))
    except OverflowError:  # a range of more than sys.maxsize
        return _BEYOND + 1


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def plain_value(name: str, value: Any) -> Any:
    """A value as JSON holds it: numbers of NumPy and torch as Python's, tuples as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_value(name, each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{argument('grid')}: {name}={shown(value)} is {type_of(value)}; pass numbers, text or"
        " lists of them"
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_short, value)) + "]"
    return str(value)
