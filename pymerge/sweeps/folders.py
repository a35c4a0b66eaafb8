"""`pymerge.sweep_checkpoints`: a merge of model folders for each of many settings of a recipe."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint import contents, paths
from pymerge.checkpoint.locks import held_alone
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.writer import translated
from pymerge.engine.manifest import inputs_of
from pymerge.engine.merge import close_inputs, merge_checkpoints, open_inputs, plan_unchecked
from pymerge.errors import CheckpointError, ConfigError, MergeError, OutputError, as_resource_errors
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
    NUMBERED,
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
    recipes, models, identity = Uninterrupted(reading).run()
    folder = _free(Path(out), models, resume)
    # All that a merge refuses of its options and the environment, before anything is written. No
    # setting has the number 0.
    merge_checkpoints(recipes[0], folder / f"{NUMBERED}0", dry_run=True, seed=seed, **options)
    refusal = f"another sweep is writing {folder} now; wait for it, or name another folder"
    with held_alone(folder, refusal):
        known = read_progress(folder / PROGRESS, identity)
        swept = _Sweep(folder, identity, settings, known, SweepResult([], metric, maximize))
        swept.measured = evaluate is not None
        swept.keep_all = keep_all or evaluate is None

        def merge(place: int, into: Path, *, overwrite: bool) -> None:
            merge_checkpoints(
                recipes[place],
                into,
                overwrite=overwrite,
                seed=seed,
                allow_non_finite=allow_non_finite,
                strict=strict,
                **options,
            )
            try:
                for model in models:  # which an evaluation, or anybody, may have written to since
                    model.check()
            except CheckpointError:
                _remove(into)
                raise

        swept.begin()
        for place, setting in enumerate(settings):
            row = swept.row_of(place)
            if swept.is_done(row):
                continue
            row = row or SweepRow(setting)
            if row.folder is None or not row.folder.is_dir():
                into = swept.free_folder(place)
                merge(place, into, overwrite=True)
                row.folder = into
            if evaluate is not None and not row.metrics:
                row.metrics = measures(evaluate(row.folder), setting)
            Uninterrupted(functools.partial(swept.add, row)).run()
            if watch is not None:
                watch(row, len(swept.found.rows), len(settings))
        best = swept.best
        if best is not None and not swept.keep_all:
            final = folder / BEST
            if best.folder != final or not final.is_dir():
                aside = Uninterrupted(swept.make_room).run()
                if aside is not None:
                    said = f"{final} held what this sweep did not write; it is {aside} now"
                    warnings.warn(said, stacklevel=3)
                if best.folder is None or not best.folder.is_dir():
                    merge(swept.keys.index(key_of(best.setting)), final, overwrite=False)
            Uninterrupted(swept.name_best).run()
        return swept.found


class _Sweep:
    """The rows of a sweep in a folder, and which models are kept there.

    found: receives the rows of these settings. Rows of other settings, of an earlier sweep, stay in
        the file.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        settings: list[Setting],
        known: list[SweepRow],
        found: SweepResult,
    ) -> None:
        self.found = found
        self.best: SweepRow | None = None
        self.measured = self.keep_all = False
        self._folder = folder
        self._identity = identity
        self.keys = [key_of(setting) for setting in settings]
        self._known = {key_of(row.setting): row for row in known}

    def begin(self) -> None:
        """Take over what is known: all of it before the file is written again, so that nothing is
        lost there.
        """
        for key in self.keys:
            row = self._known.get(key)
            if row is not None and self.is_done(row):
                self._consider(row)
        self._save()

    def row_of(self, place: int) -> SweepRow | None:
        return self._known.get(self.keys[place])

    def is_done(self, row: SweepRow | None) -> bool:
        if row is None or (self.measured and not row.metrics):
            return False
        return not self.keep_all or (row.folder is not None and row.folder.is_dir())

    def free_folder(self, place: int) -> Path:
        """A new model's folder: by the number of its setting, unless another row's has that."""
        taken = {row.folder for row in self._known.values() if row.folder is not None}
        count = len(self.keys)
        width = max(3, len(str(count)))
        numbers = itertools.chain([place], itertools.count(count))
        paths = (self._folder / f"{NUMBERED}{number + 1:0{width}}" for number in numbers)
        return next(path for path in paths if path not in taken)

    def add(self, row: SweepRow) -> None:
        """Take a row in, and remove the model that is not kept any more."""
        self._known[key_of(row.setting)] = row
        before = self.best
        self._consider(row)
        gone = None
        if not self.keep_all:
            worse = before if self.best is row else row
            if worse is not None:
                gone, worse.folder = worse.folder, None
        self._save()  # first: the table names no folder that is not there
        if gone is not None:
            _remove(gone)

    def _consider(self, row: SweepRow) -> None:
        if self.measured:
            self.found.metric = deciding(self.found.metric, row)
            if is_better(row, self.best, self.found.metric, self.found.maximize):
                self.best = row
        self.found.rows.append(row)
        self.found.rows.sort(key=lambda row: self.keys.index(key_of(row.setting)))

    def make_room(self) -> Path | None:
        """Nothing has the best model's name afterwards. What is there and of no row, or more than a
        model, gets another name, which is returned.
        """
        final = self._folder / BEST
        gone = [row for row in self._known.values() if row.folder == final]
        for row in gone:
            row.folder = None
        if gone:
            self._save()
            _remove(final)
        if not os.path.lexists(final):
            return None
        names = (self._folder / f"{BEST}-before-{n}" for n in itertools.count(1))
        aside = next(path for path in names if not os.path.lexists(path))
        with translated(final):
            final.rename(aside)
        return aside

    def name_best(self) -> None:
        final = self._folder / BEST
        assert self.best is not None
        with translated(final):
            if self.best.folder is not None and self.best.folder != final:
                if self.best.folder.is_dir():
                    self.best.folder.rename(final)
        self.best.folder = final
        self._save()

    def _save(self) -> None:
        keys = {key_of(row.setting) for row in self.found.rows}
        others = [row for key, row in self._known.items() if key not in keys]
        rows = [*self.found.rows, *others]
        write_progress(self._folder / PROGRESS, replace(self.found, rows=rows), self._identity)


