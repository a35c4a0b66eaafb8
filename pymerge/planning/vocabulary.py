"""Which tensors have one row per token, and whether an id means the same token in all models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pymerge.checkpoint.tokens import Tokens
from pymerge.messages.words import counted

HEADS = ("lm_head.weight", "cls.predictions.decoder.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "shared.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
# Further tensors with one row per token (docs/spec/rows.md, V6).
_OTHERS = (
    "lm_head.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "lm_head.linear.weight",
    "lm_head.linear.bias",
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
    "embed_out.bias",
    "vocab_projector.weight",
    "vocab_projector.bias",
    "transformer.output_layer.weight",
    "backbone.embeddings.weight",
)
IN_LAYER = re.compile(r"\.\d+\.")
_SHOWN = 4
# Slots that a vocabulary keeps free. A fine-tune that names one has trained that row; every other
# row still means the same token.
_RESERVED = re.compile(r"[\[<].*(unused|reserved|extra_id|control|special|placeholder|dummy)", re.I)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token. Tensors inside layers never count: experts may be
    called "shared".
    """
    named = name.endswith(EMBEDDINGS + HEADS + _OTHERS) or name == "output.weight"
    return named and not IN_LAYER.search(name)


@dataclass(frozen=True)
class Differences:
    """How two vocabularies differ; each entry is a text such as `7 is 'a' and 'b'`.

    conflicting: ids that mean different ordinary tokens, so that averaging would mix their rows.
    renamed: ids whose tokens differ, but both are added ones, one is a reserved slot, or an added
        token replaced one that the other vocabulary lacks.
    more: tokens of the other vocabulary at ids that have none here.
    """

    conflicting: tuple[str, ...]
    renamed: tuple[str, ...]
    more: tuple[str, ...]


def differences(chosen: Tokens, other: Tokens, rows: int | None) -> Differences:
    """How `other` differs from `chosen`, over the ids below `rows` (None: all)."""
    here = {number: token for token, number in chosen.ids.items()}
    conflicting: list[str] = []
    renamed: list[str] = []
    more: list[str] = []
    for token, number in other.ids.items():
        if rows is not None and number >= rows:
            continue
        mine = here.get(number)
        if mine is None:
            if token not in chosen.ids:
                more.append(f"{number} is {token!r}")
        elif mine != token and chosen.ids.get(token) != number:
            text = f"{number} is {mine!r} and {token!r}"
            added = (mine in chosen.added, token in other.added)
            free = _RESERVED.match(mine) or _RESERVED.match(token)
            # An added token replaced one that is gone, or is a second name of it: only this row
            # changed its meaning.
            stayed = other.ids.get(mine, number) == number
            gave_way = any(added) and stayed and token not in chosen.ids
            (renamed if all(added) or free or gave_way else conflicting).append(text)
    return Differences(tuple(conflicting), tuple(renamed), tuple(more))


def compare(
    chosen: int, tokens: Mapping[int, Tokens | None], names: Sequence[str], rows: int | None
) -> tuple[list[str], list[str]]:
    """(notes, problems) of models whose rows are merged under the tokenizer of model `chosen`.

    tokens: of every model that gives rows, and of the chosen one; models without a tokenizer are
        not compared. rows: of the embedding; None where unknown.
    """
    notes: list[str] = []
    problems: list[str] = []
    mine = tokens[chosen]
    for index, other in sorted(tokens.items()):
        if mine is None or other is None or other is mine:
            continue
        pair = f"{names[chosen]} and {names[index]}"
        if not (mine.known and other.known):
            if not (mine.pieces and other.pieces):
                notes.append(
                    f"the tokenizers of {pair} are files of different kinds; they are not compared"
                )
            elif mine.pieces != other.pieces:
                problems.append(
                    f"the SentencePiece files of {pair} differ, so that rows of their embeddings"
                    " may be different tokens; save the tokenizers as tokenizer.json"
                    " (transformers: AutoTokenizer), which can be compared"
                )
            continue
        found = differences(mine, other, rows)
        if found.conflicting:
            problems.append(
                f"tokenizers differ: {counted(len(found.conflicting), 'id')} of {names[chosen]} and"
                f" {names[index]} {'means' if len(found.conflicting) == 1 else 'mean'} different"
                " tokens"
                f" (id {_some(found.conflicting)}), so that averaging would mix rows of different"
                " tokens; give tokenizer_source (base, union, or a model), which moves every"
                " model's rows to that tokenizer's ids"
            )
        elif found.renamed:
            one = len(found.renamed) == 1
            notes.append(
                f"{counted(len(found.renamed), 'added or reserved token')}"
                f" {'differs' if one else 'differ'} between {pair} (id {_some(found.renamed)});"
                f" {'its row is' if one else 'their rows are'} merged, and the tokenizer is that of"
                f" {names[chosen]}"
            )
        if found.more:
            notes.append(
                f"{names[index]} has {counted(len(found.more), 'token')} more than {names[chosen]},"
                " whose"
                f" tokenizer the result gets (id {_some(found.more)}); tokenizer_source chooses"
                " another"
            )
    return notes, problems


def beyond(
    tokens: Tokens | None, rows: int, own: int | None, name: str
) -> tuple[list[str], list[str]]:
    """(notes, problems) on ids of the tokenizer for which the result's embedding has no row.

    own: rows of the embedding of the tokenizer's own model. Where that lacks them too, as Gemma 3's
        text models lack the image token, the merge loses nothing.
    """
    if tokens is None or tokens.fits(rows):
        return [], []
    outside = [f"{number} is {token!r}" for token, number in tokens.ids.items() if number >= rows]
    what = f"the tokenizer of {name} has {counted(len(outside), 'id')} that the embedding"
    if own is not None and own <= rows:
        return [f"{what} of its own model, with {own} rows, lacks too (id {_some(outside)})"], []
    return [], [
        f"{what} of the result, with {rows} rows, lacks (id {_some(outside)}); name a model as"
        " tokenizer_source, and rows are moved to the ids of its tokenizer"
    ]


def some_tokens(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN])) + (", ..." if len(tokens) > _SHOWN else "")
    return f"{counted(len(tokens), 'token')} ({shown})"


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")
