"""`pymerge analyze`: its options, and the short table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pymerge.cli.command import PATH
from pymerge.cli.merging import (
    console,
    report_named,
    seed_option,
    tell_report,
    threads_option,
)
from pymerge.interrupt import load
from pymerge.messages.words import counted, printable

if TYPE_CHECKING:
    from pymerge.analysis.analysis import Analysis


def run_analyze(config: Path, out: Path | None, *, quiet: bool, **options: Any) -> None:
    """Analyse a recipe, write the report, show the table."""
    for module in ("pymerge.recipe.resolve", "pymerge.analysis.folders"):
        load(module)
    from pymerge.analysis.folders import analyze_checkpoints
    from pymerge.backends import native
    from pymerge.cli import terminal

    screen = console()
    with native.surviving_lost_pages(), terminal.progress(screen, quiet) as advance:
        found = analyze_checkpoints(config, out, progress=advance, **options)
    if not quiet:
        show_analysis(found)
        if out is not None:
            tell_report(out)


def show_analysis(found: Analysis) -> None:
    """Print a line for each model, and what conflicts."""
    from rich import box
    from rich.table import Table

    from pymerge.analysis.plots import number, percent

    total = found.total.to_dict()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", overflow="fold")
    bad = any(total["non_finite"])
    headings = ["norm", *(["of base"] if found.base is not None else []), "kept", "agreed"]
    headings += ["contribution", "nearest", *(["not finite"] if bad else [])]
    for heading in headings:
        table.add_column(heading, justify="right")
    for k, name in enumerate(found.models):
        others = [
            (value, j + 1)
            for j, value in enumerate(total["cosines"][k])
            if j != k and value is not None
        ]
        near = max(others, default=None)
        cells = [number(total["norms"][k])]
        cells += [percent(total["relative_norms"][k], 2)] if found.base is not None else []
        cells += [percent(total["kept_shares"][k]), percent(total["agreed_shares"][k])]
        cells.append(percent(total["contributions"][k]))
        cells.append("" if near is None else f"{near[1]} ({near[0]:.2f})")
        cells += [f"{total['non_finite'][k]:,}"] if bad else []
        table.add_row(printable(f"{k + 1}: {name}"), *cells)
    screen = console()
    screen.print_table(table)
    of = counted(total["elements"], "parameter")
    screen.print(
        f"signs conflict in {percent(total['conflict_share'])} of {of}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def analyze_options(function: Any) -> Any:
    """The arguments and options of `pymerge analyze`."""
    decorators = [
        click.argument("config", type=PATH),
        click.argument("out", type=PATH, required=False, callback=report_named),
        threads_option(),
        seed_option(),
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
