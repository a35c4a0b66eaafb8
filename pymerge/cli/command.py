"""What all commands of the command line share."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pymerge.errors import OutputError
from pymerge.messages.arguments import named_as
from pymerge.messages.words import printable

# Of an argument. Whether it can be read is told by who reads it, as of every other file.
PATH = click.Path(path_type=Path, readable=False)

READER_GONE = 141  # the exit status of a program killed by SIGPIPE


@contextlib.contextmanager
def _reader_may_go() -> Iterator[None]:
    """Exit silently once the reader of the output, such as `head`, is gone; errors of other pipes
    are errors.
    """
    try:
        yield
    except BrokenPipeError:
        gone = [descriptor for descriptor in (1, 2) if _has_no_reader(descriptor)]
        if not gone:
            raise
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in gone:  # buffered output goes there when the process ends
            os.dup2(null, descriptor)
        os.close(null)
        raise click.exceptions.Exit(READER_GONE) from None


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


@contextlib.contextmanager
def output_written() -> Iterator[None]:
    """OutputError where the standard output takes nothing, as on a full disk."""
    try:
        yield
    except BrokenPipeError:  # for `_reader_may_go`
        raise
    except OSError as error:
        if error.filename is not None:  # of a file
            raise
        raise OutputError(
            f"the standard output cannot be written ({error.strerror or error}); send it elsewhere"
        ) from error


def echo(text: str) -> None:
    """Print what a command is asked for. OutputError where it cannot be written."""
    with output_written():
        click.echo(text)


def tell(text: str) -> None:
    """A line on the standard error for who watches: no reason to end the work where that takes
    nothing.
    """
    try:
        click.echo(printable(text), err=True)
    except BrokenPipeError:
        raise
    except OSError:
        return


@contextlib.contextmanager
def _help_written() -> Iterator[None]:
    """Around what prints --help and --version while arguments are read."""
    try:
        with _reader_may_go(), output_written():
            yield
    except OutputError as error:
        tell(f"error: {error}")
        raise click.exceptions.Exit(1) from None


class Group(click.Group):
    """A group of commands."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _help_written():
            return super().make_context(*args, **kwargs)


class Command(click.Command):
    """A command whose messages name arguments of the Python API by its options. also: further names
    for these.
    """

    def __init__(self, *args: Any, also: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.also = also or {}

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _help_written():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        options = {each.name or "": _spelled(each) for each in self.params} | self.also
        with _reader_may_go(), named_as(options):
            return super().invoke(ctx)


def device_named(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The callback of `--device`: a name that no device has is wrong usage, one that is not here is
    not.
    """
    from pymerge.engine.gpu.device import AUTO, DEVICES, parse_device
    from pymerge.errors import ConfigError

    try:
        known = value is None or parse_device(value) != AUTO
    except ConfigError:
        known = False
    if not known:
        raise click.BadParameter(f"{value!r} is not one of {DEVICES}")
    return value


def device_or_auto(ctx: click.Context, parameter: click.Parameter, value: str) -> str | None:
    """The same where "auto" leaves it to the command."""
    return value if value == "auto" else device_named(ctx, parameter, value)


def _spelled(parameter: click.Parameter) -> str:
    """`--seed` for an option, `OUT` for an argument."""
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    return next(each for each in parameter.opts if each.startswith("--"))


def given_options(ctx: click.Context, *without: str) -> list[str]:
    """The command line words of the options that were given, but for some, for a suggested further
    command.
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
        elif value is False:
            words += parameter.secondary_opts[:1]
        elif getattr(parameter, "count", False):
            words += [_spelled(parameter)] * value
        elif parameter.multiple:
            words += [word for each in value for word in (_spelled(parameter), str(each))]
        else:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words += [_spelled(parameter), text]
    return words
