"""Reports of many `mats` layers as a table or JSON. Imports neither torch nor numpy."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pymerge.messages.words import some_names
from pymerge.rules.report import MatsReport

# Measured with the MiniLM encoder's four fine-tunes: good merges moved 4 to 8 times as far as the
# models are apart, 15 at most. 30 iterations at damping 0.001 on 32 texts per task moved 25 times
# as far (median of the layers) and lost accuracy.
LARGE_STEP = 20.0

# `wudi`: the sum of the task vectors is where it starts; more than this many times its norm is no
# merge any more (docs/spec/matrix.md, X5).
LARGE_GROWTH = 2.0

# Of `wudi`, where it is that of the layers.
_OWN_COLUMNS = ("objective", "of start", "growth")

_COLUMNS = (
    "layer",
    "status",
    "iterations",
    "residual at start",
    "at exit",
    "decrease",
    "step",
    "damping",
    "shares",
)


# Whether who calls the ops says by the reports what they would warn of. Not by a filter of
# warnings, which changes those of all threads.
_told: ContextVar[bool] = ContextVar("told", default=False)


@contextmanager
def told_by_reports() -> Iterator[None]:
    """No warnings of layers that keep their initialisation: the reports are read."""
    token = _told.set(True)
    try:
        yield
    finally:
        _told.reset(token)


def warn_of_layer(message: str, stacklevel: int) -> None:
    """Warn that a layer keeps its initialisation, where no one reads its report."""
    if not _told.get():
        warnings.warn(f"{message} keeps its initialisation", stacklevel=stacklevel + 1)


def as_table(reports: Iterable[MatsReport]) -> str:
    """One line per layer: status, iterations, residual at the start and true residual of the
    result, decrease of the objective, step, damping, trace shares in %. Of `wudi` also the
    objective of the result, its share of that of the start, and the growth.
    """
    held = list(reports)
    own = any(not math.isnan(r.growth) for r in held)
    rows = [(*_COLUMNS, *_OWN_COLUMNS) if own else _COLUMNS]
    for r in held:
        cells = (
            r.name or "-",
            r.status,
            str(r.iterations) if r.solver == "cg" else "-",
            _number(r.residual_start),
            _number(r.residual_exit),
            _number(r.objective_decrease) if r.objective_decrease else "-",
            _number(r.step) if r.step else "-",
            _number(r.damping) if r.damping else "-",
            " ".join(f"{100 * s:.0f}" for s in r.trace_shares) or "-",
        )
        left = r.objective_start - r.objective_decrease
        part = left / r.objective_start if r.objective_start > 0 else math.nan
        more = (_number(left), _number(part), _number(r.growth))
        rows.append((*cells, *more) if own else cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def as_json(reports: Iterable[MatsReport]) -> str:
    """{"summary": status -> count, "layers": [report, ...]}; non-finite numbers become null."""
    held = list(reports)
    summary = dict(sorted(Counter(r.status for r in held).items()))
    return json.dumps({"summary": summary, "layers": [r.as_dict() for r in held]}, indent=1)


def write_reports(path: str | Path, reports: Iterable[MatsReport]) -> None:
    """Write `as_json` to a file that ends in .json, `as_table` to any other."""
    file = Path(path)
    text = as_json(reports) if file.suffix == ".json" else as_table(reports)
    file.write_text(text + "\n", encoding="utf-8")


def warnings_of(reports: Sequence[MatsReport]) -> list[str]:
    """Sentences on layers that fell back, broke down or took large steps."""
    found = []
    broke = "stopped early, where conjugate gradient broke down"
    for status, one, many in (
        (
            "non_finite",
            "has weights or statistics with NaN or infinity and keeps the initialisation",
            "have weights or statistics with NaN or infinity and keep the initialisation",
        ),
        (
            "not_positive",
            "has statistics with negative numbers where sums of squares stand, and keeps the"
            " initialisation there",
            "have statistics with negative numbers where sums of squares stand, and keep the"
            " initialisation there",
        ),
        (
            "initialisation",
            "could not be improved and keeps the initialisation",
            "could not be improved and keep the initialisation",
        ),
        ("breakdown", broke, broke),
    ):
        names = [r.name for r in reports if r.status == status]
        if names:
            found.append(f"{_listed(names)} {one if len(names) == 1 else many}")
    for solver, remedy in (
        ("cg", "raise the damping, lower the iterations or set a step limit"),
        ("exact", "collect more, lower off_diagonal, or take mats with its few iterations"),
    ):
        far = [
            r.name
            for r in reports
            if r.step > LARGE_STEP and r.solver == solver and math.isnan(r.growth)
        ]
        if far:
            found.append(
                f"{_listed(far)} moved more than {LARGE_STEP:g} times as far from the"
                " initialisation as any model is from the average: few examples behind the"
                f" statistics do that, or an initialisation far from the models; {remedy}"
            )
    grown = [r.name for r in reports if r.growth > LARGE_GROWTH]
    if grown:
        most = max(r.growth for r in reports if r.growth > LARGE_GROWTH)
        found.append(
            f"{_listed(grown)} grew to more than {LARGE_GROWTH:g} times the norm of the sum of the"
            f" task vectors ({most:.3g} times at most): lower the iterations, or raise the damping"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    which = f" ({some_names(names)})" if any(names) else ""
    return f"{len(names)} layer{'s' if len(names) > 1 else ''}{which}"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"
