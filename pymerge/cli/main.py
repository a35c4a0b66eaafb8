"""The command line: `pymerge merge | mergekit-yaml | sweep | analyze | plan | verify | stats |
bench | doctor`.

Every command imports what it needs when it runs, so that `pymerge --help` answers at once.

Exit status: 0 done; 1 it cannot be done, or not all of it (the message says what and why, and the
    way out); 2 wrong usage; 130 interrupted; 141 nobody reads the output any more.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pymerge.cli.analyzing import analyze_options, run_analyze
from pymerge.cli.command import PATH, Command, Group, echo, output_written, tell
from pymerge.cli.merging import (
    ON_INTERRUPT,
    end,
    merge_options,
    run_merge,
    seed_option,
    show_plan,
    show_verified,
)
from pymerge.cli.sweeping import run_sweep, sweep_options
from pymerge.errors import MergeError, as_resource_errors
from pymerge.interrupt import load
from pymerge.version import __version__

_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


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
            end(ctx)
            click.echo(f"\n{ctx.meta.get(ON_INTERRUPT, 'interrupted')}", err=True)
            ctx.exit(130)


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Show warnings of this package as one line of text, and others as usual."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if str(message).startswith("Detected pickle protocol"):
            return  # torch, for its own developers, of a file that it reads
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
    """Merge fine-tuned models at memory bandwidth.

    A YAML file in mergekit's format says what to merge:

    \b
      pymerge plan recipe.yml           what it would do, and every problem
      pymerge merge recipe.yml merged   do it
      pymerge verify merged             load the result with transformers

    The exit status is 0 when all is done, 1 when it cannot be done (the message on stderr says
    why), 2 for wrong usage and 130 after an interruption.
    """


@commands.command()
@merge_options(for_mergekit=False)
@click.pass_context
def merge(ctx: click.Context, /, config: Path, out: Path, **options: Any) -> None:
    """Merge the models that the recipe CONFIG names into the folder OUT.

    CONFIG is a YAML file in mergekit's format. OUT appears when the merge is complete, not before.
    Of several YAML documents in CONFIG, all but the last have a `name`, by which other ones use
    their results. mergekit-yaml's options are taken too.
    """
    run_merge(ctx, config, out, **options)


@commands.command("mergekit-yaml")
@merge_options(for_mergekit=True)
@click.pass_context
def mergekit_yaml(ctx: click.Context, /, config: Path, out: Path, **options: Any) -> None:
    """Merge as `mergekit-yaml CONFIG OUT` would, whose options these are.

    It is `pymerge merge` that replaces a model in OUT and counts parameters for its output files.
    """
    run_merge(ctx, config, out, **options)


@commands.command()
@sweep_options
@click.pass_context
def sweep(ctx: click.Context, /, config: Path, out: Path, **options: Any) -> None:
    """Merge by the recipe CONFIG with every setting of a grid, and keep the best in the folder OUT.

    OUT gets sweep.json and sweep.csv, a row for each setting, with matplotlib sweep.svg, and the
    best model in OUT/best. Without --evaluate nothing is compared, and OUT has every model.

    \b
      pymerge sweep recipe.yml swept --grid density=0.1,0.2,0.5 \\
        --grid lambda=0.5:1.5:0.25 --evaluate "python evaluate.py {}"
    """
    run_sweep(ctx, config, out, **options)


@commands.command()
@analyze_options
def analyze(config: Path, out: Path | None, **options: Any) -> None:
    """Show what merging by the recipe CONFIG would do with its models, without merging them.

    Norms of task vectors, what is kept, sign conflicts, what each model contributes. OUT, an HTML
    file, gets the whole report, by layer, kind of module and tensor; its figures go beside it as
    JSON. `pymerge merge --report` writes the same on the way of a merge.
    """
    run_analyze(config, out, **options)


@commands.command("verify")
@click.argument("out", type=PATH)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def verify_command(out: Path, quiet: bool) -> None:
    """Check that the merged model in the folder OUT is whole, and that transformers runs it.

    Weights and copied files must have the hashes of the manifest. The model is loaded offline, in a
    process of its own: no tensor may be missing, and it generates a few tokens, or computes once
    where it does not generate. No code that the folder brings is run.
    """
    show_verified(out, quiet)


@commands.command()
@click.argument("config", type=PATH)
@click.option("--tensors", is_flag=True, help="Show a line for every tensor.")
@seed_option()
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
    load("pymerge.recipe.resolve")
    from pymerge.engine import merge as engine

    found = engine.plan_checkpoints(config, seed=seed, strict=strict)
    show_plan(found, each=tensors, quiet=quiet)


@commands.command()
def doctor() -> None:
    """Show versions, and what can run here or why not."""
    from pymerge.cli.doctor import collect

    echo(collect().text())


@commands.command(context_settings=_PASSED_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Time the kernels against this machine's copy bandwidth."""
    with output_written():  # other files' errors have names of their own
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
