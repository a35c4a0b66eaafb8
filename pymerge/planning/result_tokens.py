"""Which tokens the result's tokenizer has, and their ids: those of the model that the recipe names,
of the union, and single ones that the recipe adds (docs/spec/rows.md, V1, V9 and V10). Reads no
tensor data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pymerge.checkpoint.tokens import AddedToken, Tokens
from pymerge.checkpoint.types import ModelHeader
from pymerge.errors import MismatchError
from pymerge.planning.plan import TokenizerChanges
from pymerge.planning.vocabulary import is_vocabulary, some_tokens
from pymerge.recipe.model import MergeRecipe


@dataclass(frozen=True)
class ResultTokens:
    """The tokens of the result.

    ids: of all tokens that have a row. own: how many ids, from 0 on, are those of the model that
        `MergeRecipe.tokenizer` names. changes: to that model's files; None leaves them as they are.
    """

    ids: dict[str, int]
    own: int
    changes: TokenizerChanges | None
    notes: tuple[str, ...]


def result_tokens(headers: Sequence[ModelHeader], recipe: MergeRecipe) -> ResultTokens:
    """Raises MismatchError where the tokenizer has no row at all, or where tokens would have to be
    added to files to which that is impossible.
    """
    header = headers[recipe.tokenizer or 0]
    tokens = header.tokens
    if tokens is None:
        named = "the union of tokenizers starts from" if recipe.union else "tokenizer_source names"
        raise MismatchError(
            f"{named} {header.reference}, which has no tokenizer files; name a model that has as"
            " tokenizer_source, or leave it out"
        )
    largest = max(map(vocabulary_rows, headers))  # bounds what a damaged id could ask for
    if not largest:
        _check_nothing_to_add(headers, recipe, tokens)
        return ResultTokens({}, 0, None, ())
    # A tokenizer without a model may have ids up to the rows of the largest model plus its tokens.
    rows = vocabulary_rows(header) or largest + len(tokens.ids)
    outside = [t for t, number in tokens.ids.items() if number >= rows]
    ids = {t: number for t, number in tokens.ids.items() if number < rows}
    own = 1 + max(ids.values(), default=-1)
    if not own:
        raise MismatchError(
            f"tokenizer_source names {header.reference}, whose own model has no row for any id of"
            f" its tokenizer: {rows} rows, and the lowest id is"
            f" {min(tokens.ids.values(), default=0)}; name another model"
        )
    added = _added(headers, recipe, tokens, ids)
    notes = []
    if outside:
        notes.append(
            f"the tokenizer of {header.reference} has {some_tokens(outside)} without a row in its"
            " own model; the result has none either"
        )
    if not added:
        return ResultTokens(ids, own, None, tuple(notes))
    _check_growing(header.reference, tokens, ids)
    new = [each for each in added if each.content not in ids]
    ids |= {each.content: own + i for i, each in enumerate(new)}
    if new:
        words = some_tokens([each.content for each in new])
        notes.append(f"{words} added to the tokenizer of {header.reference}")
    changes = TokenizerChanges(
        tuple((each, ids[each.content]) for each in added), frozenset(outside)
    )
    return ResultTokens(ids, own, changes, tuple(notes))


def _added(
    headers: Sequence[ModelHeader], recipe: MergeRecipe, tokens: Tokens, ids: Mapping[str, int]
) -> list[AddedToken]:
    """Added tokens that the tokenizer's files lack, new ones in the order of their ids; one whose
    content is a trained token of the files keeps that token's id.
    """
    trained: dict[str, None] = {}
    added: dict[str, AddedToken] = {}
    for each, limit in _united(headers, tokens) if recipe.union else ():
        listed = each.added
        here = {t: number for t, number in each.ids.items() if not limit or number < limit}
        lacked = (token for token in here if token not in ids or token in listed)
        for token in sorted(lacked, key=here.__getitem__):
            if token in listed:
                added.setdefault(token, listed[token])
            else:
                trained[token] = None
    found = {token: AddedToken(token) for token in trained if token not in added}
    known = {token for token in tokens.added if token in ids}
    found |= {t: flags for t, flags in added.items() if t not in known}
    for row in recipe.tokens:
        if row.token not in ids:
            found.setdefault(row.token, AddedToken(row.token))
    return list(found.values())


def _united(headers: Sequence[ModelHeader], first: Tokens) -> Iterator[tuple[Tokens, int]]:
    """Each tokenizer of the union once, `first` at the front, with the rows of its model; 0 where
    these are not known.
    """
    rows: dict[Tokens, int] = {}
    for header in headers:
        if header.tokens is not None:
            rows[header.tokens] = max(rows.get(header.tokens, 0), vocabulary_rows(header))
    yield first, rows.pop(first)
    yield from rows.items()


def _check_nothing_to_add(
    headers: Sequence[ModelHeader], recipe: MergeRecipe, tokens: Tokens
) -> None:
    lacking = [row.token for row in recipe.tokens if row.token not in tokens.ids]
    for each, _ in _united(headers, tokens) if recipe.union else ():
        lacking += [token for token in each.ids if token not in tokens.ids]
    if lacking:
        raise MismatchError(
            f"{some_tokens(list(dict.fromkeys(lacking)))} would be added to the tokenizer, but by"
            " its name no tensor of the models has a row for each token; leave tokenizer out"
        )


def _check_growing(reference: str, tokens: Tokens, ids: Mapping[str, int]) -> None:
    """V9: the tokenizers library gives added tokens the ids from the number of tokens on, whatever
    a file says.
    """
    if not tokens.fast:
        raise MismatchError(
            f"tokens are added to the tokenizer of {reference}, which takes a tokenizer.json; save"
            " it as one (transformers: AutoTokenizer)"
        )
    count = 1 + max(ids.values(), default=-1)
    if len(ids) != count:
        raise MismatchError(
            f"tokens are added to the tokenizer of {reference}, whose {len(ids)} tokens do not have"
            f" the ids 0 to {len(ids) - 1}, each once, so that none can be given to another; choose"
            " another tokenizer_source, or rename the tokens of free ids in all models"
        )


def vocabulary_rows(header: ModelHeader) -> int:
    """Rows of the largest vocabulary tensor; 0 where no tensor is one by its name."""
    return max(vocabulary_sizes(header), default=0)


def vocabulary_sizes(header: ModelHeader) -> set[int]:
    named = (info for name, info in header.tensors.items() if is_vocabulary(name) and info.shape)
    return {info.shape[0] for info in named}
