"""Tensors that not all models have (docs/checkpoints.md): copied, left out, or an error. Reads
headers only.

What the base (else the first model) has is copied from it; what only others have is left out. This
is meant for heads, poolers and other parts that a model can do without, so it applies only while
the tensors that all models share are more than half of every model. A tensor inside layers that the
other model has too is an error: it would make them layers of another kind.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pymerge.checkpoint.types import ModelHeader, Source, TensorInfo
from pymerge.dtypes import elements
from pymerge.messages.arguments import argument
from pymerge.messages.words import counted, some_names
from pymerge.planning.missing_names import BY_PREFIX, in_common
from pymerge.planning.vocabulary import EMBEDDINGS, HEADS, IN_LAYER
from pymerge.recipe.layers import Layers, layer_count
from pymerge.recipe.model import MergeRecipe, TensorTask

Tensors = Mapping[str, TensorInfo]
Config = Mapping[str, object]

# Constants that some library versions store and others compute, by whole parts of the name:
# `h.0.attn.c_attn.bias` is a weight.
_CONSTANTS = (
    "inv_freq",
    "original_inv_freq",
    "cos_cached",
    "sin_cached",
    "rope.freqs",
    "attn.bias",
    "attn.masked_bias",
    "attention.masked_bias",
    "position_ids",
    "token_type_ids",
    "relative_position_index",
    "attn_mask",
    "num_batches_tracked",
    "_float_tensor",
)
# Buffers that training updates beside the weights, or that serving adds to them: some tools save a
# model without.
_BUFFERS = (
    ".e_score_correction_bias",
    ".expert_bias",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".prob_scale",
)
# Averages of a model's weights over its training, beside these.
_AVERAGES = ("model_ema.", "ema_model.", "ema.")
_MASKS = ("attention.bias",)  # with three dimensions or more; else a weight
# Copies that files hold or not, whatever the config says: an end of a name, and that of the tensor
# beside it which is meant.
_SHARED = "shared.weight"
_COPIES = {
    "encoder.embed_tokens.weight": _SHARED,
    "decoder.embed_tokens.weight": _SHARED,
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}
# Output layers, which the config may tie to the embedding.
_OUTPUTS = (
    *HEADS,
    "proj_out.weight",
    "lm_head.decoder.weight",
    "vocab_projector.weight",
    "generator_lm_head.weight",
    "lm_loss.weight",
)
_CONSTANT_ENDS, _MASK_ENDS, _OUTPUT_ENDS = (
    tuple(f".{end}" for end in ends) for ends in (_CONSTANTS, _MASKS, _OUTPUTS)
)


def is_constant(name: str, shape: Sequence[int] = ()) -> bool:
    """Whether libraries compute this tensor where it is not stored."""
    dotted = f".{name}"
    return dotted.endswith(_CONSTANT_ENDS) or (len(shape) > 2 and dotted.endswith(_MASK_ENDS))


def is_output(name: str) -> bool:
    """Whether a tensor is an output layer over the vocabulary."""
    return f".{name}".endswith(_OUTPUT_ENDS) and not IN_LAYER.search(name)


def ties(config: Config) -> bool | None:
    """Whether a config ties the output layer to the embedding; None where it does not say."""
    value = config.get("tie_word_embeddings")
    nested = config.get("text_config")
    if value is None and isinstance(nested, Mapping):
        value = nested.get("tie_word_embeddings")
    return value if isinstance(value, bool) else None


def embedding(tensors: Iterable[str], *, of: str = "") -> str | None:
    """The embedding of the tokens, by the usual names. of: the output layer whose it is: a model of
    several has several, and each its own beside it, in the same module.
    """
    end = next((end for end in _OUTPUT_ENDS if f".{of}".endswith(end)), "")
    module = f".{of}".removesuffix(end).removeprefix(".") if end else ""
    inside = f"{module}." if module else ""
    names = [
        name
        for name in tensors
        if name != of and name.endswith(EMBEDDINGS) and name.startswith(inside)
    ]
    usual = [name for suffix in EMBEDDINGS for name in names if name.endswith(suffix)]
    return max(usual, key=lambda name: _modules_in_common(name, of), default=None)


def _modules_in_common(one: str, other: str) -> int:
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def tied_to(name: str, header: ModelHeader, like: ModelHeader | None = None) -> str | None:
    """The tensor that `name` is a copy of, in a model that stores one of the two.

    like: a model that is asked which tensors are tied where the model itself does not say, because
        it stores the two as one memory, or by its config.
    """
    tensors = header.tensors
    layer = IN_LAYER.search(name)  # of which nothing may stand for another one
    if name in header.shared and not layer:
        return header.shared[name]
    if like is not None and name not in tensors and not layer:
        first = like.shared.get(name, name)
        tied = [first, *(each for each, owner in like.shared.items() if owner == first)]
        outside = (each for each in tied if not IN_LAYER.search(each))
        held = next((each for each in outside if each in tensors), None)
        if held is not None:
            return held
    dotted = f".{name}"
    for end, other in _COPIES.items():
        if dotted.endswith(f".{end}"):
            meant = name.removesuffix(end) + other
            return meant if meant in tensors else None
    if dotted.endswith(f".{_SHARED}") and not IN_LAYER.search(name):
        ends = [end for end, other in _COPIES.items() if other == _SHARED]
        copies = (name.removesuffix(_SHARED) + end for end in ends)
        return next((copy for copy in copies if copy in tensors), None)
    said = ties(header.config)
    if said is None and like is not None:
        said = ties(like.config)
    if is_output(name) and said is not False:
        return embedding(tensors, of=name)
    return None


class Coverage:
    """Finds the inputs of tasks, and collects the tensors that some models lack.

    reference: index of the model that gives the names. notes: grows as tensors are found.
    """

    def __init__(self, recipe: MergeRecipe, headers: Sequence[ModelHeader]) -> None:
        self.notes: list[str] = []
        self._recipe = recipe
        self._headers = headers
        self._index = recipe.base or 0
        self._reference = headers[self._index]
        self._missing: dict[int, list[str]] = {}
        self._copied: dict[str, Source] = {}  # tensor that some models lack -> its source
        self._nowhere = False  # whether a task asks for a tensor that no model has
        self._constants: dict[str, list[str]] = {}
        self._used: dict[int, set[str]] = defaultdict(set)
        self._merged: dict[int, set[str]] = defaultdict(set)

    def use(self, source: Source) -> None:
        """A task asks for this tensor, whether or not it exists."""
        self._used[source.model].add(source.tensor)

    def find(self, source: Source) -> Source | None:
        """The source itself, or the tensor that it is a tied copy of; None where the model has
        neither.
        """
        self.use(source)
        header = self._headers[source.model]
        if source.tensor in header.tensors:
            return source
        alias = tied_to(source.tensor, header, self._reference)
        if alias is None:
            return None
        found = Source(source.model, alias)
        self.use(found)
        self.notes.append(f"{header.reference} has no {source.tensor}; its tied {alias} is taken")
        return found

    def complete(self, sources: Iterable[Source]) -> None:
        """All of these exist and are merged with one another."""
        for source in sources:
            self._merged[source.model].add(source.tensor)

    def instead(
        self, task: TensorTask, resolved: Sequence[Source | None], base: Source | None
    ) -> Source | None:
        """What is copied where an input is missing; None where no model has the tensor."""
        own = Source(self._index, task.name)
        present = [source for source in (base, *resolved) if source is not None]
        if not self._recipe.sliced and own.tensor in self._reference.tensors:
            present.insert(0, own)
        present.sort(key=lambda source: source.model != self._recipe.base)
        asked = [*task.sources, *([] if task.base is None else [task.base])]
        found = [*resolved, *([] if task.base is None else [base])]
        lacking = [a for a, f in zip(asked, found, strict=True) if f is None]
        if present:
            shape = self._headers[present[0].model].tensors[present[0].tensor].shape
            if is_constant(task.name, shape):
                reference = self._headers[present[0].model].reference
                self._constants.setdefault(reference, []).append(task.name)
                return present[0]
            self._copied[task.name] = present[0]
        self._nowhere |= not present
        for source in lacking:
            self._missing.setdefault(source.model, []).append(source.tensor)
        return present[0] if present else None

    def finish(self) -> tuple[list[str], list[str]]:
        """(problems, notes) on tensors that not all models have."""
        problems, notes = [], self.notes
        unused = {} if self._recipe.in_parts else self._unused(notes)
        missing = {m: list(dict.fromkeys(names)) for m, names in sorted(self._missing.items())}
        shares = self._shares() if missing or unused else {}
        too_little = {model: share for model, share in shares.items() if share <= 0.5}
        refused = bool(
            self._recipe.strict
            or self._nowhere
            or too_little
            or any(
                self._essential(n, self._reference, self._headers[m]) for m, n in missing.items()
            )
            or any(self._essential(n, self._headers[m], self._reference) for m, n in unused.items())
        )
        reference = self._reference
        copied: dict[str, set[str]] = {}  # tensors -> models that lack them
        for model, names in missing.items():
            header = self._headers[model]
            if not refused:
                for name in names:
                    copied.setdefault(name, set()).add(header.reference)
                continue
            common = in_common(names, reference.tensors, header.tensors, header.reference)
            problems.append(
                f"model {header.reference} lacks {counted(len(names), 'tensor')} that the merge"
                " needs (as"
                f" {reference.reference} has {'it' if len(names) == 1 else 'them'}):"
                f" {some_names(names)}{common}{self._why(too_little, common)}"
            )
        for model, names in unused.items():
            header = self._headers[model]
            lost = names if refused else [name for name in names if self._own_output(name)]
            left = [name for name in names if name not in set(lost)]
            if left:
                notes.append(
                    f"{counted(len(left), 'tensor')} of {header.reference} that"
                    f" {reference.reference} lacks"
                    f" {'is' if len(left) == 1 else 'are'} left out: {some_names(left)}"
                )
            if lost:
                common = own_output(header.reference, reference.reference)
                if refused:
                    others = reference.tensors
                    common = in_common(lost, header.tensors, others, reference.reference)
                problems.append(
                    f"model {header.reference} has {counted(len(lost), 'tensor')} that"
                    f" {reference.reference}"
                    f" lacks: {some_names(lost)}{common}{self._why(too_little, common)}"
                )
        self._note_copied(copied, notes)
        for owner, names in self._constants.items():
            notes.append(
                f"{counted(len(names), 'constant')} missing from some models"
                f" {'is' if len(names) == 1 else 'are'} copied from {owner}:"
                f" {some_names(names)}"
            )
        return problems, notes

    def _unused(self, notes: list[str]) -> dict[int, list[str]]:
        """Tensors that models other than the reference have and no task uses. Those that are
        computed or stored elsewhere too are noted here and left out.
        """
        found = {}
        for model, used in sorted(self._used.items()):
            header = self._headers[model]
            names = [name for name in header.tensors if name not in used]
            harmless = {n for n in names if self._is_extra(n, header)}
            if harmless:
                listed = some_names(name for name in names if name in harmless)
                notes.append(f"left out of the merge, from {header.reference}: {listed}")
            if len(harmless) < len(names):
                found[model] = [name for name in names if name not in harmless]
        return found

    @staticmethod
    def _is_extra(name: str, header: ModelHeader) -> bool:
        """Whether a model computes this tensor, or stores a tied copy of it."""
        shape = header.tensors[name].shape
        if is_constant(name, shape):
            return True
        alias = tied_to(name, header)
        return alias is not None and header.tensors[alias].shape == shape

    def _shares(self) -> dict[int, float]:
        """For each model, the share of its elements in tensors that all models have."""
        shares = {}
        for model, used in self._used.items():
            header = self._headers[model]
            merged = self._merged.get(model, set())
            counted_names = (
                used & header.tensors.keys() if self._recipe.in_parts else header.tensors
            )
            whole = [
                name
                for name in counted_names
                if not name.startswith(_AVERAGES)
                and (name in merged or not self._is_extra(name, header))
            ]
            total = sum(elements(header.tensors[name].shape) for name in whole)
            common = sum(elements(header.tensors[name].shape) for name in whole if name in merged)
            shares[model] = common / total if total else 1.0
        return shares

    def _essential(self, names: Sequence[str], having: ModelHeader, lacking: ModelHeader) -> bool:
        """Whether some of `names` are inside layers of a list that the other model has layers of
        too: the models differ in depth or in the kind of layers.

        Layers beyond those that the config counts (for multi-token prediction) do not matter, nor
        do buffers that the other model was saved without.
        """
        layers, others = Layers(having.tensors), Layers(lacking.tensors)
        end = layer_count(having.config)
        for name in names:
            if self._recipe.sliced and IN_LAYER.search(name):
                return True
            place = layers.place(name) if name in having.tensors else None
            if place is None or place.stack not in others.counts:
                continue
            beyond = end is not None and place.index >= end
            buffer = having is self._reference and name.endswith(_BUFFERS)
            if not beyond and not buffer:
                return True
        return False

    def _own_output(self, name: str) -> bool:
        """Whether this is a separate output layer where the reference's is its embedding."""
        reference = self._reference
        return (
            is_output(name)
            and ties(reference.config) is not False
            and embedding(reference.tensors, of=name) is not None
        )

    def _why(self, too_little: Mapping[int, float], common: str) -> str:
        if self._recipe.strict:
            return (
                f"; {argument('strict', True)} asks for the same tensors in all models; without it"
                " what not all have is copied from the base, or left out"
            )
        if not too_little or BY_PREFIX in common:
            return ""
        model = min(too_little, key=lambda m: too_little[m])
        return (
            f"; what all models have is {too_little[model]:.0%} of"
            f" {self._headers[model].reference}: only where it is more than half of every model,"
            " the rest is copied from the base or left out"
        )

    def _note_copied(self, copied: Mapping[str, set[str]], notes: list[str]) -> None:
        groups: dict[tuple[str, bool, str], list[str]] = {}
        for name, lacking in copied.items():
            index = self._copied[name].model if name in self._copied else self._index
            key = (some_names(sorted(lacking)), len(lacking) == 1, self._headers[index].reference)
            groups.setdefault(key, []).append(name)
        for (models, one, owner), names in groups.items():
            lack = "lacks" if one else "lack"
            notes.append(
                f"{counted(len(names), 'tensor')} of {owner} that {models} {lack}"
                f" {'is' if len(names) == 1 else 'are'} copied: {some_names(names)}"
            )


def own_output(model: str, base: str) -> str:
    """The way out where the result would lose an output layer."""
    return (
        f"; {model} has trained an output layer of its own (tie_word_embeddings is false in its"
        f" config), and that of {base} is its embedding; give {base} one too (transformers:"
        " config.tie_word_embeddings = False, lm_head.weight a copy of the embedding), or tie that"
        f" of {model}"
    )
