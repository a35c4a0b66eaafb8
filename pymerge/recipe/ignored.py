"""What people write in recipes and mergekit passes over in silence: it has no effect here either,
which a note says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

from pymerge.methods._table import METHODS
from pymerge.recipe.references import unused_revision
from pymerge.recipe.yaml import Path

# Options of `mergekit-yaml`; and a shorter name of one that people know from elsewhere.
OPTIONS_OF_THE_COMMAND = (
    "allow_crimes",
    "async_write",
    "clone_tensors",
    "copy_tokenizer",
    "cuda",
    "device",
    "gpu_rich",
    "lazy_unpickle",
    "lora_merge_cache",
    "lora_merge_dtype",
    "low_cpu_memory",
    "multi_gpu",
    "num_threads",
    "out_shard_size",
    "quiet",
    "random_seed",
    "read_to_gpu",
    "safe_serialization",
    "transformers_cache",
    "trust_remote_code",
    "write_model_card",
    "write_threads",
)
_SHORT = {"seed": "random_seed"}
# Parameters of mergekit's methods. Those that only methods or flavors of pymerge have stand in no
# recipe of mergekit's: a misplaced one is an error.
_PARAMETERS = frozenset(
    parameter.name
    for method in METHODS.values()
    if not method.statistics and method.op != "matrix"
    for parameter in method.parameters
)
# Where recipes name models.
_MODELS = ("model", "base_model", "lora", "source", "tokenizer_source")


def option_note(key: str) -> str | None:
    """What is said of an option of the command in a recipe; None of another key."""
    name = _SHORT.get(key, key)
    if name not in OPTIONS_OF_THE_COMMAND:
        return None
    option = f"--{name.replace('_', '-')}"
    return f"{key} has no effect in a recipe; it is an option of the command, {option}"


def take_ignored(data: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Takes such keys out of a recipe: options of the command, parameters of methods that stand
    beside `parameters` instead of in it, layer ranges of whole models.
    """
    for key in [*data]:
        note = option_note(key)
        if note is not None:
            del data[key]
            yield (key,), note
    for path, entry in _entries(data):
        for key in [key for key in entry if key in _PARAMETERS]:
            del entry[key]
            yield (*path, key), f"{key} has no effect here; it is read in `parameters` alone"
    for place, entry in _dicts(data.get("models")):
        if entry.pop("layer_range", None) is not None:
            text = "layer_range has no effect in models, which are taken whole; slices have ranges"
            yield ("models", place, "layer_range"), text


def _entries(data: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every mapping that may have `parameters`."""
    yield (), data
    modules = data.get("modules")
    holders: list[tuple[Path, dict[str, Any]]] = [((), data)]
    for name, module in modules.items() if isinstance(modules, dict) else ():
        if isinstance(module, dict):
            holders.append((("modules", name), module))
            yield holders[-1]
    for path, holder in holders:
        yield from (((*path, "models", i), each) for i, each in _dicts(holder.get("models")))
        for j, piece in _dicts(holder.get("slices")):
            place = (*path, "slices", j)
            yield place, piece
            yield from (((*place, "sources", i), e) for i, e in _dicts(piece.get("sources")))


def _dicts(items: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for place, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict):
            yield place, item


def notes_on_models(value: Any, path: Path, folder: FilePath | None) -> Iterator[tuple[Path, str]]:
    """Notes on what has no effect wherever a model is named: the class that its tensors' names are
    to be taken from, and the revision of a local path.
    """
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        if key == "override_architecture" and inner is not None:
            text = "override_architecture has no effect: names are taken from the tensors"
            yield (*path, key), text
        local = unused_revision(inner, folder) if key in _MODELS else None
        if local is not None:
            yield (*path, key), f"the revision of {local} has no effect: it is a path here"
        if isinstance(inner, (dict, list)):
            yield from notes_on_models(inner, (*path, key), folder)
