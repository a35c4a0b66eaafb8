"""The recipe that a configuration resolves to, before any file is opened, and the tasks that it
makes from its models' headers.

A recipe comes from the configuration and knows no files; this module holds what the two sides share
and checks the recipe against what the headers say, every problem at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pymerge.checkpoint.types import ModelHeader, Source
from pymerge.methods._settings import Setting
from pymerge.methods._statistics import SolveOptions
from pymerge.recipe.layers import Origin
from pymerge.rules.options import OpOptions


@dataclass(frozen=True)
class TensorTask:
    """How one output tensor is made.

    sources: the fine-tuned tensors in model order; as many as `options` is for.
    base: the base's tensor, or None where the method has no base (docs/spec/ties.md, T1).
    options: the parameters for this very tensor; None copies sources[0] bit for bit.
    method: for reports only ("ties", "linear", "passthrough").
    key_name: the tensor name that keys the random mask (T8); None takes `name`.
    solve: for a tensor that has statistics; then the fields above say what to do with one that has
        none (`options` None copies the base, the initialisation).
    """

    name: str
    sources: tuple[Source, ...]
    base: Source | None
    options: OpOptions | None
    method: str
    key_name: str | None = None
    solve: SolveOptions | None = None


@dataclass(frozen=True)
class TokenRow:
    """The row that a recipe gives one token (docs/spec/rows.md, V10).

    model: index into `MergeRecipe.models` of the one that gives it; None where `zero`, or where the
        recipe names the token and no row.
    source: the model's token whose row it is, or its id; None is the token itself.
    zero: a row of zeros. force: for the models that have the token too.
    """

    token: str
    model: int | None = None
    source: str | int | None = None
    zero: bool = False
    force: bool = False


@dataclass(frozen=True)
class MergeRecipe:
    """What a configuration resolves to, before any file is opened.

    models: references (folder, file or hub id), each once.
    base: index into `models` of the base model, also where the method does not subtract it; None
        without one.
    tasks: called with the header of every model; gives the tasks in the order of the output's
        tensors. Takes names from the base (else the first model); the planner reports sources that
        do not exist, names and shapes that differ, and what to do with integer tensors. May raise
        ConfigError.
    dtype, out_dtype: torch dtype names or None; out_dtype also by filters on tensor names. The
        output has out_dtype, else dtype, else each tensor its base's (else its first source's)
        dtype.
    tokenizer: index of the model whose tokenizer the result has, to whose ids rows are moved
        (docs/spec/rows.md); None copies the files of the base, else of the first model, and moves
        nothing.
    union: whether the result's tokenizer has the tokens of all models; `tokenizer` is then that to
        which they are added.
    tokens: rows of single tokens, where a tokenizer is given.
    tokenizer_only: whether nothing else of that model is asked for, so that it needs no weights.
    pad_to_multiple_of: of the number of rows, where a tokenizer is given.
    chat_template: a Jinja text to write instead of the copied one, or "auto", the one that most of
        the models have.
    sliced: True where layers were taken apart.
    modular: True where modules are merged from other models each.
    num_layers: number of layers of the output where `sliced`, for its config.json.
    layers: where each of these comes from, the first of the models that it is merged from.
    non_finite: "error" or "allow", of tensors that are copied; others have it in their options.
    text: the recipe as YAML, for the model card and the manifest.
    statistics: a statistics file for each of `models`, None for a model without; empty where the
        method takes none.
    strict: whether tensors that not all models have are an error, however few.
    filters: (parameter, part of a tensor name) for every filter in the recipe's parameters.
    """

    models: tuple[str, ...]
    base: int | None
    method: str
    tasks: Callable[[Sequence[ModelHeader]], Sequence[TensorTask]]
    dtype: str | None = None
    out_dtype: str | Setting | None = None
    tokenizer: int | None = None
    union: bool = False
    tokens: tuple[TokenRow, ...] = ()
    tokenizer_only: bool = False
    pad_to_multiple_of: int = 1
    chat_template: str | None = None
    sliced: bool = False
    modular: bool = False
    num_layers: int | None = None
    layers: tuple[Origin, ...] = ()
    non_finite: str = "error"
    text: str = ""
    statistics: tuple[str | None, ...] = ()
    strict: bool = False
    filters: tuple[tuple[str, str], ...] = ()

    @property
    def in_parts(self) -> bool:
        """Whether some input tensors are left out on purpose."""
        return self.sliced or self.modular
