"""Matches the tensors of models that name the same tensors differently. Reads headers only.

The names of the same weights depend on the class that saved them (`transformer.h.0...` and
`h.0...`), on what wrapped the module in training (`module.`, `_orig_mod.`), and on the release of
transformers (`language_model.model.` and `model.language_model.`). A model's names are matched with
those of the base, else of the first model, in this order: equal names; one prefix that is removed
from, added to or replaced in all names; known conversions, with one prefix or none. A later way is
taken where it matches more elements. Matching tensors must have equal shapes and be more than half
of the elements of both models, and no other prefix may match as much.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pymerge.checkpoint.types import ModelHeader, Rows, Source, TensorInfo
from pymerge.dtypes import elements
from pymerge.messages.prefixes import are_never_matched, majority_prefixes
from pymerge.messages.words import counted
from pymerge.planning.plan import PlannedTensor

if TYPE_CHECKING:
    from pymerge.planning.experts import Experts

Tensors = Mapping[str, TensorInfo]

# Applied in this order to the names of both models, whose results are then compared. A converted
# name need not be any model's name.
_CONVERSIONS = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        # Wrappers of modules: torch.compile, FSDP, activation checkpointing.
        (r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+", r"\1"),
        # peft's, around the layers of a model whose adapter was not taken off.
        (r"\.base_layer\.(?=weight$|bias$)", "."),
        (r"\.modules_to_save\.default\.", "."),
        # Language models with vision or audio, before and since transformers 4.52.
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (
            r"^(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|image_newline)"
            r"(?=\.|$)",
            r"model.\1",
        ),
        (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
        # transformers 5, where names in `state_dict` differ from those in the files that it writes.
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.mlp\.router\.(?:layer\.)?weight$", ".mlp.gate.weight"),
        (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"^embed_out\.", "lm_head."),
        (r"\bencoder\.layer\.(?=\d)", "layers."),
        (r"\battention\.(?:attention|self)\.(query|key|value)\.", r"attention.\1."),
        (
            r"(?:\battention\.)?(?:\battention\.|\bself\.)?(?:\brelative_position_bias\.)?"
            r"\brelative_position_bias_table$",
            "relative_position_bias_table",
        ),
        (r"\binterpolation\.(?=mid_position_embeddings$)", ""),
        (r"\battention\.q_proj\.", "attention.query."),
        (r"\battention\.k_proj\.", "attention.key."),
        (r"\battention\.v_proj\.", "attention.value."),
        (r"\battention\.output\.dense\.", "attention.o_proj."),
        (r"\bintermediate\.dense\.", "mlp.fc1."),
        (r"(?<=\d\.)output\.dense\.", "mlp.fc2."),
        # TensorFlow's names of normalisation, and torch's two of weight normalisation.
        (r"(LayerNorm)\.gamma$", r"\1.weight"),
        (r"(LayerNorm)\.beta$", r"\1.bias"),
        (r"\.weight_g$", ".parametrizations.weight.original0"),
        (r"\.weight_v$", ".parametrizations.weight.original1"),
    )
)


@dataclass(frozen=True)
class Matched:
    """Models under the names of one of them.

    headers: with tensors under those names. stored: for each model, name -> name in its files,
        where these differ. made: for each model, what to read for experts that are stored in
        another layout, by the names of `stored`. notes: for each model that was not matched by
        equal names.
    """

    headers: tuple[ModelHeader, ...]
    stored: tuple[Mapping[str, str], ...]
    made: tuple[Mapping[str, Source], ...]
    notes: tuple[str, ...]

    def stored_tensor(self, tensor: PlannedTensor) -> PlannedTensor:
        """The planned tensor with its inputs under the names in the files."""
        if not any(self.stored) and not any(self.made):
            return tensor
        return replace(
            tensor,
            sources=tuple(map(self.as_stored, tensor.sources)),
            base=None if tensor.base is None else self.as_stored(tensor.base),
            duplicates=tuple(map(self.as_stored, tensor.duplicates)),
            otherwise=None if tensor.otherwise is None else self.stored_tensor(tensor.otherwise),
        )

    def as_stored(self, source: Source) -> Source:
        """What to read for a source that is named as in `headers`."""
        rows = source.rows
        if rows is not None:
            found = tuple(self.as_stored(each) for each in rows.tensors)
            rows = Rows(rows.shape, rows.dtype, found, rows.places, rows.choice)
        name = self.stored[source.model].get(source.tensor, source.tensor)
        return self.made[source.model].get(name, Source(source.model, name, rows))


def match_names(headers: Sequence[ModelHeader], reference: int) -> Matched:
    """All models, with their tensors under the names of model `reference` as far as they match."""
    theirs = headers[reference]
    found, stored, made, notes = [], [], [], []
    for k, header in enumerate(headers):
        renamed: dict[str, str] = {}
        experts, words = None, ""
        if k != reference and header.tensors.keys() != theirs.tensors.keys():
            experts = _experts(k, header.tensors, theirs.tensors)
            if experts is not None:
                header = replace(header, tensors=experts.tensors)
                notes.append(
                    f"{header.reference} has the experts of its layers {experts.words}"
                    f" {theirs.reference}; they are read as those are"
                )
            renamed, words = _match(header.tensors, theirs.tensors)
        if renamed:
            names = {mine: renamed.get(mine, mine) for mine in header.tensors}
            tensors = {names[mine]: info for mine, info in header.tensors.items()}
            shared = {names.get(n, n): names.get(o, o) for n, o in header.shared.items()}
            header = replace(header, tensors=tensors, shared=shared)
            example = next(iter(renamed))
            notes.append(
                f"{header.reference} has other names than {theirs.reference} for"
                f" {counted(len(renamed), 'tensor')} ({example} is {renamed[example]} there); they"
                " are"
                f" matched {words}"
            )
        found.append(header)
        stored.append({its: mine for mine, its in renamed.items()})
        made.append({} if experts is None else experts.made)
    return Matched(tuple(found), tuple(stored), tuple(made), tuple(notes))


def complete_renamings(mine: Tensors, its: Tensors, needed: Iterable[str]) -> list[dict[str, str]]:
    """Every renaming, by one prefix or by known conversions, under which all that is `needed` of
    `mine` has a name of `its`: mine -> its name. Equal names come before all others.
    """
    names = [*needed]
    if all(name in its for name in names):
        return [{name: name for name in mine if name in its}]
    found: list[dict[str, str]] = []
    for one, other in ((_plain(mine), _plain(its)), (_canonical(mine), _canonical(its))):
        for renamed, _ in _ways(one, other, mine, its):
            if all(renamed.get(name, name) in its for name in names):
                matched = {name: renamed.get(name, name) for name in mine}
                matched = {name: new for name, new in matched.items() if new in its}
                if matched not in found:
                    found.append(matched)
        if found:
            break
    return found


def _experts(model: int, mine: Tensors, its: Tensors) -> Experts | None:
    """The model's experts in the other layout. Imports NumPy only if there are experts."""
    if not any(".experts." in name for name in mine):
        return None
    from pymerge.planning.experts import as_in

    return as_in(model, mine, its)


