"""`pymerge sweep`: its options, and the command that evaluates each merged model."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pymerge.cli.command import PATH, device_or_auto, echo, given_options, tell
from pymerge.cli.merging import ON_INTERRUPT, end, seed_option, threads_option
from pymerge.errors import EvaluationError
from pymerge.interrupt import load
from pymerge.messages.words import shown

if TYPE_CHECKING:
    from pymerge.sweeps.results import SweepResult, SweepRow


def run_sweep(
    ctx: click.Context,
    config: Path,
    out: Path,
    *,
    grid: tuple[str, ...],
    evaluate: str | None,
    quiet: bool,
    minimize: bool,
    **options: Any,
) -> None:
    """Merge with every setting, show and write what was found."""
    for module in ("pymerge.recipe.resolve", "pymerge.sweeps.folders"):
        load(module)
    from pymerge.backends import native
    from pymerge.sweeps.folders import PROGRESS, sweep_checkpoints
    from pymerge.sweeps.grid import as_text, parse_grid

    values = parse_grid(grid)
    words = _words(evaluate)

    def watch(row: SweepRow, count: int, total: int) -> None:
        if not quiet:
            tell(f"{count}/{total}  {as_text(row.setting)}{_measured(row)}")

    try:
        with native.surviving_lost_pages():
            found = sweep_checkpoints(
                config,
                values,
                out,
                evaluate=None if words is None else lambda folder: evaluated(words, folder),
                maximize=not minimize,
                watch=watch,
                **options,
            )
    except KeyboardInterrupt:
        end(ctx)
        if (out / PROGRESS).is_file():
            again = [str(config), str(out), "--resume", *given_options(ctx, "resume")]
            command = shlex.join([*ctx.command_path.split(), *again])
            ctx.meta[ON_INTERRUPT] = f"interrupted. To go on from here: {command}"
        raise
    _write(found, out)
    if quiet:
        return
    if importlib.util.find_spec("matplotlib") is None and found.metric is not None:
        tell(f"note: {out / 'sweep.svg'} was not drawn; pip install matplotlib")
    echo(_table(found))
    best = found.best
    if best is not None:
        echo(f"best: {as_text(best.setting)}{_measured(best)}: {best.folder}")
    elif found.metric is not None:
        tell(f"note: {found.metric} is NaN for every setting, so that none is the best")


def _write(found: SweepResult, out: Path) -> None:
    found.write_csv(out / "sweep.csv")
    drawable = found.metric is not None and importlib.util.find_spec("matplotlib") is not None
    if drawable:
        found.plot(out / "sweep.svg")


def _words(command: str | None) -> list[str] | None:
    if command is None:
        return None
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise click.BadParameter(f"{command!r}: {error}", param_hint="--evaluate") from None
    if not words:
        raise click.BadParameter("it is empty", param_hint="--evaluate")
    return words if any("{}" in word for word in words) else [*words, "{}"]


def evaluated(words: list[str], folder: Path) -> float | dict[str, float]:
    """What the command prints of a model folder, whose path replaces {}: its last line is a number
    or a JSON object of numbers. EvaluationError where it fails or prints anything else.
    """
    command = [word.replace("{}", str(folder)) for word in words]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise EvaluationError(
            f"{command[0]!r} cannot be run ({error.strerror or error}); name a program"
        ) from None
    if done.returncode != 0:
        raise EvaluationError(
            f"{shlex.join(command)} ended with status {done.returncode}; once it is mended,"
            " --resume goes on from here"
        )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    try:
        found = json.loads(last)
    except (ValueError, RecursionError):
        found = None
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    if not is_number and not isinstance(found, dict):
        raise EvaluationError(
            f"the last line that {shlex.join(command)} printed is {shown(last)}; print a number, or"
            ' a JSON object of numbers: {"accuracy": 0.71}'
        )
    result: float | dict[str, float] = found
    return result


def _measured(row: SweepRow) -> str:
    return "".join(f"  {name} {value:.6g}" for name, value in row.metrics.items())


def _table(found: SweepResult) -> str:
    """Columns of parameters, measures and folders."""
    rows = []
    for row in found.rows:
        cells = {name: json.dumps(value).strip('"') for name, value in row.setting.items()}
        cells |= {name: f"{value:.6g}" for name, value in row.metrics.items()}
        if row.folder is not None:
            cells["folder"] = row.folder.name
        rows.append(cells)
    names = [*dict.fromkeys(name for cells in rows for name in cells)]
    lines = [names, *([cells.get(name, "") for name in names] for cells in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def sweep_options(function: Any) -> Any:
    """The arguments and options of `pymerge sweep`."""
    decorators = [
        click.argument("config", type=PATH),
        click.argument("out", type=PATH),
        click.option(
            "--grid",
            multiple=True,
            required=True,
            metavar="NAME=VALUES",
            help=(
                "A parameter of the method, or merge_method, and its values: density=0.1,0.2,0.5,"
                " or a range with its end, lambda=0.5:1.5:0.25. A list is one number per model:"
                " weight=[1,0.5],[0.5,1]. Give it again for further parameters."
            ),
        ),
        click.option(
            "--evaluate",
            metavar="COMMAND",
            help=(
                "Run for each merged model, with the folder in the place of {} or as last argument."
                " The last line that it prints is a number, or a JSON object of numbers."
            ),
        ),
        click.option(
            "--metric", metavar="NAME", help="The number that decides.  [default: the first]"
        ),
        click.option("--minimize", is_flag=True, help="Less of it is better."),
        click.option(
            "--keep-all", is_flag=True, help="Keep every merged model, not the best alone."
        ),
        click.option("--resume", is_flag=True, help="Go on with an interrupted sweep in OUT."),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            metavar="DEVICE",
            callback=device_or_auto,
            help="Where to compute, as of `pymerge merge`.",
        ),
        threads_option(),
        seed_option(),
        click.option(
            "--allow-non-finite",
            is_flag=True,
            help="Let NaN and infinity through instead of stopping.",
        ),
        click.option(
            "--strict",
            is_flag=True,
            help="Refuse models of which not all have the same tensors.",
        ),
        click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function
