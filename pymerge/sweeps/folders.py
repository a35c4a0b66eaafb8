"""`pymerge.sweep_checkpoints`: a merge of model folders for each of many settings of a recipe."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pymerge.engine.manifest import inputs_of
from pymerge.engine.merge import close_inputs, merge_checkpoints, open_inputs, plan_unchecked
from pymerge.errors import ConfigError, MergeError, OutputError, as_resource_errors
from pymerge.interrupt import Uninterrupted
from pymerge.messages.arguments import argument, check_flags
from pymerge.messages.words import counted, type_of
from pymerge.recipe.model import MergeRecipe
from pymerge.recipe.resolve import recipe_of
from pymerge.recipe.schema import read_text
from pymerge.recipe.yaml import Document, as_yaml, read_yaml
from pymerge.sweeps.grid import Grid, Setting, as_text, key_of, settings_of
from pymerge.sweeps.results import (
    BEST,
    SweepResult,
    SweepRow,
    deciding,
    is_better,
    measures,
    read_progress,
    write_progress,
)
from pymerge.version import __version__

PROGRESS = "sweep.json"
# Those of `merge_checkpoints` that a sweep passes on.
_OPTIONS = {
    "copy_tokenizer",
    "device",
    "device_memory",
    "full_paths",
    "out_shard_size",
    "rank",
    "threads",
    "write_model_card",
}
# A recipe's names for what Python calls otherwise.
_RECIPE_NAMES = {"scaling": "lambda", "weights": "weight"}

Evaluate = Callable[[Path], "float | Mapping[str, float]"]
# Called with a row once it is there, how many are, and of how many.
Watch = Callable[[SweepRow, int, int], None]


@as_resource_errors()
def sweep_checkpoints(
    config: str | Path | Mapping[str, Any],
    grid: Grid,
    out: str | os.PathLike[str],
    *,
    evaluate: Evaluate | None = None,
    metric: str | None = None,
    maximize: bool = True,
    keep_all: bool = False,
    resume: bool = False,
    seed: int = 0,
    allow_non_finite: bool = False,
    strict: bool = False,
    watch: Watch | None = None,
    **options: Any,
) -> SweepResult:
    """Merge model folders by a recipe with every setting of a grid, evaluate each, keep the best.

    config: as of `merge_checkpoints`.
    grid: parameter -> the values to try, for all combinations, or a list of settings: parameters of
        the recipe's method ("density", "lambda", "weight", ...) and "merge_method". A number
        replaces the parameter everywhere in the recipe, a list is one number for each of `models`
        but the base.
    out: a folder, new or empty, for the results: sweep.json, and the merged models.
    evaluate: called with the folder of each merged model; returns a number, or a mapping of
        measures to numbers. Only the best model is kept, as out/best. None evaluates nothing and
        keeps all, as out/setting-001 and so on.
    metric: the measure that decides; by default the first. maximize: whether more is better.
    keep_all: keep every model, under its number.
    resume: go on with a sweep that was interrupted, of the same recipe and files; what it has
        evaluated is not merged again.
    seed, allow_non_finite, strict, options: as of `merge_checkpoints`: device, device_memory,
        threads, out_shard_size, rank, full_paths, copy_tokenizer, write_model_card.
    watch: called with each row, how many there are, and how many there will be.

    Returns a SweepResult, whose rows have a `folder` where the model was kept.

    Raises what `merge_checkpoints` raises, for every setting before the first merge; OutputError
    where `out` holds something else; EvaluationError where the evaluation gives no number.
    """
    for name in options.keys() - _OPTIONS:
        raise TypeError(f"sweep_checkpoints has no parameter {name!r}")
    check_flags(
        maximize=maximize,
        keep_all=keep_all,
        resume=resume,
        strict=strict,
        allow_non_finite=allow_non_finite,
    )
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"{argument('evaluate')} is {type_of(evaluate)}; pass a function")
    settings = settings_of(grid)
    reading = functools.partial(_recipes, config, settings, seed, allow_non_finite, strict)
    recipes, identity = Uninterrupted(reading).run()
    folder = Path(out)
    known = _begin(folder, identity, resume)
    keys = [key_of(setting) for setting in settings]
    done = {key_of(row.setting): row for row in known if _is_done(row, evaluate is not None)}
    found = SweepResult([], metric, maximize)
    best: SweepRow | None = None
    width = max(3, len(str(len(settings))))
    # First what is known, so that no model is kept that would not be the best.
    order = sorted(range(len(settings)), key=lambda place: keys[place] not in done)

    def merge(place: int, into: Path) -> None:
        merge_checkpoints(
            recipes[place],
            into,
            overwrite=True,
            seed=seed,
            allow_non_finite=allow_non_finite,
            strict=strict,
            **options,
        )

    for place in order:
        setting = settings[place]
        row = done.get(keys[place])
        fresh = row is None
        if row is None:
            into = folder / f"setting-{place + 1:0{width}}"
            merge(place, into)
            row = SweepRow(setting, folder=into)
            if evaluate is not None:
                row.metrics = measures(evaluate(into), setting)
        found.rows.append(row)
        worse: SweepRow | None = None
        if evaluate is not None:
            found.metric = deciding(found.metric, row)
            if is_better(row, best, found.metric, maximize):
                worse, best = best, row
            else:
                worse = row
        gone = None
        if worse is not None and not keep_all:
            gone, worse.folder = worse.folder, None
        write_progress(folder / PROGRESS, found, identity)
        if gone is not None:  # the table comes first: it names no folder that is not there
            _remove(gone)
        if fresh and watch is not None:
            watch(row, len(found.rows), len(settings))
    found.rows.sort(key=lambda row: keys.index(key_of(row.setting)))
    best = found.best
    if best is not None and not keep_all:
        place = keys.index(key_of(best.setting))
        final = folder / BEST
        if best.folder is None or not best.folder.is_dir():
            merge(place, final)
        elif best.folder != final:
            _remove(final)
            best.folder.rename(final)
        best.folder = final
    write_progress(folder / PROGRESS, found, identity)
    return found


def _recipes(
    config: str | Path | Mapping[str, Any],
    settings: list[Setting],
    seed: int,
    allow_non_finite: bool,
    strict: bool,
) -> tuple[list[MergeRecipe], str]:
    """The recipe of every setting, and a hash of what all depend on. ConfigError, CheckpointError
    and MismatchError with the problems of the first setting that has some.
    """
    document, folder = _document(config)
    non_finite = "allow" if allow_non_finite else "error"
    recipes = []
    for setting in settings:
        own = Document(
            applied(document.data, setting, document.source),
            f"{document.source} with {as_text(setting)}",
            document.lines,
            document.columns,
            document.shared,
        )
        recipes.append(recipe_of(own, folder, seed=seed, non_finite=non_finite)[0])
    for setting, recipe in zip(settings, recipes, strict=True):
        problems = plan_unchecked(recipe, seed, strict).problems
        if problems:
            raise MergeError([f"with {as_text(setting)}: {problem}" for problem in problems])
    models = open_inputs(recipes[0])
    try:
        inputs = inputs_of(models)
    finally:
        close_inputs(models)
    parts = __version__, as_yaml(document.data), inputs, seed, allow_non_finite
    return recipes, hashlib.sha256(repr(parts).encode()).hexdigest()


def _document(config: str | Path | Mapping[str, Any]) -> tuple[Document, Path]:
    if isinstance(config, Mapping):
        data: Any = copy.deepcopy(dict(config))
        return Document(data, "configuration"), Path()
    text, path = read_text(config)
    return read_yaml(text, str(path)), path.parent


def applied(data: Any, setting: Setting, source: str) -> Any:
    """A recipe's data with the values of a setting. ConfigError where these have no place in it."""
    made = copy.deepcopy(data)
    if not isinstance(made, dict):
        return made  # which the recipe's own check tells
    for name, value in setting.items():
        if name in ("method", "merge_method"):
            made["merge_method"] = value
            continue
        name = _RECIPE_NAMES.get(name, name)
        _without(made, name)
        if not isinstance(value, list):
            holder = made.get("parameters") or {}
            made["parameters"] = {**holder, name: value} if isinstance(holder, dict) else holder
            continue
        models = made.get("models")
        own = [
            entry
            for entry in (models if isinstance(models, list) else [])
            if isinstance(entry, dict) and entry.get("model") != made.get("base_model")
        ]
        if len(own) != len(value):
            raise ConfigError(
                f"{source}: {name} has {counted(len(value), 'value')} for"
                f" {counted(len(own), 'model')} of `models` beside the base; pass one number, or"
                " one for each"
            )
        for entry, each in zip(own, value, strict=True):
            entry["parameters"] = {**(entry.get("parameters") or {}), name: each}
    return made


def _without(value: Any, name: str) -> None:
    """Take a parameter out wherever a recipe sets it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "parameters" and isinstance(inner, dict):
                inner.pop(name, None)
            else:
                _without(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _without(inner, name)


def _is_done(row: SweepRow, evaluates: bool) -> bool:
    """Whether a row of an earlier run has what this one makes of it, which may have been called
    with an evaluation where the other was not.
    """
    return bool(row.metrics) if evaluates else row.folder is not None and row.folder.is_dir()


def _begin(folder: Path, identity: str, resume: bool) -> list[SweepRow]:
    """Make the folder; the rows of an earlier sweep where it is to go on."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is no folder; name a new one")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if there and not (resume and PROGRESS in there):
        way_out = f", or go on with its sweep ({argument('resume', True)})" * (PROGRESS in there)
        raise OutputError(f"{folder} is not empty; name a new folder{way_out}")
    folder.mkdir(parents=True, exist_ok=True)
    return read_progress(folder / PROGRESS, identity)


def _remove(folder: Path) -> None:
    """A model folder of this sweep."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
