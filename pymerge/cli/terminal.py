"""What the command line prints: plans, progress, reports. Tables and a progress bar on a terminal,
plain lines elsewhere.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from rich import box
from rich.console import Console
from rich.table import Table

from pymerge.cli.command import output_written
from pymerge.messages.words import counted, printable
from pymerge.methods._table import METHODS
from pymerge.methods.method import FLAGS
from pymerge.rules.ties import TiesOptions

if TYPE_CHECKING:
    from pymerge.engine.summary import MergeSummary
    from pymerge.planning.plan import Plan, PlannedTensor, Solve
    from pymerge.rules.options import OpOptions

MOST_GROUPS = 12
_PAGE = 80  # columns of a table where there is no terminal
PLAIN_EVERY = 10.0  # seconds between progress lines where there is no terminal


class Screen(Console):
    """A console that raises when the reader of the output is gone, and obeys NO_COLOR for bold
    letters too.
    """

    def __init__(self, **options: Any) -> None:
        if os.environ.get("NO_COLOR"):
            options["color_system"] = None
        super().__init__(**options)

    def print_table(self, table: Table, *, whole: bool = False) -> None:
        """Print a table, 80 columns wide where there is no terminal. whole: as wide as needed, so
        that names can be searched for.
        """
        self.print(table, width=None if whole or self.is_terminal else _PAGE)

    def print(self, *objects: Any, **options: Any) -> None:
        """OutputError where it cannot be written."""
        with output_written():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output")


# Bytes done, bytes in all, tensor: called by the engine as it goes.
Advance = Callable[[int, int, str], None]


def amount(count: float) -> str:
    """A number of bytes for people: "512 B", "4.1 kB", "988 MB", "16.1 GB"."""
    units = ("B", "kB", "MB", "GB", "TB")
    step = 0
    while count >= 999.5 and step < len(units) - 1:
        count /= 1000
        step += 1
    return (
        f"{count:.0f} {units[step]}"
        if step == 0 or count >= 99.95
        else f"{count:.1f} {units[step]}"
    )


def duration(seconds: float) -> str:
    """A time for people: "0.08 s", "4.7 s", "47 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return (
        f"{minutes} min {whole % 60:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def settings(options: OpOptions | None, method: str = "") -> str:
    """A tensor's parameters as in a recipe of `method`, without those that change nothing."""
    if not isinstance(options, TiesOptions):
        return "" if options is None else options.words()
    of_recipe = METHODS.get(method)
    known = {p.option: p for p in of_recipe.parameters} if of_recipe is not None else {}
    words = []
    if options.trim != "none":
        words.append(f"density {_values(options.densities)}")
    if options.trim == "outliers":
        words.append(f"gamma {_values(options.gammas)}")
    weights = known["weights"].name if "weights" in known else "weight"
    words.append(f"{weights} {_values(options.weights)}")
    if options.scaling != 1:
        words.append(f"lambda {options.scaling:g}")
    for name, said in FLAGS.items():
        flag = of_recipe.parameter(name) if of_recipe is not None else None
        usual = said[bool(flag.default)] if flag is not None and flag.option else None
        given = getattr(options, flag.option) if flag is not None and flag.option else None
        if given != usual and given in said.values():
            words.append(f"{name} {'true' if given == said[True] else 'false'}")
    return ", ".join(words)


# Settings of an iterative solver, without effect on a direct one.
_OF_ITERATIONS = (
    "iterations",
    "preconditioner",
    "damping",
    "step_limit",
    "objective_tolerance",
    "residual_tolerance",
    "precision",
)


