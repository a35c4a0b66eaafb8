"""`pymerge merge`: its options, and what it does with a recipe, or with several in one file."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pymerge.cli.command import PATH, device_or_auto, echo, given_options, tell
from pymerge.cli.mergekit_flags import hub_cache, mergekit_flags, settle
from pymerge.cli.options import WholeNumber
from pymerge.errors import ConfigError, MergeError, OutputError
from pymerge.interrupt import load

if TYPE_CHECKING:
    from pymerge.cli.terminal import Screen
    from pymerge.planning.plan import Plan
    from pymerge.recipe.model import MergeRecipe
    from pymerge.recipe.stages import Stage

F = TypeVar("F", bound=Callable[..., Any])

ON_INTERRUPT = "pymerge.on_interrupt"
_UNWRAPPED = 1000


class Process:
    """Passed to the commands where they may end the process, which is not so when a program calls
    them.
    """


def end(ctx: click.Context) -> None:
    """Prepare to end after an interrupt: a second Ctrl-C would only cut the message off."""
    if isinstance(ctx.obj, Process):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _seed_in_range(ctx: click.Context, parameter: click.Parameter, value: int) -> int:
    if not 0 <= value < 1 << 64:
        raise click.BadParameter(f"{value} is outside [0, 2**64)")
    return value


def seed_option(*others: str) -> Callable[[Any], Any]:
    """`--seed`, under other names too."""
    return click.option(
        "--seed",
        *others,
        type=WholeNumber(),
        default=0,
        metavar="N",
        callback=_seed_in_range,
        show_default=True,
        help="Seed of the random masks of DARE.",
    )


def threads_option(*others: str) -> Callable[[Any], Any]:
    """`--threads`, under other names too."""
    return click.option(
        "--threads",
        *others,
        "-j",
        type=WholeNumber(0),
        default=0,
        metavar="N",
        show_default=True,
        help="Number of CPU threads; 0 takes as many as the process may use.",
    )


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
    rank = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else value
    try:
        check_rank(rank, name="")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return rank


def report_named(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """The callback of what names a report, beside which its figures go."""
    if value is not None and value.suffix == ".json":
        raise click.BadParameter(f"{value} is the name of the figures beside it; pass a .html")
    return value


def _parameters(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    """mergekit's size of an output file, where a number alone counts parameters too."""
    counts = value.isascii() and value.strip().isdecimal()
    value = f"{value} parameters" if counts else value
    return _size(ctx, parameter, value) or value


