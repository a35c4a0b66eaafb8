"""How a message names an argument: as in Python, as an option of the running command, or as an
argument of the drop-in that was called.

Checks are shared by all entry points and name the arguments of `pymerge.ties`, `pymerge.mats` and
`pymerge.merge_checkpoints`. This module translates these names to those of the entry point that the
user called.
"""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from pymerge.messages.words import shown, type_of

P = ParamSpec("P")
R = TypeVar("R")

_NAME_ALONE = object()
# Of the process, not of a context: readers and writers are threads, and their errors are the
# command's too.
_options: Mapping[str, str] = {}


@dataclass(frozen=True)
class _Entry:
    """The entry point that was called.

    takes: its arguments; None for any. names: argument -> its name here, or one name per model.
        inside: the argument whose mapping holds the others; "" where they are arguments themselves.
    """

    takes: Collection[str] | None = None
    names: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    inside: str = ""


_ANY = _Entry()
# Of a call: other threads may be in other functions.
_entry: ContextVar[_Entry] = ContextVar("pymerge_entry", default=_ANY)


def argument(name: str, value: object = _NAME_ALONE) -> str:
    """`seed=5`, or `--seed 5` where a command line is running that has such an option; without a
    value the name alone.

    A flag is `resume=True` or `--resume`; `resume=False` is `no --resume` there. In an
    `entry_point` the name is its own.
    """
    entry = _entry.get()
    own = entry.names.get(name, name)
    if entry.inside and own == name:
        return (
            f"{entry.inside}[{name!r}]"
            if value is _NAME_ALONE
            else f"{entry.inside}={{{name!r}: {shown(value)}}}"
        )
    if isinstance(own, str) and own != name:
        return own if value is _NAME_ALONE else f"{own}={shown(value)}"
    option = _options.get(name)
    if option is None:
        return name if value is _NAME_ALONE else f"{name}={shown(value)}"
    if value is _NAME_ALONE or value is True:
        return option
    if value is False:
        return f"no {option}"
    if isinstance(value, (tuple, list)):
        value = ",".join(map(str, value))
    return f"{option} {shlex.quote(value if isinstance(value, str) else shown(value))}"


def check_flags(**flags: object) -> None:
    """TypeError for a flag that is neither True nor False: `overwrite="no"` would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{argument(name, value)} is {type_of(value)}; pass True or False")


def checked_options(name: str, value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """An argument that is a mapping of options, or None for none of them; TypeError for others."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{argument(name)} is {type_of(value)}; pass a mapping of options")
    return value


def of_model(name: str, model: int) -> str:
    """One model's part of an argument, as `models[1]`, under the name that an `entry_point` gives
    it.
    """
    own = _entry.get().names.get(name, name)
    return f"{argument(name)}[{model}]" if isinstance(own, str) else own[model]


def without(name: str, usual: object) -> str:
    """How to get an argument's default: `pass device='cpu'`, or `leave out --device`."""
    own = argument(name, usual)
    if own == f"{name}={usual!r}":
        return f"pass {own}"
    return f"leave out {argument(name)}"


def takes(name: str) -> bool:
    """Whether the reader of the message can pass this argument, so that advice to do so makes
    sense.
    """
    entry = _entry.get()
    if entry.takes is None:
        return not _options or name in _options
    return name in entry.takes or entry.inside in entry.takes


def entry_point(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Messages of a function and of all that it calls name its own arguments.

    names: an argument of what is below -> the function's own that becomes it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        entry = _Entry(frozenset(inspect.signature(function).parameters), names)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            if _entry.get().takes is not None:  # by another one, which speaks for both
                return function(*args, **kwargs)
            token = _entry.set(entry)
            try:
                return function(*args, **kwargs)
            finally:
                _entry.reset(token)

        return called

    return decorate


@contextmanager
def renamed(inside: str = "", **names: str | Sequence[str]) -> Iterator[None]:
    """Inside, messages use these names for arguments, and name all others as keys of the argument
    `inside`.
    """
    token = _entry.set(_Entry(_entry.get().takes, names, inside))
    try:
        yield
    finally:
        _entry.reset(token)


@contextmanager
def named_as(options: Mapping[str, str]) -> Iterator[None]:
    """Inside, messages name arguments by the options of a command: {"seed": "--seed", ...}."""
    global _options
    before, _options = _options, options
    try:
        yield
    finally:
        _options = before
