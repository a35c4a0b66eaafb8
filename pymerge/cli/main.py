"""The command line: `pymerge merge | plan | verify | stats | bench | doctor`.

Every command imports what it needs when it runs, so that `pymerge --help` answers at once.

Exit status: 0 done; 1 it cannot be done, or not all of it (the message says what and why, and the
    way out); 2 wrong usage; 130 interrupted; 141 nobody reads the output any more.
"""

from __future__ import annotations

import importlib
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pymerge.cli.command import Command, Group, device_or_auto, echo, given_options, tell
from pymerge.errors import MergeError, OutputError, as_resource_errors
from pymerge.version import __version__

if TYPE_CHECKING:
    from pymerge.cli.terminal import Screen
    from pymerge.planning.plan import Plan

_ON_INTERRUPT = "pymerge.on_interrupt"
_UNWRAPPED = 1000
_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


class Process:
    """Passed to the commands where they may end the process, which is not so when a program calls
    them.
    """


def _end(ctx: click.Context) -> None:
    """Prepare to end after an interrupt: a second Ctrl-C would only cut the message off."""
    if isinstance(ctx.obj, Process):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Commands(Group):
    """Turns expected failures into a message and an exit status; a traceback is a bug."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _warnings_as_notes(), as_resource_errors():
                return super().invoke(ctx)
        except MergeError as error:
            tell(f"error: {error}")
            ctx.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            tell(f"error: {where}{error.strerror or error}")
            ctx.exit(1)
        except (ValueError, RuntimeError) as error:
            if not str(error).startswith("PYMERGE_"):  # an environment variable with a bad value
                raise
            tell(f"error: {error}")
            ctx.exit(1)
        except KeyboardInterrupt:
            _end(ctx)
            click.echo(f"\n{ctx.meta.get(_ON_INTERRUPT, 'interrupted')}", err=True)
            ctx.exit(130)


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Show warnings of this package as one line of text, and others as usual."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            tell(f"note: {message}")
        else:
            usual(message, category, *where, **more)

    usual = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pymerge")
def commands() -> None:
    """Merge fine-tuned models at the speed of memory.

    A YAML file in mergekit's format says what to merge:

    \b
      pymerge plan recipe.yml           what it would do, and every problem
      pymerge merge recipe.yml merged   do it
      pymerge verify merged             load the result with transformers

    The exit status is 0 when all is done, 1 when it cannot be done (the message on stderr says
    why), 2 for wrong usage and 130 after an interruption.
    """


def _size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    from pymerge.checkpoint.layout import parse_shard_size, parse_size

    try:
        if value is not None:
            (parse_shard_size if parameter.name == "out_shard_size" else parse_size)(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


def _rank(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    from pymerge.engine.adapter_output import check_rank

    if value is None:
        return None
    rank = int(value) if value.isdecimal() and len(value) < 10 else value
    try:
        check_rank(rank)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return rank


def _seed(ctx: click.Context, parameter: click.Parameter, value: int) -> int:
    if not 0 <= value < 1 << 64:
        raise click.BadParameter(f"{value} is outside [0, 2**64)")
    return value


@commands.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    callback=device_or_auto,
    help=(
        "Where to compute: cpu, cuda, cuda:N for the GPU of that number, or auto: a GPU where it is"
        " likely to be faster."
    ),
)
@click.option(
    "--device-memory",
    metavar="SIZE",
    callback=_size,
    help=(
        "The most GPU memory to take, in bytes or as 500MB or 4GB.  [default: 90 % of what is free,"
        " as far as there is a use for it (see the plan)]"
    ),
)
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    show_default=True,
    help="Number of CPU threads; 0 takes as many as the process may use.",
)
@click.option(
    "--out-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    callback=_size,
    help="The most weights in one output file: 5GB or 500MB are bytes, 5B or 500M are parameters.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT where it holds a model and no more.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted merge into OUT.")
@click.option("--dry-run", is_flag=True, help="Show the plan and every problem, and write nothing.")
@click.option(
    "--allow-non-finite", is_flag=True, help="Let NaN and infinity through instead of stopping."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    callback=_seed,
    show_default=True,
    help="Seed of the random masks of DARE.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse models of which not all have the same tensors, instead of noting what is done.",
)
@click.option(
    "--rank",
    metavar="N|exact",
    callback=_rank,
    help=(
        "Of LoRA adapters of one base, write an adapter instead of a model: of the exact sum of"
        " their updates, or of the best approximation with rank N in each module."
    ),
)
@click.option(
    "--full-paths", is_flag=True, help="Write local paths in full into README.md and the manifest."
)
@click.option(
    "--verify", is_flag=True, help="Load the result with transformers at the end, and run it."
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.pass_context
def merge(
    ctx: click.Context,
    /,
    config: Path,
    out: Path,
    dry_run: bool,
    verify: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge the models that the recipe CONFIG names into the folder OUT.

    CONFIG is a YAML file in mergekit's format. OUT appears when the merge is complete, not before.
    """
    from pymerge.backends import native
    from pymerge.cli import terminal
    from pymerge.engine import merge as engine

    if dry_run:
        asked = (options["seed"], options["strict"], options["rank"])
        _show(engine.plan_unchecked(config, *asked), quiet=quiet)
        engine.merge_checkpoints(config, out, dry_run=True, **options)
        return
    console = _console()
    before = _identity(out)
    try:
        with native.surviving_lost_pages(), terminal.progress(console, quiet) as advance:
            summary = engine.merge_checkpoints(config, out, progress=advance, **options)
    except KeyboardInterrupt as stop:
        _end(ctx)
        ctx.meta[_ON_INTERRUPT] = str(stop) or _how_to_go_on(ctx, config, out, before)
        raise
    if not quiet:
        try:
            terminal.show_summary(summary, console)
        except OutputError as error:
            raise OutputError(f"{summary.out} is complete, but {error}") from error
    if verify:
        _verify(summary.out, quiet)


