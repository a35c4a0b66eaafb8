"""What a sweep found: a table of settings and measures, the best one, files of both."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import new_file
from pymerge.checkpoint.files import MAX_INDEX, read_json
from pymerge.errors import CheckpointError, EvaluationError, OutputError
from pymerge.messages.arguments import argument
from pymerge.messages.words import shown, some_names, type_of
from pymerge.sweeps.grid import Setting, as_text
from pymerge.version import __version__

if TYPE_CHECKING:
    import torch

_FORMAT = 1
SCORE = "score"  # what a single number is called
# Model folders of a sweep: the best one's, and the others' before their numbers.
BEST = "best"
NUMBERED = "setting-"
_REMEDY = "remove it, or name another"


@dataclass
class SweepRow:
    """One setting of a sweep.

    setting: parameter -> value. metrics: measure -> number; empty where nothing was evaluated.
    merged: the state dict, of a sweep of state dicts without an evaluation.
    folder: the model folder of a sweep of folders, None where it was removed.
    """

    setting: Setting
    metrics: dict[str, float] = field(default_factory=dict)
    merged: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    folder: Path | None = None


@dataclass
class SweepResult:
    """The rows of a sweep in the order of its grid, and which one is the best.

    metric: the measure that decides; None where nothing was evaluated. maximize: whether more of it
        is better.
    merged: the best row's state dict, of a sweep of state dicts with an evaluation.
    """

    rows: list[SweepRow]
    metric: str | None = None
    maximize: bool = True
    merged: dict[str, torch.Tensor] | None = field(default=None, repr=False)

    @property
    def best(self) -> SweepRow | None:
        """The first row with the best value of `metric`; None where none has one that is not
        NaN.
        """
        best: SweepRow | None = None
        for row in self.rows:
            if is_better(row, best, self.metric, self.maximize):
                best = row
        return best

    def table(self) -> list[dict[str, Any]]:
        """A mapping for each row: its parameters, then its measures."""
        return [{**row.setting, **row.metrics} for row in self.rows]

    def write_csv(self, path: str | Path) -> None:
        """The table as CSV. OutputError where the file cannot be written."""
        rows = self.table()
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [*dict.fromkeys(name for row in rows for name in row)])
        writer.writeheader()
        for row in rows:
            lists = {k: json.dumps(v) for k, v in row.items() if isinstance(v, list)}
            writer.writerow({**row, **lists})
        new_file.write(Path(path), text.getvalue().encode())

    def write_json(self, path: str | Path) -> None:
        """The rows, the measure that decides and the best setting, as JSON. OutputError where the
        file cannot be written.
        """
        _write(Path(path), self, "")

    def plot(self, path: str | Path) -> None:
        """Chart `metric` over the first parameter with several numbers, a line for each combination
        of the others, in the format that the file's name says (.svg, .png, .pdf).

        Needs matplotlib (ImportError). ValueError where nothing was evaluated.
        """
        if self.metric is None:
            raise ValueError("nothing was evaluated, so there is nothing to plot; pass evaluate")
        import matplotlib
        from matplotlib.figure import Figure

        axis, lines = lines_of(self)
        numeric = all(_is_number(x) for points in lines.values() for x, _ in points)
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        plot = figure.add_subplot()
        for label, points in lines.items():
            places = [x if numeric else str(x) for x, _ in points]
            plot.plot(places, [y for _, y in points], marker="o", label=label)
        plot.set_xlabel(axis)
        plot.set_ylabel(self.metric)
        plot.grid(alpha=0.3)
        if len(lines) > 1:
            plot.legend(fontsize="small")
        buffer = io.BytesIO()
        kind = Path(path).suffix.removeprefix(".") or "svg"
        with matplotlib.rc_context({"svg.hashsalt": "pymerge"}):
            figure.savefig(buffer, format=kind)
        new_file.write(Path(path), buffer.getvalue())


def lines_of(result: SweepResult) -> tuple[str, dict[str, list[tuple[Any, float]]]]:
    """(the parameter along the axis, points of each line by its label)."""
    names = [*dict.fromkeys(name for row in result.rows for name in row.setting)]
    kinds = {name: {_key(row.setting.get(name)) for row in result.rows} for name in names}
    numeric = [n for n in names if all(_is_number(row.setting.get(n)) for row in result.rows)]
    several = [name for name in numeric if len(kinds[name]) > 1]
    axis = (several or [n for n in names if len(kinds[n]) > 1] or [*names, "setting"])[0]
    lines: dict[str, list[tuple[Any, float]]] = {}
    for row in result.rows:
        others = {k: v for k, v in row.setting.items() if k != axis and len(kinds[k]) > 1}
        value = row.metrics.get(result.metric or "")
        if value is not None:
            at = row.setting.get(axis)
            lines.setdefault(as_text(others), []).append((at, value))
    if axis in numeric:
        for points in lines.values():
            points.sort(key=lambda point: point[0])
    return axis, lines


def is_better(row: SweepRow, best: SweepRow | None, metric: str | None, maximize: bool) -> bool:
    """Whether a row is better than the best so far. NaN is not better than anything."""
    value = row.metrics.get(metric or "")
    if value is None or math.isnan(value):
        return False
    if best is None:
        return True
    other = best.metrics[metric or ""]
    return value > other if maximize else value < other


def measures(found: Any, setting: Setting) -> dict[str, float]:
    """What an evaluation returned, as measure -> number. EvaluationError for anything else."""
    given = found if isinstance(found, Mapping) else {SCORE: found}
    made: dict[str, float] = {}
    for name, value in given.items():
        measure = _measure(name, setting)
        try:
            if isinstance(value, (bool, str, bytes)):
                raise TypeError
            made[measure] = float(value)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            large = isinstance(error, OverflowError)
            raise EvaluationError(
                f"the evaluation of {as_text(setting)!r} gave {shown(value)}"
                f"{f' as {name!r}' if isinstance(found, Mapping) else ''}, which is"
                f" {'beyond all floats' if large else type_of(value)}; return a number, or a"
                " mapping of names to numbers"
            ) from None
    if not made:
        raise EvaluationError(f"the evaluation of {as_text(setting)!r} gave no number; return one")
    return made


def _measure(name: object, setting: Setting) -> str:
    """The name of a measure, which is a column beside the parameters."""
    text = str(name)
    try:
        text.encode()
    except UnicodeEncodeError:
        why = "which no file can hold (half a surrogate pair)"
    else:
        if text not in setting:
            return text
        why = "which is a parameter of the setting"
    raise EvaluationError(
        f"the evaluation of {as_text(setting)!r} gave a measure {shown(text)}, {why}; call it"
        " something else"
    )


def deciding(metric: str | None, row: SweepRow) -> str:
    """The measure that decides: the one asked for, else the first. EvaluationError where the row
    lacks it.
    """
    chosen = next(iter(row.metrics), SCORE) if metric is None else metric
    if chosen not in row.metrics:
        raise EvaluationError(
            f"the evaluation of {as_text(row.setting)!r} gave {some_names(row.metrics)} and no"
            f" {chosen!r}, by which settings are compared ({argument('metric')})"
        )
    return chosen


# The file of an unfinished sweep.


def write_progress(path: Path, result: SweepResult, identity: str) -> None:
    """The rows so far, for `read_progress`."""
    _write(path, result, identity)


def read_progress(path: Path, identity: str) -> list[SweepRow]:
    """The evaluated rows that an earlier run left; none without the file. OutputError where it is
    damaged or of another sweep.
    """
    if not path.exists():
        return []
    try:
        content = read_json(path, MAX_INDEX, remedy=_REMEDY)
    except CheckpointError as error:
        raise OutputError(str(error)) from None
    try:
        rows = [
            SweepRow(
                dict(row["setting"]),
                {str(name): float(value) for name, value in row["metrics"].items()},
                folder=_folder(path, row.get("folder")),
            )
            for row in content["rows"]
        ]
        other, number = content["identity"], content["format"]
    except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path}: is no file of a sweep ({error}); {_REMEDY}") from None
    if number != _FORMAT or other != identity:
        raise OutputError(
            f"{path}: is of another sweep: its models, their files, the method or its other"
            " parameters differ, or it was made by another release; remove it, or name another"
        )
    return rows


def _folder(path: Path, name: Any) -> Path | None:
    """A row's model folder; ValueError for a name that no sweep gives, since models are deleted."""
    if name is None:
        return None
    if not isinstance(name, str) or not re.fullmatch(rf"{BEST}|{NUMBERED}[0-9]+", name):
        raise ValueError(f"names the folder {shown(name)}")
    return path.parent / name


def _write(path: Path, result: SweepResult, identity: str) -> None:
    best = result.best
    rows = []
    for row in result.rows:
        entry: dict[str, Any] = {"setting": row.setting, "metrics": row.metrics}
        if row.folder is not None:
            entry["folder"] = row.folder.name
        rows.append(entry)
    content = {
        "format": _FORMAT,
        "pymerge": __version__,
        "identity": identity,
        "metric": result.metric,
        "maximize": result.maximize,
        "best": None if best is None else best.setting,
        "rows": rows,
    }
    new_file.write(path, (json.dumps(content, indent=1) + "\n").encode())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _key(value: Any) -> str:
    return json.dumps(value)