def _match(mine: Tensors, its: Tensors) -> tuple[dict[str, str], str]:
    """(mine -> its name, for names that change; a phrase on how they were matched). Empty where
    equal names match best.
    """
    best = _size(mine, its, {})
    totals = (_total(mine), _total(its))
    half = max(totals) / 2
    found: tuple[dict[str, str], str] = ({}, "")
    if best in totals:
        return found
    for ways in _comparisons(mine, its):
        sizes = [_size(mine, its, renamed) for renamed, _ in ways]
        top = max(sizes, default=0)
        if top <= max(best, half):
            continue
        first, *others_as_good = (way for way, size in zip(ways, sizes, strict=True) if size == top)
        matches = _matches(mine, its, first[0])
        if any(_matches(mine, its, renamed) != matches for renamed, _ in others_as_good):
            continue
        best, found = top, first
        if best in totals:
            break
    return found


def _comparisons(mine: Tensors, its: Tensors) -> Iterator[list[tuple[dict[str, str], str]]]:
    """The ways to compare names, later ones only where they match more: as they are, converted, and
    converted without a prefix, which hides what some conversions begin with.
    """
    yield _ways(_plain(mine), _plain(its), mine, its)
    known = "by known conversions of names"
    ones, others = _canonical(mine), _canonical(its)
    yield [
        (renamed, f"{known} and {words}" if words else known)
        for renamed, words in _ways(ones, others, mine, its)
    ]
    without: list[tuple[dict[str, str], str]] = []
    for prefix in majority_prefixes(_sizes(_plain(mine), mine)):
        if prefix:
            renamed = _renamed(_canonical(mine, prefix), others, "", "")
            without.append((renamed or {}, f"{known} and {_in_words(prefix, '')}"))
    for prefix in majority_prefixes(_sizes(_plain(its), its)):
        if prefix:
            renamed = _renamed(ones, _canonical(its, prefix), "", "")
            without.append((renamed or {}, f"{known} and {_in_words('', prefix)}"))
    yield without


