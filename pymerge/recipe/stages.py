"""Several recipes in one file, as `mergekit-multi` reads them: every one but the last has a `name`,
and a name stands for the merge's result wherever another recipe names a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePath
from typing import Any

from pymerge.checkpoint.files import exists
from pymerge.checkpoint.paths import resolved
from pymerge.errors import ConfigError
from pymerge.messages.arguments import argument
from pymerge.messages.words import some_names
from pymerge.methods.method import short
from pymerge.recipe.model import MergeRecipe
from pymerge.recipe.resolve import recipe_of
from pymerge.recipe.schema import read_text
from pymerge.recipe.yaml import Document, read_documents

# Keys whose text names a model, unless it is one of these words.
_NAMES_A_MODEL = ("model", "base_model", "path", "source", "tokenizer_source")
_WORDS = ("base", "union")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Stage:
    """One merge of several. name: None of the one whose result is the output. uses: the names of
    those whose results it takes. notes: on what has no effect in its recipe.
    """

    name: str | None
    out: Path
    recipe: MergeRecipe
    uses: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_there(self) -> bool:
        """Whether its folder holds a model already."""
        return exists(self.out / "config.json") and any(exists(self.out / n) for n in _WEIGHTS)


def count_recipes(config: str | Path) -> int:
    """The number of YAML documents in a file. ConfigError for what is no YAML."""
    text, path = read_text(config)
    return len(read_documents(text, str(path)))


def read_stages(
    config: str | Path, out: Path, intermediate: Path, *, seed: int, non_finite: str
) -> list[Stage]:
    """The recipes of a file, in an order in which each comes after those that it uses.

    A recipe with a `name` is merged into the folder of that name in `intermediate`, the one without
    into `out`. seed, non_finite: as of `read_recipe`. ConfigError with every problem: of single
    recipes, names that repeat or are no folder's, none or several recipes without a name, recipes
    that use each other, results in one folder or within each other.
    """
    text, path = read_text(config)
    documents = read_documents(text, str(path))
    named: dict[str | None, Document] = {}
    problems: list[str] = []
    for document in documents:
        problem, name = _take_name(document)
        if problem is None and name in named:
            problem = f"the name {name} is taken" if name else "another recipe has no name either"
            problem = f"{document.where(())}: {problem}; give every recipe but the last its own"
        if problem is not None:
            problems.append(problem)
        else:
            named[name] = document
    if not problems and None not in named:
        problems.append(
            f"{path}: every recipe has a name, and the one without goes into {argument('out')};"
            " remove the name of the last"
        )
    problems = problems or _together(
        {short(name): intermediate / name for name in named if name is not None}
        | {f"{argument('out')} ({out})": out},
        str(path),
    )
    if problems:
        raise ConfigError(problems)
    folders = {name: str(intermediate / name) for name in named if name is not None}
    uses = {name: _replace_names(document.data, folders) for name, document in named.items()}
    found = {}
    for name, document in named.items():
        try:
            recipe, notes = recipe_of(document, path.parent, seed=seed, non_finite=non_finite)
        except ConfigError as error:
            problems += error.problems
            continue
        place = out if name is None else intermediate / name
        found[name] = Stage(name, place, recipe, tuple(uses[name]), tuple(notes))
    if problems:
        raise ConfigError(_said_once(problems, str(path)))
    return [found[name] for name in _in_order(uses, str(path))]


def _said_once(problems: Sequence[str], source: str) -> list[str]:
    """Problems that are equal but for their lines, as of recipes that were written by a script,
    each once, with its lines.
    """
    begins = f"{source}, line "
    lines: dict[str, list[str]] = {}
    for problem in problems:
        line, found, said = problem.removeprefix(begins).partition(": ")
        if found and line.isdecimal():
            lines.setdefault(said, []).append(line)
        else:
            lines.setdefault(problem, [])
    return [
        f"{source}, line{'s' * (len(at) > 1)} {some_names(at)}: {said}" if at else said
        for said, at in lines.items()
    ]


def _together(places: Mapping[str, Path], source: str) -> list[str]:
    """A problem for every two results of which one would replace or hold the other."""
    found = [(label, resolved(place)) for label, place in places.items()]
    return [
        f"{source}: {one} and {other} are one folder, or one lies in the other; give another name"
        for (one, first), (other, second) in combinations(found, 2)
        if first == second or first in second.parents or second in first.parents
    ]


def _take_name(document: Document) -> tuple[str | None, str | None]:
    """What is wrong with a recipe's name, and the name, which is removed from it."""
    if not isinstance(document.data, dict):
        return f"{document.where(())}: a document is no recipe; remove it", None
    if "name" not in document.data:
        return None, None
    where = document.where(("name",))
    name = document.data.pop("name")
    if not isinstance(name, str) or not name:
        return f"{where}: name: {short(name)} is no text; write one, or remove it", None
    parts = PurePath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in name:
        return f"{where}: name: {short(name)} is no name of a folder", None
    return None, name


def _replace_names(data: Any, folders: Mapping[str, str]) -> list[str]:
    """Put folders in the place of the names of merges; returns the names that were used."""
    used: dict[str, None] = {}
    for holder, key in _references(data):
        name, plus, adapter = holder[key].partition("@")[0].partition("+")
        if name not in folders or (key in ("source", "tokenizer_source") and name in _WORDS):
            continue
        used[name] = None
        if plus or key == "path":
            holder[key] = folders[name] + plus + adapter
        else:  # a path that is not yet there, whatever letters it has
            holder[key] = {"model": {"path": folders[name]}}
    return list(used)


def _references(value: Any) -> Iterator[tuple[Any, Any]]:
    """(mapping, key) wherever a model is named by text."""
    if isinstance(value, dict):
        for key, inner in [*value.items()]:
            if key in _NAMES_A_MODEL and isinstance(inner, str):
                yield value, key
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _in_order(uses: Mapping[str | None, list[str]], source: str) -> list[str | None]:
    """The names, each after those that it uses. ConfigError where that cannot be."""
    order: list[str | None] = []
    left = dict(uses)
    while left:
        ready = [name for name, used in left.items() if not set(used) & left.keys()]
        if not ready:
            raise ConfigError(
                f"{source}: {_listed(left)} use each other's results, so that none can be merged"
                " first; take one of the names out of the recipes"
            )
        order += ready
        for name in ready:
            del left[name]
    return order


def _listed(names: Collection[str | None]) -> str:
    words = [name for name in names if name is not None]
    text = some_names(words)
    return f"{text} and the last" if None in names else text
