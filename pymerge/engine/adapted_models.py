"""Models with an adapter: opened as if the merged model were stored.

`base+adapter` in a recipe, or an adapter by itself, whose base is the recipe's `base_model` or else
the one that its config names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pymerge.checkpoint.adapter import AdaptedModel, OpenAdapter, is_adapter, open_adapter
from pymerge.checkpoint.adapter_config import read_vector_config
from pymerge.checkpoint.hub import local_path, locate, split_adapter
from pymerge.checkpoint.reader import OpenModel, open_model
from pymerge.checkpoint.stored import StoredTensor
from pymerge.errors import CheckpointError, MergeError
from pymerge.messages.words import names_with_verb, some_names
from pymerge.planning.adapters import Application, Target, apply_to
from pymerge.planning.unmergeable import holds_adapter
from pymerge.planning.vocabulary import is_vocabulary


class Opener:
    """Opens the models of one merge. A base that several adapters share is opened once.

    base: the reference of the recipe's `base_model`.
    """

    def __init__(self, base: str | None) -> None:
        self._base = base
        self._plain: dict[str, OpenModel] = {}

    def __call__(self, reference: str, needs_weights: bool = True) -> OpenModel:
        """Raises CheckpointError and MismatchError."""
        parts = split_adapter(reference)
        if parts is not None:
            adapter = open_adapter(parts[1])
            return adapted(reference, self._model(parts[0]), adapter, ())
        if not needs_weights:
            return open_model(reference, needs_weights=False)
        path = locate(reference)
        if is_adapter(path) and read_vector_config(path) is None:
            return self._on_its_base(reference, open_adapter(reference))
        model = self._model(reference)
        if path.is_file() and self._base not in (None, reference):
            if holds_adapter(model.header.tensors):
                return self._on_its_base(reference, open_adapter(reference))
        return model

    def _model(self, reference: str) -> OpenModel:
        if reference not in self._plain:
            self._plain[reference] = open_model(reference)
        return self._plain[reference]

    def _on_its_base(self, reference: str, adapter: OpenAdapter) -> OpenModel:
        named = self._base if self._base not in (None, reference) else adapter.base
        if named is None:
            raise CheckpointError(
                f"model {reference} is an adapter, and its config names no base; write"
                f" base+{reference}, or give base_model"
            )
        notes = []
        if adapter.base is not None and not _is_same(named, adapter.base):
            notes.append(
                f"{reference} is an adapter of {adapter.base} by its config, and is applied to"
                f" {named}, the recipe's base_model; if the other is meant, write"
                f" {adapter.base}+{reference}"
            )
        if named is self._base:
            return adapted(reference, self(named), adapter, notes)
        try:
            return adapted(reference, self._model(_near(named, adapter)), adapter, notes)
        except MergeError as error:
            raise CheckpointError(
                [
                    f"{each} (the base of the adapter {reference}, by its config; to choose another"
                    f" write base+{reference}, or give base_model)"
                    for each in error.problems
                ]
            ) from None


def check_vectors(models: Sequence[OpenModel]) -> None:
    """Raise CheckpointError where (IA)^3 adapters would be merged with anything else."""
    vectors = [model.reference for model in models if model.header.adapter]
    others = [model.reference for model in models if not model.header.adapter]
    if vectors and others:
        raise CheckpointError(
            f"the vectors of (IA)^3 adapters ({some_names(vectors)}) are merged with those of"
            f" others alone, and {names_with_verb(others)} no such adapter; give adapters alone, as"
            " base_model too, or merge each into its model first (peft: merge_and_unload)"
        )


def _is_same(one: str, other: str) -> bool:
    """Whether two references are likely to mean one model: equal last components."""
    return _last(one) == _last(other)


def _last(reference: str) -> str:
    return reference.rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def _near(reference: str, adapter: OpenAdapter) -> str:
    """A path in an adapter's config may also be relative to the adapter's folder."""
    if adapter.folder is not None and local_path(reference) is None:
        beside = str(adapter.folder / reference)
        if local_path(beside) is not None:
            return beside
    return reference


def adapted(
    reference: str, base: OpenModel, adapter: OpenAdapter, notes: tuple[str, ...] | list[str]
) -> OpenModel:
    """The base with the adapter's updates. Raises MismatchError where they do not fit."""
    found = apply_to(adapter, base.header)
    tensors = dict(base.tensors)
    _replace(tensors, found, adapter)
    for name, tied in found.outputs.items():
        tensors[name] = _as(base.tensors[tied], name)
    for target in found.targets:
        _update(tensors, target)
    config, all_notes = _config(base, tensors), (*notes, *found.notes)
    if found.unties:
        config = _untied(config)
    return AdaptedModel(reference, base, adapter, config, tensors, all_notes)