def merge_options(*, for_mergekit: bool) -> Callable[[F], F]:
    """The arguments and options of `pymerge merge`.

    for_mergekit: with the defaults of `mergekit-yaml`, and its other options in the help.
    """
    overwrite: dict[str, Any] = {"help": "Replace OUT where it holds a model and no more."}
    decorators = [
        click.argument("config", type=PATH),
        click.argument("out", type=PATH),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            metavar="DEVICE",
            callback=device_or_auto,
            help=(
                "Where to compute: cpu, cuda, cuda:N for the GPU of that number, or auto: a GPU"
                " where it is likely to be faster."
            ),
        ),
        click.option(
            "--device-memory",
            metavar="SIZE",
            callback=_size,
            help=(
                "The most GPU memory to take, in bytes or as 500MB or 4GB.  [default: 90 % of what"
                " is free, as far as there is a use for it (see the plan)]"
            ),
        ),
        threads_option("--num-threads"),
        click.option(
            "--out-shard-size",
            default="5B" if for_mergekit else "5GB",
            show_default=True,
            metavar="SIZE",
            callback=_parameters if for_mergekit else _size,
            help=(
                "The most weights in one output file: 5GB or 500MB are bytes, 5B or 500M are"
                " parameters."
            ),
        ),
        click.option("--overwrite/--no-overwrite", default=True, show_default=True, **overwrite)
        if for_mergekit
        else click.option("--overwrite", is_flag=True, **overwrite),
        click.option("--resume", is_flag=True, help="Go on with an interrupted merge into OUT."),
        click.option(
            "--dry-run", is_flag=True, help="Show the plan and every problem, and write nothing."
        ),
        click.option(
            "--allow-non-finite",
            is_flag=True,
            help="Let NaN and infinity through instead of stopping.",
        ),
        seed_option("--random-seed"),
        click.option(
            "--strict",
            is_flag=True,
            help=(
                "Refuse models of which not all have the same tensors, instead of noting what is"
                " done."
            ),
        ),
        click.option(
            "--rank",
            metavar="N|exact",
            callback=_rank,
            help=(
                "Of LoRA adapters of one base, write an adapter instead of a model: of the exact"
                " sum of their updates, or of the best approximation with rank N in each module."
            ),
        ),
        click.option(
            "--full-paths",
            is_flag=True,
            help="Write local paths in full into README.md and the manifest.",
        ),
        click.option(
            "--copy-tokenizer/--no-copy-tokenizer",
            default=True,
            help="Copy the tokenizer's files; one that the recipe names is always written.",
        ),
        click.option(
            "--write-model-card/--no-write-model-card",
            default=True,
            help="Write README.md, with the recipe in it.",
        ),
        click.option(
            "--intermediate-dir",
            "-I",
            type=PATH,
            metavar="FOLDER",
            help="Where the results of recipes with a `name` go, if CONFIG has several.",
        ),
        click.option(
            "--lazy/--no-lazy",
            default=True,
            help="Take results that are in --intermediate-dir already as they are.",
        ),
        click.option(
            "--report",
            type=PATH,
            metavar="FILE",
            callback=report_named,
            help=(
                "Analyse the merge on the way (see `pymerge analyze`): the report goes to FILE, an"
                " HTML file, its figures beside it as JSON."
            ),
        ),
        click.option(
            "--verify",
            is_flag=True,
            help="Load the result with transformers at the end, and run it.",
        ),
        click.option("--quiet/--no-quiet", "-q", help="Print nothing but errors."),
        mergekit_flags(hidden=not for_mergekit),
    ]

    def add(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


def run_merge(
    ctx: click.Context,
    config: Path,
    out: Path,
    *,
    dry_run: bool,
    verify: bool,
    quiet: bool,
    intermediate_dir: Path | None,
    lazy: bool,
    transformers_cache: str | None,
    report: Path | None,
    **options: Any,
) -> None:
    """Merge a recipe, or all that are in its file, and show what was done."""
    for module in ("pymerge.recipe.stages", "pymerge.engine.merge"):
        load(module)
    if report is not None and (intermediate_dir is not None or options["rank"] is not None):
        other = "--intermediate-dir" if intermediate_dir is not None else "--rank"
        raise click.UsageError(
            f"--report is of one merge of whole models, and {other} is given; `pymerge analyze`"
            " makes a report of any recipe"
        )
    note = settle(ctx, options, verify=verify)
    if note and not quiet:
        tell(f"note: {note}")
    with hub_cache(transformers_cache):
        if intermediate_dir is None:
            _check_single(config)
            _merge_one(ctx, config, out, dry_run, quiet, options, report)
        else:
            _merge_stages(ctx, config, out, intermediate_dir, lazy, dry_run, quiet, options)
    if verify and not dry_run:
        show_verified(out, quiet)


def _check_single(config: Path) -> None:
    from pymerge.recipe.stages import count_recipes

    count = count_recipes(config)
    if count > 1:
        raise ConfigError(
            f"{config} holds {count} recipes; pass --intermediate-dir FOLDER, where the results of"
            " those with a `name` go"
        )


def _merge_one(
    ctx: click.Context,
    config: Path | MergeRecipe,
    out: Path,
    dry_run: bool,
    quiet: bool,
    options: Mapping[str, Any],
    report: Path | None = None,
) -> None:
    from pymerge.backends import native
    from pymerge.cli import terminal
    from pymerge.engine import merge as engine

    if dry_run:
        asked = (options["seed"], options["strict"], options["rank"])
        show_plan(engine.plan_unchecked(config, *asked), quiet=quiet)
        engine.merge_checkpoints(config, out, dry_run=True, **options)
        return
    screen = console()
    observer: Any = None
    if report is not None:
        load("pymerge.analysis.folders")
        from pymerge.analysis.analysis import check_report
        from pymerge.analysis.folders import AnalysisObserver
        from pymerge.checkpoint.paths import resolved

        if resolved(out) in (resolved(report), resolved(check_report(report))):
            raise OutputError(f"{out} and a file of the report {report} are one; name another")
        observer = AnalysisObserver()
    before = _identity(out)
    try:
        with native.surviving_lost_pages(), terminal.progress(screen, quiet) as advance:
            summary = engine.merge_checkpoints(
                config, out, progress=advance, observer=observer, **options
            )
    except KeyboardInterrupt as stop:
        end(ctx)
        ctx.meta[ON_INTERRUPT] = str(stop) or _how_to_go_on(ctx, out, before)
        raise
    if not quiet:
        try:
            terminal.show_summary(summary, screen)
        except OutputError as error:
            raise OutputError(f"{summary.out} is complete, but {error}") from error
    if report is not None:
        observer.analysis.write(report)
        if not quiet:
            tell_report(report)


def tell_report(report: Path) -> None:
    """Say where a report and its figures are."""
    tell(f"the report is in {report}, its figures in {report.with_suffix('.json')}")


def _merge_stages(
    ctx: click.Context,
    config: Path,
    out: Path,
    intermediate: Path,
    lazy: bool,
    dry_run: bool,
    quiet: bool,
    options: Mapping[str, Any],
) -> None:
    """Every recipe of a file, those first whose results others use."""
    from pymerge.checkpoint.folder import can_resume
    from pymerge.recipe.stages import read_stages

    def say(text: str) -> None:
        if not quiet:
            tell(text)

    non_finite = "allow" if options["allow_non_finite"] else "error"
    stages = read_stages(config, out, intermediate, seed=options["seed"], non_finite=non_finite)
    for stage in stages:
        for note in stage.notes:
            say(f"note: {note}")
    missing: set[str] = set()  # results that a plan cannot look at
    resumable = {stage.name: bool(options["resume"]) and can_resume(stage.out) for stage in stages}
    taken = {
        stage.name
        for stage in stages
        if stage.name is not None and lazy and stage.is_there and not resumable[stage.name]
    }

    def replaces(stage: Stage) -> bool:
        return bool(options["overwrite"]) or (stage.name is not None and not lazy)

    # What is in the way of the last result is told before the first is merged.
    _check_outputs([(each, replaces(each)) for each in stages if each.name not in taken])
    for stage in stages:
        resumed = resumable[stage.name]
        if stage.name in taken:
            say(f"{stage.name}: taken from {stage.out} as it is; --no-lazy merges it again")
            continue
        if stage.name is not None:
            say(f"{stage.name}:")
        if missing.intersection(stage.uses):
            say("it can be planned once the results that it uses are there")
        else:
            own = {"resume": resumed, "overwrite": replaces(stage)}
            if stage.name is not None and not dry_run:
                stage.out.parent.mkdir(parents=True, exist_ok=True)
            _merge_one(ctx, stage.recipe, stage.out, dry_run, quiet, {**options, **own})
        if dry_run and stage.name is not None and not stage.is_there:
            missing.add(stage.name)


def _check_outputs(stages: Sequence[tuple[Stage, bool]]) -> None:
    """OutputError with all folders that must not be written. The flag: whether one is replaced."""
    from pymerge.checkpoint.files import exists
    from pymerge.checkpoint.folder import OutputFolder

    problems: list[str] = []
    for stage, overwrite in stages:
        inputs = [Path(each) for each in stage.recipe.models if exists(Path(each))]
        try:
            OutputFolder(stage.out, inputs, overwrite=overwrite)
        except OutputError as error:
            problems += error.problems
    if problems:
        raise OutputError(problems)


def show_verified(out: Path, quiet: bool) -> None:
    """Verify a merged model and say what was done; CheckpointError with what is wrong."""
    from pymerge.engine import verify as engine

    found = engine.verify_folder(out)
    for sentence in () if quiet else found.done:
        echo(sentence)
    engine.raise_problems(found, out)


def show_plan(found: Plan, *, each: bool = False, quiet: bool = False) -> None:
    """Show a plan; MergeError with its problems. each: a line for every tensor."""
    from pymerge.cli import terminal

    if not quiet:
        terminal.show_plan(found, console(), each=each)
    if found.problems:
        raise MergeError(found.problems)


def console() -> Screen:
    """Where the commands print."""
    from pymerge.cli.terminal import Screen

    screen = Screen()
    # Without a terminal, lines are not wrapped, so that names can be searched for.
    return screen if screen.is_terminal else Screen(width=_UNWRAPPED)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What identifies the folder with this name; it changes once a merge publishes its result."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _how_to_go_on(ctx: click.Context, out: Path, before: tuple[int, int] | None) -> str:
    """The message after an interrupted merge into `out`."""
    from pymerge.checkpoint.folder import can_resume

    given = [str(ctx.params["config"]), str(ctx.params["out"])]
    # A result that others use goes elsewhere, and the merges go on with its successor.
    if _identity(out) != before and out == ctx.params["out"]:
        return f"interrupted when the merge was done: {out} is complete"
    if not can_resume(out) and ctx.params["intermediate_dir"] is None:
        return "interrupted before a file was finished: nothing was left behind"
    given += ["--resume", *given_options(ctx, "resume")]
    command = shlex.join([*ctx.command_path.split(), *given])
    return f"interrupted: {ctx.params['out']} is not complete. To go on from here: {command}"