def _ways(
    names: Mapping[str, str], others: Mapping[str, str], mine: Tensors, its: Tensors
) -> list[tuple[dict[str, str], str]]:
    """Every possible renaming, with a phrase on it. names, others: compared name -> stored name."""
    found: list[tuple[dict[str, str], str]] = []
    for one in majority_prefixes(_sizes(names, mine)):
        for other in majority_prefixes(_sizes(others, its)):
            if one and are_never_matched(one, other):
                continue
            renamed = _renamed(names, others, one, other)
            if renamed and not any(renamed == known for known, _ in found):
                found.append((renamed, _in_words(one, other)))
    return found


def _renamed(
    names: Mapping[str, str], others: Mapping[str, str], one: str, other: str
) -> dict[str, str] | None:
    """Stored name -> new name, where prefix `one` becomes `other` in all names that have it. A name
    that the other model has stays. None where two tensors would get one name.
    """
    renamed = {}
    result = set()
    for name, stored in names.items():
        target = stored
        if name in others:
            target = others[name]
        elif name.startswith(one):
            new = other + name.removeprefix(one)
            # Tensors that the other model lacks are renamed too, unless they were converted: a
            # converted name is not one that files have.
            target = others.get(new, new if name == stored else stored)
        if target in result:
            return None
        result.add(target)
        if target != stored:
            renamed[stored] = target
    return renamed


def _in_words(one: str, other: str) -> str:
    if one and other:
        return f"with the prefix {other!r} for {one!r}"
    if one:
        return f"without the prefix {one!r}"
    return f"with the prefix {other!r}" if other else ""


def _plain(tensors: Tensors) -> dict[str, str]:
    return {name: name for name in tensors}


def _canonical(tensors: Tensors, prefix: str = "") -> dict[str, str]:
    """Converted name, without the prefix -> name; empty where two tensors would get one name."""
    found = {}
    for name in tensors:
        new = name.removeprefix(prefix)
        for pattern, replacement in _CONVERSIONS:
            new = pattern.sub(replacement, new)
        found[new] = name
    return found if len(found) == len(tensors) else {}


def _matches(mine: Tensors, its: Tensors, renamed: Mapping[str, str]) -> dict[str, str]:
    """Tensors with equal names and shapes: a name of `mine` -> that of `its`."""
    found = {}
    for name, info in mine.items():
        other = its.get(renamed.get(name, name))
        if other is not None and other.shape == info.shape:
            found[name] = other.name
    return found


def _size(mine: Tensors, its: Tensors, renamed: Mapping[str, str]) -> int:
    return sum(elements(mine[name].shape) for name in _matches(mine, its, renamed))


def _sizes(names: Mapping[str, str], tensors: Tensors) -> dict[str, int]:
    """Elements by compared name. names: compared name -> stored name."""
    return {name: elements(tensors[stored].shape) for name, stored in names.items()}


def _total(tensors: Tensors) -> int:
    return sum(elements(info.shape) for info in tensors.values())