def solve_settings(solve: Solve | None) -> str:
    """As `settings`, for a tensor that is merged by statistics."""
    if solve is None:
        return ""
    usual = {"flavor": "default", "solver": "cg", "off_diagonal": 1, "minimum": 0}
    given = dict(solve.options.options)
    iterates = solve.options.method == "mats" and not solve.options.exact
    words = [
        f"{'weight' if isinstance(value, tuple) else name} {_value(value)}"
        for name, value in given.items()
        if usual.get(name) != value and (iterates or name not in _OF_ITERATIONS)
    ]
    if iterates and "iterations" not in given:
        words.insert(0, f"iterations {100 if given['flavor'] == 'paper' else 5}")
    init = "a model's weights" if solve.options.init == "given" else solve.options.init
    words.append(f"init {init}")
    named = {"scaling": "lambda", "task_weights": "weight"}
    words += [
        f"{named.get(name, name)} {_value(value)}" for name, value in solve.options.init_options
    ]
    kinds = dict.fromkeys(each.key.partition("/")[0] for _, each in solve.sums)
    words.append(f"by {' and '.join(kinds)}")
    return ", ".join(words)


def _value(value: object) -> str:
    return _values(value) if isinstance(value, tuple) else str(value)


def _values(values: Sequence[float]) -> str:
    texts = [f"{value:g}" for value in values]
    if len(set(texts)) == 1:
        return texts[0]
    return "/".join(texts if len(texts) <= 6 else [*texts[:5], "..."])


def plan_table(tensors: Sequence[PlannedTensor], *, each: bool = False) -> Table:
    """Planned tensors: one line per group with equal settings (with `each`, per tensor), and
    totals.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_footer=True)
    table.add_column(
        "tensor" if each else "tensors", "" if each else f"{len(tensors):,}", overflow="fold"
    )
    table.add_column("method")
    table.add_column("settings", overflow="fold")
    table.add_column("dtype")
    table.add_column("parameters", f"{sum(t.elements for t in tensors):,}", justify="right")
    table.add_column("output", amount(sum(t.nbytes for t in tensors)), justify="right")
    if not each:
        table.columns[0].justify = "right"
    groups: dict[object, list[PlannedTensor]] = {}
    for tensor in tensors:
        key = tensor.name if each else (tensor.method, _words(tensor), tensor.dtype)
        groups.setdefault(key, []).append(tensor)
    rows = list(groups.values())
    cut = len(rows) if each or len(rows) <= MOST_GROUPS else MOST_GROUPS - 1
    for group in rows[:cut]:
        first = group[0]
        label = f"{first.name} {list(first.shape)}" if each else f"{len(group):,}"
        _add(table, label, first.method, _words(first), first.dtype, group)
    if rows[cut:]:
        rest = [tensor for group in rows[cut:] for tensor in group]
        _add(table, f"{len(rest):,}", "", counted(len(rows) - cut, "more combination"), "", rest)
    return table


def _words(tensor: PlannedTensor) -> str:
    return settings(tensor.options, tensor.method) or solve_settings(tensor.solve)


def _add(
    table: Table, label: str, method: str, words: str, dtype: str, tensors: Sequence[PlannedTensor]
) -> None:
    parameters, size = sum(t.elements for t in tensors), sum(t.nbytes for t in tensors)
    table.add_row(label, method, words, dtype, f"{parameters:,}", amount(size))


def show_plan(plan: Plan, console: Screen, *, each: bool = False) -> None:
    """Print the models, the table of tensors, bytes and notes. With problems, which the caller
    reports, there is no table.
    """
    for line in _models(plan):
        _say(console, line)
    if plan.tensors:
        console.print_table(plan_table(plan.tensors, each=each), whole=each)
        _say(
            console,
            f"reads {amount(plan.bytes_read)}, writes {amount(plan.bytes_written)}; takes less than"
            f" {amount(512e6 + plan.memory)} of memory, beside what the system caches of the"
            f" files; on a GPU, up to {amount(plan.gpu_memory)} of its own",
        )
    for note in plan.notes:
        _say(console, f"note: {note}")


def _models(plan: Plan) -> Iterator[str]:
    """One line per model: the base, then the others, numbered as in `weight 1/0.5`."""
    if plan.method:
        yield f"merge_method: {plan.method}"
    numbers = {model: number for number, model in enumerate(plan.inputs, 1)}
    if plan.base is not None and plan.base not in numbers:
        yield f"base_model: {plan.models[plan.base]}"
    for model in sorted(range(len(plan.models)), key=lambda m: numbers.get(m, 0)):
        if model in numbers:
            also = " (base_model)" if model == plan.base else ""
            yield f"model {numbers[model]}: {plan.models[model]}{also}"
        elif model != plan.base:
            yield f"model: {plan.models[model]}"


def summary_table(summary: MergeSummary) -> Table:
    """The counts of each method."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method")
    every = summary.methods.values()
    headings = ["tensors", "parameters", "kept"]
    conflicts = any(each.considered for each in every)
    non_finite = any(each.non_finite or each.non_finite_out for each in every)
    headings += ["sign conflicts"] if conflicts else []
    headings += ["not finite in", "out"] if non_finite else []
    for heading in headings:
        table.add_column(heading, justify="right")
    for method, made in summary.methods.items():
        known = made.considered > 0
        kept = f"{100 * made.kept_fraction:.1f} %" if known else "copied"
        row = [f"{made.tensors:,}", f"{made.elements:,}", "solved" if made.solved else kept]
        if conflicts:
            row.append(f"{100 * made.conflict_fraction:.1f} %" if known else "")
        if non_finite:
            row.append(f"{made.non_finite:,}" if known or made.solved else "")
            row.append(f"{made.non_finite_out:,}")
        table.add_row(method, *row)
    return table


