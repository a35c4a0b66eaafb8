"""What the commands of the command line have in common."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from pymerge.messages.arguments import named_as


class Command(click.Command):
    """Its errors name the arguments of the Python API by its own options. also: further names of
    these.
    """

    def __init__(self, *args: Any, also: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.also = also or {}

    def invoke(self, ctx: click.Context) -> Any:
        with named_as({each.name or "": _spelled(each) for each in self.params} | self.also):
            return super().invoke(ctx)


def _spelled(parameter: click.Parameter) -> str:
    """`--seed`, `OUT`."""
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    return next(each for each in parameter.opts if each.startswith("--"))


def given_options(ctx: click.Context, *without: str) -> list[str]:
    """The words of the options that were given, but for some, for a command that goes on with this
    one.
    """
    words: list[str] = []
    for parameter in ctx.command.params:
        name = parameter.name or ""
        given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not given or name in without or isinstance(parameter, click.Argument):
            continue
        value = ctx.params[name]
        if value is True:
            words.append(_spelled(parameter))
        elif parameter.multiple:
            words += [word for each in value for word in (_spelled(parameter), str(each))]
        else:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words += [_spelled(parameter), text]
    return words
