"""From a recipe and the headers of its models to a list of output tensors; no tensor data is read.

A recipe comes from the configuration and knows no files; this module holds what the two sides share and
checks the recipe against what the headers say, every problem at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pymerge._types import InitName
from pymerge.checkpoint.tokens import Tokens
from pymerge.ops._rule import TiesOptions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header gives it. dtype is torch's name without "torch." ("bfloat16", "float8_e4m3fn")."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StatisticsHeader:
    """A statistics file of a model, opened but not read (docs/spec/statistics.md, S10).

    content: the file's own header. tensors: its sums, by key. foreign: names of the model's tensors whose values are not those
    that the statistics were collected with; only tensors of which the file says something are looked at.
    """

    path: str
    content: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelHeader:
    """A model, opened but not read. config is its config.json, empty where there is none; tokens is its tokenizer's."""

    reference: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    tokens: Tokens | None = None
    statistics: StatisticsHeader | None = None


@dataclass(frozen=True)
class Source:
    """A tensor of one input: `model` is an index into `MergeRecipe.models`. rows: where they are not as they are stored."""

    model: int
    tensor: str
    rows: Rows | None = None


# What a row is where it is no model's (docs/spec/rows.md, V4 and V5).
ZERO, MEAN, PADDING = -1, -2, -3


@dataclass(frozen=True, eq=False, repr=False)
class Rows:
    """What the rows of a tensor are made of for one model, so that they are rows of the result's tokens (docs/spec/rows.md).

    shape, dtype: as they are read. tensors: where rows may come from, as they are stored. places: (tensors, rows), each
    tensor's own row for every row here, -1 where it has none. choice: for every row an index into `tensors`, or ZERO, MEAN (of
    all tensors that have it) or PADDING (the mean of all rows that are none).
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


@dataclass(frozen=True)
class SolveOptions:
    """How a method with statistics merges one tensor (docs/spec/mats.md).

    method: "mats", "regmean" or "fisher". init: "average", "zero", "task_arithmetic", "ties", or "given": the task's base, whatever it is.
    init_options: of `pymerge.mats`. options: the op's other keyword arguments. output_grams: None uses them where they are.
    """

    method: str
    init: InitName | Literal["given"]
    init_options: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    output_grams: bool | None = None


@dataclass(frozen=True)
class TensorTask:
    """How one output tensor is made.

    sources: the fine-tuned tensors in model order; as many as `options` has weights.
    base: the base's tensor, or None where the method has no base (docs/spec/ties.md, T1).
    options: the parameters for this very tensor; None copies sources[0] bit for bit.
    method: for reports only ("ties", "linear", "passthrough").
    key_name: the tensor name that keys the random mask (T8); None takes `name`.
    solve: for a tensor that has statistics; then the fields above say what to do with one that has none
        (`options` None copies the base, the initialisation).
    """

    name: str
    sources: tuple[Source, ...]
    base: Source | None
    options: TiesOptions | None
    method: str
    key_name: str | None = None
    solve: SolveOptions | None = None


@dataclass(frozen=True)
class MergeRecipe:
    """What a configuration resolves to, before any file is opened.

    models: references (folder, file or hub id), each once.
    base: index into `models` of the base model, also where the method does not subtract it; None without one.
    tasks: called with the header of every model; gives the tasks in the order of the output's tensors. Takes
        names from the base (else the first model); the planner reports sources that do not exist, names and
        shapes that differ, and what to do with integer tensors. May raise ConfigError.
    dtype, out_dtype: torch dtype names or None. The output has out_dtype, else dtype, else each tensor its
        base's (else its first source's) dtype.
    tokenizer: index of the model whose tokenizer the result has, to whose ids rows are moved (docs/spec/rows.md); None copies the
        files of the base, else of the first model, and moves nothing.
    pad_to_multiple_of: of the number of rows, where a tokenizer is given.
    chat_template: a Jinja text to write instead of the copied one.
    sliced: True where layers were taken apart, so that some input tensors are left out on purpose.
    num_layers: number of layers of the output where `sliced`, for its config.json.
    non_finite: "error" or "allow", of tensors that are copied; others have it in their options.
    text: the recipe as YAML, for the model card and the manifest.
    statistics: a statistics file for each of `models`, None for a model without; empty where the method takes none.
    """

    models: tuple[str, ...]
    base: int | None
    method: str
    tasks: Callable[[Sequence[ModelHeader]], Sequence[TensorTask]]
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: int | None = None
    pad_to_multiple_of: int = 1
    chat_template: str | None = None
    sliced: bool = False
    num_layers: int | None = None
    non_finite: str = "error"
    text: str = ""
    statistics: tuple[str | None, ...] = ()