def show_summary(summary: MergeSummary, console: Screen) -> None:
    """Print notes, counts, speed and, last, where the result is."""
    for note in summary.notes:
        _say(console, f"note: {note}")
    console.print_table(summary_table(summary))
    if summary.resumed:
        _say(
            console,
            f"{summary.resumed} of {counted(len(summary.files), 'file')} "
            f"{'was' if summary.resumed == 1 else 'were'} taken over from the interrupted merge",
        )
    _say(
        console,
        f"read {amount(summary.bytes_read)}, wrote {amount(summary.bytes_written)} "
        f"in {duration(summary.seconds)} ({amount(1e9 * summary.gb_per_s)}/s)",
    )
    parameters, files = (
        counted(summary.parameters, "parameter"),
        counted(len(summary.files), "file"),
    )
    _say(console, f"the merged model is in {summary.out} ({parameters}, {files})")


def _say(console: Console, text: str) -> None:
    # File names that are not valid text, or have letters that the terminal lacks, are escaped.
    text = printable(text).encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(console: Console, quiet: bool = False) -> Iterator[Advance | None]:
    """A bar with bytes per second and time left on a terminal, an occasional line elsewhere,
    nothing if quiet. A full disk or a closed terminal is no reason to end the merge.
    """
    if quiet:
        yield None
        return
    file = console.file
    console.file = cast("IO[str]", _Unneeded(file))
    try:
        if console.is_terminal:
            with _bar(console) as advance:
                yield advance
        else:
            yield _lines(console)
    finally:
        console.file = file


class _Unneeded:
    """A text file; what it does not take is lost."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with _lost():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with _lost():
            self._file.flush()


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader is gone on purpose
        raise
    except OSError:
        pass


@contextmanager
def _bar(console: Console) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("merging", total=None)

        def advance(done: int, total: int, tensor: str) -> None:
            shown.update(task, completed=done, total=total)

        yield advance


def _lines(console: Console) -> Advance:
    started = last = time.monotonic()

    def advance(done: int, total: int, tensor: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY or not done:
            return
        last = now
        rate = done / (now - started)
        line = f"{amount(done)} of {amount(total)}, {amount(rate)}/s"
        # The first hundredth does not predict the rest: a merge by statistics solves its first
        # layers before it writes.
        left = duration((total - done) / rate) if 100 * done >= total else ""
        _say(console, f"{line}, {left} left" if left else line)

    return advance
