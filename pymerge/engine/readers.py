"""Statistics for state dicts: described by their files' headers, or requested tensor by tensor from
objects with the methods of `Reader`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from pymerge.checkpoint import schemas
from pymerge.checkpoint.types import StatisticsHeader, StatisticsSource, TensorInfo
from pymerge.checkpoint.weight_tags import Sample, beside, foreign_weights
from pymerge.engine.mappings import Mappings, StateDict
from pymerge.engine.solver import with_zeros
from pymerge.messages.words import counted, shown, type_of
from pymerge.ops.tensors import check_differences, check_floats
from pymerge.planning.plan import PlannedTensor, Sum
from pymerge.statistics._file import Statistics, load

_GRAMS = ("input_gram", "output_grad_gram")


class Reader(Protocol):
    """The statistics of one model. Names are layers (a weight's name without ".weight") or
    parameters.

    None where there are none. `pymerge.statistics.Statistics` is one.
    """

    def input_gram(self, layer: str) -> torch.Tensor | None:
        """(d_in, d_in)."""

    def output_grad_gram(self, layer: str) -> torch.Tensor | None:
        """(d_out, d_out)."""

    def block_fisher(self, parameter: str) -> torch.Tensor | None:
        """(d, d), of a vector parameter."""

    def diagonal_fisher(self, parameter: str) -> torch.Tensor | None:
        """The parameter's shape."""


class AskedReader(StatisticsSource):
    """Stands in for a file's header: answers from what a reader returns on request, and holds each
    matrix until it is read.
    """

    def __init__(self, path: str, reader: Reader, model: StateDict) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        header = getattr(reader, "header", None)
        self._content: Mapping[str, Any] = header if isinstance(header, Mapping) else {}
        self.foreign = foreign_weights(self._content, _shapes(model), _sampler(model))
        self._reader = reader
        self.held: dict[str, torch.Tensor] = {}

    def find(self, kind: str, tensor: str) -> tuple[str, int] | None:
        name = tensor.removesuffix(".weight") if kind in _GRAMS else tensor
        shares = getattr(self._reader, "shares_input", None)
        own = str(shares(name)) if kind == "input_gram" and shares is not None else name
        key = f"{kind}/{own}"
        if key in self.held:
            return key, 1
        found = getattr(self._reader, kind)(name)
        if found is None:
            return None
        check_floats(f"{kind} of {tensor!r} in {self.path}", found, "a merge by statistics")
        self.held[key] = found
        shape = tuple(found.shape)
        if kind != "diagonal_fisher" and len(shape) == 2 and shape[0] == shape[1]:
            shape = (shape[0] * (shape[0] + 1) // 2,)  # as it is stored in a file
        self.tensors[key] = TensorInfo(key, "float32", shape)
        return key, 1

    def transposed(self, tensor: str) -> bool:
        return bool(self._layer(tensor).get("transposed", False))

    def weight_of(self, tensor: str) -> str:
        return str(self._layer(tensor).get("weight", tensor))

    def slices(self, tensor: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ()  # nobody knows beforehand which there are

    def saw_few(self, tensor: str) -> bool:
        return False  # of what is given tensor by tensor nothing is pooled

    def _layer(self, tensor: str) -> Mapping[str, Any]:
        found = self._content.get("layers", {}).get(tensor.removesuffix(".weight"), {})
        return found if isinstance(found, Mapping) else {}


class StatisticsInputs:
    """The readers of a merge, one per model, and the means that they return.

    Gives `inputs` their descriptions; readers that no file's header describes are asked tensor by
    tensor.
    """

    def __init__(self, given: Sequence[Reader | str | os.PathLike[str]], inputs: Mappings) -> None:
        if isinstance(given, (str, os.PathLike)):
            raise TypeError(f"statistics={shown(given)} is one file; pass a list, one per model")
        if not isinstance(given, Sequence):
            raise TypeError(
                f"statistics is {type_of(given)}; pass a list of files or readers, one per model"
            )
        if len(given) != len(inputs.models):
            check_differences(inputs.models, inputs.base)  # whose errors are more specific
            raise ValueError(
                f"statistics has {counted(len(given), 'entry', 'entries')} for"
                f" {counted(len(inputs.models), 'model')}; pass one per model, in their order"
            )
        for k, entry in enumerate(given):
            if not isinstance(entry, (str, os.PathLike)) and not hasattr(entry, "input_gram"):
                raise TypeError(
                    f"statistics[{k}] is {type_of(entry)}; pass a file that `pymerge stats` wrote,"
                    " or what pymerge.statistics gives"
                )
        self._readers: list[Reader] = [
            load(entry) if isinstance(entry, (str, os.PathLike)) else entry for entry in given
        ]
        self._asked: dict[int, AskedReader] = {}
        found: list[StatisticsHeader | StatisticsSource] = []
        for k, (reader, model) in enumerate(zip(self._readers, inputs.models, strict=True)):
            path = f"statistics[{k}]"
            if isinstance(reader, Statistics):
                found.append(_described(path, reader, model))
            else:
                self._asked[k] = AskedReader(path, reader, model)
                found.append(self._asked[k])
        inputs.describe(found)

    def means(self, tensor: PlannedTensor, sums: Sequence[Sum | None]) -> list[torch.Tensor]:
        """The means as full matrices; zeros for a model without statistics."""
        found = [
            None if each is None else self._mean(source.model, each.key)
            for source, each in zip(tensor.sources, sums, strict=True)
        ]
        return with_zeros(tensor, found)

    def _mean(self, model: int, key: str) -> torch.Tensor:
        if model in self._asked:
            return self._asked[model].held[key]
        kind, _, name = key.partition("/")
        mean: torch.Tensor = getattr(self._readers[model], kind)(name)
        return mean

    def forget(self) -> None:
        """Release what was loaded."""
        for each in self._asked.values():
            each.held.clear()


def _described(path: str, reader: Statistics, model: StateDict) -> StatisticsHeader:
    content, foreign, renamed = beside(reader.header, _shapes(model), _sampler(model))
    tensors = {
        key: TensorInfo(key, "float32", schemas.sum_shape(content, key))
        for key in content["tensors"]
    }
    return StatisticsHeader(path, content, tensors, foreign, renamed)


def _shapes(model: StateDict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(model[name].shape) for name in model}


def _sampler(model: StateDict) -> Sample:
    def sample(name: str, begin: int, size: int) -> torch.Tensor | None:
        weight = model[name]
        if not weight.is_floating_point():
            return None
        return weight.detach().reshape(-1)[begin : begin + size]

    return sample
