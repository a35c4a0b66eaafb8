"""Plain data on checkpoints: models and tensors as headers give them, and sources of inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pymerge.checkpoint.tokens import Tokens
from pymerge.dtypes import elements

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header gives it. dtype: torch's name, as "bfloat16" or "float8_e4m3fn".

    saved_as: its dtype in a result, if it was widened on reading.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    saved_as: str = ""

    @property
    def result_dtype(self) -> str:
        return self.saved_as or self.dtype


@dataclass(frozen=True)
class StatisticsHeader:
    """A statistics file of a model, opened but not read (docs/spec/statistics.md, S10).

    content: the file's own header. tensors: its sums, by key. foreign: names of the model's tensors
    whose values are not those that the statistics were collected with; only tensors of which the
    file says something are looked at. renamed: names in content of the model's tensors that were
    found by their values (S15).
    """

    path: str
    content: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    foreign: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()

    def find(self, kind: str, tensor: str) -> tuple[str, int] | None:
        """The key of a tensor's sum of that kind, and the divisor of its mean; None where nothing
        was summed.
        """
        for name in (tensor, tensor.removesuffix(".weight")):
            key = self.content["aliases"].get(f"{kind}/{name}", f"{kind}/{name}")
            counts = self.content["tensors"].get(key)
            if counts is None:
                continue
            count = int(counts["tokens" if kind == "input_gram" else "draws"])
            tokens = int(counts["tokens"]) if kind == "output_grad_gram" else count
            return (key, count) if count and tokens else None
        return None

    def transposed(self, tensor: str) -> bool:
        """Whether a weight is stored (d_in, d_out)."""
        return bool(self._layer(tensor).get("transposed"))

    def weight_of(self, tensor: str) -> str:
        """The weight's name in the statistics."""
        return str(self._layer(tensor).get("weight", tensor))

    def slices(self, tensor: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The layers of the matrices of a tensor of more than two dimensions (S1), in their order:
        one of a convolution, one or several of each slice of experts; none where it is neither.
        """
        return _slices(self.content["layers"], tensor, shape)

    def saw_few(self, tensor: str) -> bool:
        """Whether a slice of experts has the sums of all slices (S16)."""
        return tensor.removesuffix(".weight") in self.content.get("few", {})

    def _layer(self, tensor: str) -> Mapping[str, Any]:
        layer = self.content["layers"].get(tensor.removesuffix(".weight"))
        return layer if isinstance(layer, dict) else {}


def _slices(layers: Mapping[str, Any], tensor: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    own = layers.get(tensor.removesuffix(".weight"))
    if own is not None and own["d_in"] * own["d_out"] == elements(shape):
        return (tensor.removesuffix(".weight"),)
    places = range(shape[0] if len(shape) == 3 else 0)
    if any(f"{tensor}.{place}" in layers for place in places):
        return tuple(f"{tensor}.{place}" for place in places)
    first = next((place for place in places if f"{tensor}.{place}.0" in layers), None)
    if first is None or layers[f"{tensor}.{first}.0"]["transposed"]:
        return ()  # the parts of a transposed slice do not lie one behind the other
    parts = range(shape[1] // max(1, layers[f"{tensor}.{first}.0"]["d_out"]))
    return tuple(f"{tensor}.{place}.{part}" for place in places for part in parts)


class StatisticsSource(Protocol):
    """Statistics without a header: each is loaded on demand. Answers as a `StatisticsHeader` does,
    from what is loaded.
    """

    path: str
    tensors: Mapping[str, TensorInfo]
    foreign: tuple[str, ...]

    def find(self, kind: str, tensor: str) -> tuple[str, int] | None:
        """As of a header; loads the statistic, and holds it."""

    def transposed(self, tensor: str) -> bool: ...

    def weight_of(self, tensor: str) -> str: ...

    def slices(self, tensor: str, shape: tuple[int, ...]) -> tuple[str, ...]: ...

    def saw_few(self, tensor: str) -> bool: ...


@dataclass(frozen=True)
class ModelHeader:
    """A model, opened but not read. config is its config.json, empty where there is none; tokens is
    its tokenizer's. quantisation_files: names of its small files that say how it is quantised.

    shared: a tensor that lies in the memory of another one of its dtype and shape -> the first of
        these, as a module's state dict has tied weights, and a PyTorch file of it. in_memory: a
        state dict, beside which there are no files. asks: whether its statistics are asked
        for while the merge runs, so that a plan does not know them. adapter: an (IA)^3 adapter,
        which has a config of its own.
    """

    reference: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    tokens: Tokens | None = None
    statistics: StatisticsHeader | StatisticsSource | None = None
    quantisation_files: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    in_memory: bool = False
    asks: bool = False
    adapter: bool = False


@dataclass(frozen=True)
class Source:
    """A tensor of one input. model: index into `MergeRecipe.models`. rows: its token alignment, if
    any.
    """

    model: int
    tensor: str
    rows: Rows | None = None


# Kinds of rows that come from no single model (docs/spec/rows.md, V4 and V5).
ZERO, MEAN, PADDING = -1, -2, -3


@dataclass(frozen=True, eq=False, repr=False)
class Rows:
    """What the rows of a tensor are made of for one model, so that they are rows of the result's
    tokens (docs/spec/rows.md).

    shape, dtype: as they are read. tensors: where rows may come from, as they are stored. places:
    (tensors, rows), each tensor's own row for every row here, -1 where it has none. choice: for
    every row an index into `tensors`, or ZERO, MEAN (of all tensors that have it) or PADDING (the
    mean of all rows that are none).
    """

    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[Source, ...]
    places: npt.NDArray[np.int32]
    choice: npt.NDArray[np.int32]

    def __repr__(self) -> str:
        """Equal for what gives equal bytes."""
        content = hashlib.sha256(self.places.tobytes() + self.choice.tobytes()).hexdigest()
        return f"Rows({self.shape}, {self.dtype}, {self.tensors}, {content})"