def _config(base: OpenModel, tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    """The base's, with the number of rows where the adapter brings other embeddings."""
    counts = {
        base.tensors[name].info.shape[0]: tensor.info.shape[0]
        for name, tensor in tensors.items()
        if is_vocabulary(name) and tensor is not base.tensors.get(name, tensor)
    }
    rows = next((new for old, new in counts.items() if old != new), None)
    return base.header.config if rows is None else _with_rows(base.header.config, rows)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    inner = {"text_config": _untied(nested)} if isinstance(nested, Mapping) else {}
    return {**config, **inner, "tie_word_embeddings": False}


def _with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    found = {**config}
    nested = config.get("text_config")
    if isinstance(nested, dict):
        found["text_config"] = _with_rows(nested, rows)
    if "vocab_size" in config:
        found["vocab_size"] = rows
    return found


def _as(stored: StoredTensor, name: str) -> StoredTensor:
    low_rank = importlib.import_module("pymerge.checkpoint.low_rank")
    renamed: StoredTensor = low_rank.ReplacedTensor(stored, name, stored.info.dtype)
    return renamed


def _replace(tensors: dict[str, StoredTensor], found: Application, adapter: OpenAdapter) -> None:
    low_rank = importlib.import_module("pymerge.checkpoint.low_rank")
    for name, own in found.replaced.items():
        stored = adapter.replaced[own]
        before = tensors.get(name)
        dtype = stored.info.dtype if before is None else before.info.dtype
        tensors[name] = low_rank.ReplacedTensor(stored, name, dtype)


def _update(tensors: dict[str, StoredTensor], target: Target) -> None:
    """Put the sum in the place of the base's tensor. Imports NumPy, which plans of plain models do
    without.
    """
    low_rank = importlib.import_module("pymerge.checkpoint.low_rank")
    update, stored = target.update, tensors[target.tensor]
    # The outputs of a weight that is stored (d_in, d_out), and of an embedding, are its columns.
    turned = target.transposed or update.embeds
    b, a = _matrix(update.b, update.rank, 1, turned), _matrix(update.a, update.rank, 0, turned)
    left, right = (a, b) if turned else (b, a)
    magnitude = None if update.magnitude is None else _matrix(update.magnitude, 1, 1)
    low = low_rank.LowRank(left, right, update.scale, magnitude, turned)
    tensors[target.tensor] = low_rank.AdaptedTensor(stored, low, stored.info.shape[0])
    if target.bias is not None and update.bias is not None:
        bias = tensors[target.bias]
        low = low_rank.LowRank(_matrix(update.bias, 1, 1), low_rank.one, update.scale)
        tensors[target.bias] = low_rank.AdaptedTensor(bias, low, bias.info.shape[0])


def _matrix(stored: StoredTensor, rank: int, axis: int, turned: bool = False) -> Callable[[], Any]:
    """Gives a factor as a matrix whose axis of that number has the rank. turned: its transpose."""
    low_rank = importlib.import_module("pymerge.checkpoint.low_rank")

    def read() -> Any:
        shape = (rank, -1) if axis == 0 else (-1, rank)
        found = low_rank.values_of(stored).reshape(shape)
        return found.T if turned else found

    return read
