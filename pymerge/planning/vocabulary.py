"""Whether models may be averaged row by row: does an id mean the same token in all of them?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pymerge.checkpoint.tokens import Tokens

HEADS = ("lm_head.weight", "cls.predictions.decoder.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "shared.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
# Further tensors with a row a token (docs/spec/rows.md, V6).
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
# Slots that a vocabulary keeps free: a fine-tune that gives one a name has trained its row, and
# moved no other.
_RESERVED = re.compile(r"[\[<].*(unused|reserved|extra_id|control|special|placeholder|dummy)", re.I)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor's rows are those of the tokens. Nothing within a layer is: experts may be
    called "shared".
    """
    named = name.endswith(EMBEDDINGS + HEADS + _OTHERS) or name == "output.weight"
    return named and not IN_LAYER.search(name)


@dataclass(frozen=True)
class Differences:
    """Between two vocabularies, as texts to be shown.

    moved: ids that mean different ordinary tokens, so that rows of different meaning would be
    averaged. renamed: ids whose tokens differ but are added ones or reserved slots, or where an
    added token replaces one that the other lacks.
    more: tokens that the other has at ids without one here.
    """

    moved: tuple[str, ...]
    renamed: tuple[str, ...]
    more: tuple[str, ...]


def differences(chosen: Tokens, other: Tokens, rows: int | None) -> Differences:
    """What the ids of `other` mean beside those of `chosen`, as far as there are rows for them."""
    here = {number: token for token, number in chosen.ids.items()}
    moved: list[str] = []
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
            # An added token took the place of one that is gone, or that is its second name: the row
            # was given up, no other moved.
            stayed = other.ids.get(mine, number) == number
            gave_way = any(added) and stayed and token not in chosen.ids
            (renamed if all(added) or free or gave_way else moved).append(text)
    return Differences(tuple(moved), tuple(renamed), tuple(more))


def compare(
    chosen: int, tokens: Mapping[int, Tokens | None], names: Sequence[str], rows: int | None
) -> tuple[list[str], list[str]]:
    """(notes, problems) of models whose rows are merged under the tokenizer of model `chosen`.

    tokens: of every model that gives rows, and of the chosen one. What has no tokenizer is not
    compared. rows: of the embedding, None where they are not known.
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
        if found.moved:
            problems.append(
                f"tokenizers differ: {_count(found.moved, 'id')} of {names[chosen]} and"
                f" {names[index]} {'means' if len(found.moved) == 1 else 'mean'} different tokens"
                f" (id {_some(found.moved)}), so that averaging would mix rows of different tokens;"
                " give tokenizer_source (base, or a model), which moves every model's rows to that"
                " tokenizer's ids"
            )
        elif found.renamed:
            one = len(found.renamed) == 1
            notes.append(
                f"{_count(found.renamed, 'added or reserved token')}"
                f" {'differs' if one else 'differ'} between {pair} (id {_some(found.renamed)});"
                f" {'its row is' if one else 'their rows are'} merged, and the tokenizer is that of"
                f" {names[chosen]}"
            )
        if found.more:
            notes.append(
                f"{names[index]} has {_count(found.more, 'token')} more than {names[chosen]}, whose"
                f" tokenizer the result gets (id {_some(found.more)}); tokenizer_source chooses"
                " another"
            )
    return notes, problems


def beyond(
    tokens: Tokens | None, rows: int, own: int | None, name: str
) -> tuple[list[str], list[str]]:
    """(notes, problems) where the tokenizer gives ids that the embedding of the result has no row
    for.

    own: rows of the embedding of the tokenizer's model. Where it lacks them too, as Gemma 3's text
    models lack the image token, nothing is lost by the merge.
    """
    if tokens is None or tokens.fits(rows):
        return [], []
    outside = [f"{number} is {token!r}" for token, number in tokens.ids.items() if number >= rows]
    what = f"the tokenizer of {name} has {_count(outside, 'id')} that the embedding"
    if own is not None and own <= rows:
        return [f"{what} of its own model, with {own} rows, lacks too (id {_some(outside)})"], []
    return [], [
        f"{what} of the result, with {rows} rows, lacks (id {_some(outside)}); name a model as"
        " tokenizer_source, and rows are moved to the ids of its tokenizer"
    ]


def _count(texts: Sequence[str], noun: str) -> str:
    return f"{len(texts)} {noun}" + ("" if len(texts) == 1 else "s")


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")
