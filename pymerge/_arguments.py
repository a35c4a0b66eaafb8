"""How a message names an argument: as Python does, or as the option of the command line that is running."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_NAME_ALONE = object()
# Of the process, not of a context: readers and writers are threads, and their errors are the command's too.
_options: Mapping[str, str] = {}


def argument(name: str, value: object = _NAME_ALONE) -> str:
    """`seed=5`, or `--seed 5` where a command line is running that has such an option; without a value the name alone.

    A flag is `resume=True` or `--resume`; `resume=False` is `no --resume` there.
    """
    option = _options.get(name)
    if option is None:
        return name if value is _NAME_ALONE else f"{name}={value!r}"
    if value is _NAME_ALONE or value is True:
        return option
    if value is False:
        return f"no {option}"
    if isinstance(value, (tuple, list)):
        value = ",".join(map(str, value))
    return f"{option} {shlex.quote(str(value))}"


@contextmanager
def named_as(options: Mapping[str, str]) -> Iterator[None]:
    """While this runs, messages name these arguments by their options: {"seed": "--seed", ...}."""
    global _options
    before, _options = _options, options
    try:
        yield
    finally:
        _options = before