def _verify(out: Path, quiet: bool) -> None:
    from pymerge.engine import verify as engine

    found = engine.verify_folder(out)
    for sentence in () if quiet else found.done:
        echo(sentence)
    engine.raise_problems(found, out)


@commands.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def verify_command(out: Path, quiet: bool) -> None:
    """Check that the merged model in the folder OUT is whole, and that transformers runs it.

    Weights and copied files must have the hashes of the manifest. The model is loaded offline, in a
    process of its own: no tensor may be missing, and it generates a few tokens, or computes once
    where it does not generate. No code that the folder brings is run.
    """
    _verify(out, quiet)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What identifies the folder with this name; it changes once a merge publishes its result."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _how_to_go_on(
    ctx: click.Context, config: Path, out: Path, before: tuple[int, int] | None
) -> str:
    from pymerge.checkpoint.folder import can_resume

    if _identity(out) != before:
        return f"interrupted when the merge was done: {out} is complete"
    if not can_resume(out):
        return "interrupted before a file was finished: nothing was left behind"
    given = given_options(ctx, "resume")
    command = shlex.join(["pymerge", "merge", str(config), str(out), "--resume", *given])
    return f"interrupted: {out} is not complete. To go on from here: {command}"


@commands.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="Show a line for every tensor.")
@click.option(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    callback=_seed,
    show_default=True,
    help="Seed of the random masks of DARE.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse models of which not all have the same tensors, instead of noting what is done.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but problems.")
def plan(config: Path, tensors: bool, seed: int, strict: bool, quiet: bool) -> None:
    """Show what merging by the recipe CONFIG would do, and every problem.

    It reads no more than the headers of the models' files, and writes nothing.
    """
    from pymerge.engine import merge as engine

    found = engine.plan_checkpoints(config, seed=seed, strict=strict)
    _show(found, each=tensors, quiet=quiet)


def _show(found: Plan, *, each: bool = False, quiet: bool = False) -> None:
    from pymerge.cli import terminal

    if not quiet:
        terminal.show_plan(found, _console(), each=each)
    if found.problems:
        raise MergeError(found.problems)


def _console() -> Screen:
    from pymerge.cli.terminal import Screen

    console = Screen()
    # Without a terminal, lines are not wrapped, so that names can be searched for.
    return console if console.is_terminal else Screen(width=_UNWRAPPED)


@commands.command()
def doctor() -> None:
    """Show versions, and what can run here or why not."""
    from pymerge.cli.doctor import collect

    echo(collect().text())


@commands.command(context_settings=_PASSED_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Time the kernels against this machine's copy bandwidth."""
    _pass_on("pymerge.bench", arguments)


@commands.command(context_settings=_PASSED_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def stats(arguments: tuple[str, ...]) -> None:
    """Collect the statistics that some merge methods need."""
    _pass_on("pymerge.cli.stats", arguments)


def _pass_on(module: str, arguments: tuple[str, ...]) -> None:
    function: Callable[[list[str]], Any] = importlib.import_module(module).main
    status = function(list(arguments))
    if isinstance(status, int):
        sys.exit(status)