def _recipes(
    config: str | Path | Mapping[str, Any],
    settings: list[Setting],
    seed: int,
    allow_non_finite: bool,
    strict: bool,
) -> tuple[list[MergeRecipe], list[OpenModel], str]:
    """The recipe of every setting, all models, to be asked whether they changed, and a hash of what
    all rows depend on. ConfigError, CheckpointError and MismatchError with the problems of the
    first setting that has some.
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
    models: list[OpenModel] = []
    inputs = []
    for recipe in {(each.models, each.statistics): each for each in recipes}.values():
        opened = open_inputs(recipe)
        close_inputs(opened)
        models += opened
        inputs.append(inputs_of(opened))
    parts = __version__, as_yaml(document.data), inputs, seed, allow_non_finite
    return recipes, models, hashlib.sha256(repr(parts).encode()).hexdigest()


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


def _free(folder: Path, models: Sequence[OpenModel], resume: bool) -> Path:
    """The folder, where a sweep may write to it. Changes nothing on the disk."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is no folder; name a new one")
    out = paths.resolved(folder)
    inputs = [path for model in models for path in model.places]
    problems = paths.conflicts(out, out, inputs)
    if problems:
        raise OutputError(list(dict.fromkeys(problems)))
    with translated(folder):
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if there and not (resume and PROGRESS in there):
        way_out = f", or go on with its sweep ({argument('resume', True)})" * (PROGRESS in there)
        raise OutputError(f"{folder} is not empty; name a new folder{way_out}")
    return folder


def _remove(folder: Path) -> None:
    """Delete a model of this sweep. What else the folder holds, as an evaluation may have written,
    stays there.
    """
    with suppress(OSError):
        with contents.opened(folder) as fd:
            contents.remove(fd, contents.look(fd))
        folder.rmdir()
