"""Token alignment: which rows of the models' embeddings and heads become which rows of the
result's, where the recipe names a tokenizer (docs/spec/rows.md). Reads no tensor data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pymerge.checkpoint.tokens import Tokens
from pymerge.checkpoint.types import MEAN, PADDING, ZERO, ModelHeader, Rows, Source, TensorInfo
from pymerge.dtypes import MERGEABLE
from pymerge.errors import MismatchError
from pymerge.messages.words import some_names
from pymerge.planning.plan import TokenizerChanges
from pymerge.planning.result_tokens import result_tokens, vocabulary_sizes
from pymerge.planning.vocabulary import EMBEDDINGS, IN_LAYER, is_vocabulary, some_tokens
from pymerge.recipe.model import MergeRecipe, TensorTask, TokenRow

if TYPE_CHECKING:
    import numpy.typing as npt

# A token, or an id without one.
Token = str | int


class VocabularyTensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def inputs(self) -> tuple[Source, ...]: ...


def open_alignment(
    headers: Sequence[ModelHeader], recipe: MergeRecipe
) -> tuple[TokenAlignment | None, list[str]]:
    """(alignment to the tokenizer that the recipe names, problems).

    The alignment is None where a tokenizer cannot be read. That is no problem where all models have
    the same SentencePiece file: their rows agree already.
    """
    chosen = recipe.tokenizer or 0
    try:
        return TokenAlignment(headers, recipe), []
    except MismatchError as error:
        mine = headers[chosen].tokens
        every = [header.tokens for header in headers if header.tokens is not None]
        equal = mine is not None and all(
            each is mine or (each.same_pieces(mine) if recipe.union else _have_pieces(each, mine))
            for each in every
        )
        return None, [] if equal and not recipe.tokens else list(error.problems)


def _have_pieces(one: Tokens, other: Tokens) -> bool:
    return bool(one.pieces) and one.pieces == other.pieces


class TokenAlignment:
    """Aligns the rows of every vocabulary tensor with the tokenizer that the recipe names.

    count: rows of the result without padding (V1). changes: to the tokenizer's files. notes,
        problems: grow as tensors are aligned.
    """

    def __init__(self, headers: Sequence[ModelHeader], recipe: MergeRecipe) -> None:
        """Raises MismatchError where a tokenizer cannot be read well enough."""
        self.problems: list[str] = []
        self._headers = headers
        self._chosen = recipe.tokenizer or 0
        self._union = recipe.union
        self._base = recipe.base
        if headers[self._chosen].tokens is not None:
            self._tokens = [self._of(model) for model in range(len(headers))]
        found = result_tokens(headers, recipe)
        self.notes = list(found.notes)
        self.changes: TokenizerChanges | None = found.changes
        self._own = found.own
        self._ids = found.ids
        self.count = 1 + max(found.ids.values(), default=-1)
        self._padded = self.count + -self.count % recipe.pad_to_multiple_of
        at = {number: token for token, number in found.ids.items()}
        self._keys: list[Token] = [at.get(number, number) for number in range(self.count)]
        self._set = {found.ids[row.token]: row for row in recipe.tokens if row.token in found.ids}
        self._places: dict[tuple[int, int], npt.NDArray[np.int32]] = {}
        self._noted: set[int] = set()
        self._changes = False  # whether any tensor differs from what is stored

    @property
    def rows(self) -> int:
        """Rows of the result, padding included."""
        return self._padded

    def _of(self, model: int) -> Tokens:
        """V2: a model's tokens, else the base's, else those of the chosen model."""
        chosen = self._headers[self._chosen]
        base = self._headers[self._base or 0]
        found = self._headers[model].tokens or base.tokens or chosen.tokens
        assert found is not None
        if not found.known or not found.ids:
            raise MismatchError(
                f"the ids of the tokens of {self._headers[model].reference} are not in files that"
                " can be read here, so its rows cannot be moved to those of tokenizer_source; save"
                " its tokenizer as tokenizer.json (transformers: AutoTokenizer), or leave"
                " tokenizer_source out where the models have the same tokens"
            )
        return found

    def aligned(
        self, task: TensorTask, sources: tuple[Source, ...], base: Source | None
    ) -> tuple[tuple[Source, ...], Source | None] | None:
        """(sources, base) of a vocabulary tensor, with rows at the result's ids; None where that is
        impossible, which is added to `problems`.
        """
        inputs = sources if base is None else (*sources, base)
        models = [source.model for source in inputs]
        own = self._base if base is None else base.model
        try:
            found = self._align(task.name, inputs, models.index(own) if own in models else None)
        except MismatchError as error:
            self.problems += error.problems
            return None
        if task.solve is not None and found != inputs:
            self.problems.append(
                f"{task.name}: the models' tokens have different ids or rows, and merge_method"
                f" {task.solve.method} does not move them, since its statistics are of the rows as"
                " they are; leave tokenizer_source out"
            )
            return None
        return (found, None) if base is None else (found[:-1], found[-1])

    def unknown(self, tensors: Iterable[VocabularyTensor]) -> list[str]:
        """V6: a problem for tensors that may have one row per token but would not be aligned."""
        if not self._changes:
            return []
        tensors = list(tensors)
        sizes = [vocabulary_sizes(header) for header in self._headers]
        taken: dict[str, set[int]] = {}  # layer -> sizes that something in it takes as input
        for tensor in tensors:
            taken.setdefault(_layer(tensor.name), set()).update(tensor.shape[1:])

        def may_be(tensor: VocabularyTensor) -> bool:
            if is_vocabulary(tensor.name):
                return False
            layer = _layer(tensor.name)
            vocabularies = [sizes[s.model] for s in tensor.inputs if sizes[s.model]]
            # One row per token in each of its models. Within a layer another tensor with that input
            # size explains it: the second matrix of an MLP reads what the first one makes.
            same = set(tensor.shape[:1] if layer else tensor.shape).intersection(*vocabularies)
            return bool(vocabularies) and bool(same - taken[layer] if layer else same)

        found = [tensor for tensor in tensors if may_be(tensor)]
        if not found:
            return []
        names = some_names(f"{tensor.name} {list(tensor.shape)}" for tensor in found)
        are, have = ("is", "it has") if len(found) == 1 else ("are", "they have")
        return [
            f"{names} {are} as large as the vocabulary, and it is not known whether {have} a row a"
            " token; give the models one tokenizer (transformers: resize_token_embeddings) and"
            " leave tokenizer_source out"
        ]

    def _align(self, name: str, inputs: Sequence[Source], base: int | None) -> tuple[Source, ...]:
        """Every input with its rows aligned (V3 to V5). base: its place among the inputs."""
        infos = [self._headers[s.model].tensors[s.tensor] for s in inputs]
        if any(not info.shape or info.shape[1:] != infos[0].shape[1:] for info in infos):
            return tuple(inputs)  # the planner reports the shapes
        places = np.stack(
            [self._places_of(s.model, info.shape[0]) for s, info in _pairs(inputs, infos)]
        )
        has = places >= 0
        given = self._given(name, inputs, infos, places)
        count = has.sum(axis=0)
        other = np.where(count == 0, ZERO, MEAN)  # V4
        if base is not None:
            other = np.where(has[base], base, other)
        other = np.where(count == 1, has.argmax(axis=0), other)
        stored = tuple(replace(source, rows=None) for source in inputs)
        found = []
        for k, (source, info) in enumerate(_pairs(inputs, infos)):
            choice = np.where(has[k], k, other).astype(np.int32)
            mine = places if not given else places.copy()
            taken = {i: at for i, (row, *at) in given.items() if row.force or not has[k, i]}
            for i, (which, place) in taken.items():
                choice[i] = which
                if which != ZERO:
                    mine[which, i] = place
            same = bool((choice == k).all()) and bool((mine[k] == np.arange(self.count)).all())
            if same and info.shape[0] == self._padded == self.count:
                found.append(source)
                continue
            mixes = bool(((choice >= 0) & (choice != k) | (choice == MEAN)).any())
            dtype = reduce(_promoted, (i.dtype for i in infos)) if mixes else info.dtype
            found.append(replace(source, rows=self._rows(info, dtype, stored, mine, choice)))
            self._note_model(source, name, info.shape[0], has[k], places[k], taken)
        zeros = [self._keys[i] for i in np.flatnonzero(count == 0).tolist() if i not in given]
        named = [token for token in zeros if isinstance(token, str)]
        if named:
            self.notes.append(
                f"{name}: {some_tokens(named)} of the result in no model that is merged, with rows"
                " of zeros"
            )
        return tuple(found)

    def _given(
        self,
        name: str,
        inputs: Sequence[Source],
        infos: Sequence[TensorInfo],
        places: npt.NDArray[np.int32],
    ) -> dict[int, tuple[TokenRow, int, int]]:
        """V10: rows of the result that the recipe gives: (its entry, an input or ZERO, the row
        there). Raises MismatchError for a row that there is not.
        """
        found: dict[int, tuple[TokenRow, int, int]] = {}
        models = [source.model for source in inputs]
        problems = []
        for i, row in self._set.items():
            if not row.force and (places[:, i] >= 0).all():
                continue  # no model lacks it
            if row.zero:
                found[i] = row, ZERO, -1
            elif row.model is not None:
                reference = self._headers[row.model].reference
                at = models.index(row.model) if row.model in models else None
                if at is None:
                    place = -1
                    why = f"is not merged in {name}; name one that is"
                elif row.source is None:
                    place = int(places[at, i])
                    why = f"has no row of it in {name}; name a model that has"
                else:
                    asked = row.source
                    place = (
                        self._tokens[row.model].ids.get(asked, -1)
                        if isinstance(asked, str)
                        else asked
                    )
                    place = place if place < infos[at].shape[0] else -1
                    why = f"has no row of {asked!r} in {name}, of {infos[at].shape[0]} rows"
                if at is None or place < 0:
                    problems.append(
                        f"tokenizer.tokens[{row.token!r}]: its source {reference} {why}"
                    )
                else:
                    found[i] = row, at, place
        if problems:
            raise MismatchError(problems)
        return found

    def _rows(
        self,
        info: TensorInfo,
        dtype: str,
        stored: tuple[Source, ...],
        places: npt.NDArray[np.int32],
        choice: npt.NDArray[np.int32],
    ) -> Rows:
        if info.dtype not in MERGEABLE:
            raise MismatchError(
                f"{info.name} is {info.dtype}, whose rows cannot be moved; store it in one of"
                f" {', '.join(MERGEABLE)}"
            )
        self._changes = True
        more = self._padded - self.count
        return Rows(
            (self._padded, *info.shape[1:]),
            dtype,
            stored,
            np.pad(places, ((0, 0), (0, more)), constant_values=-1),
            np.pad(choice, (0, more), constant_values=PADDING),
        )

    def _places_of(self, model: int, rows: int) -> npt.NDArray[np.int32]:
        """For every row of the result the model's own row of that token, -1 where it has none."""
        key = (model, rows)
        if key not in self._places:
            if self._tokens[model] is self._tokens[self._chosen]:
                found = np.arange(self.count, dtype=np.int32)
                # V9: added to it, since its own model has no row of them
                ids = self._tokens[model].ids
                found[self._own :] = [ids.get(str(t), -1) for t in self._keys[self._own :]]
            else:
                every = _with_free(self._tokens[model].ids, self.count)
                found = np.fromiter((every.get(t, -1) for t in self._keys), np.int32, self.count)
                for token, number in reversed(self._ids.items()):  # V3: any name of a row counts
                    if token != self._keys[number] and found[number] < 0 and token in every:
                        found[number] = every[token]
            self._places[key] = np.where(found < rows, found, -1).astype(np.int32)
        return self._places[key]

    def _note_model(
        self,
        source: Source,
        name: str,
        rows: int,
        own: npt.NDArray[np.bool_],
        places: npt.NDArray[np.int32],
        taken: Collection[int],
    ) -> None:
        """Note, once for each model, what alignment does to it. rows: of its embedding. own: which
        of the result's tokens it has. taken: ids whose rows the recipe gives.
        """
        if source.model in self._noted or not name.endswith(EMBEDDINGS):
            return
        self._noted.add(source.model)
        reference = self._headers[source.model].reference
        elsewhere = int((own & (places != np.arange(self.count))).sum())
        forced = [str(self._keys[i]) for i in taken if own[i]]
        lacked = [self._keys[i] for i in np.flatnonzero(~own).tolist()]
        named = [token for token in lacked if isinstance(token, str)]
        dropped = [t for t in self._tokens[source.model].ids if t not in self._ids]
        words = []
        if elsewhere:
            words.append(f"{elsewhere} row{'' if elsewhere == 1 else 's'} moved to other ids")
        if named:
            given = "is given a row" if len(named) == 1 else "are given rows"
            words.append(f"{some_tokens(named)} that it lacks {given}")
        if forced:
            words.append(f"{some_tokens(forced)} with the row that the recipe gives")
        if dropped:
            words.append(f"{some_tokens(dropped)} of its own left out")
        last = max((i for i in self._tokens[source.model].ids.values() if i < rows), default=-1)
        cut = rows - max(self._padded, last + 1)
        if cut > 0:
            words.append(f"{cut} row{'' if cut == 1 else 's'} beyond its tokens cut off as padding")
        if words:
            chosen = f"tokenizer of {self._headers[self._chosen].reference}"
            to = "union of the tokenizers" if self._union else chosen
            self.notes.append(f"{reference}, to the {to}: {'; '.join(words)}")

    def new_ids(self, model: int) -> dict[int, int | None]:
        """A model's ids whose token has another id in the result, or None there. Ids that stay are
        left out.
        """
        if self._headers[model].tokens is None:
            return {}
        found: dict[int, int | None] = {}
        for token, old in self._tokens[model].ids.items():
            at = self._ids.get(token)
            if at is not None or old not in found:  # V3: the last name that the result has
                found[old] = at
        return {old: at for old, at in found.items() if old != at}


def _layer(name: str) -> str:
    """`model.layers.3.` of a tensor in it; "" outside of layers."""
    found = IN_LAYER.search(name)
    return name[: found.end()] if found else ""


def _pairs(inputs: Sequence[Source], infos: Sequence[TensorInfo]) -> zip[tuple[Source, TensorInfo]]:
    return zip(inputs, infos, strict=True)


def _with_free(ids: Mapping[str, int], below: int) -> dict[Token, int]:
    """The tokens, and each free id below `below` as a nameless token of its own (V2)."""
    used = set(ids.values())
    found: dict[Token, int] = {i: i for i in range(below) if i not in used}
    found.update(ids)
    return found


def _promoted(one: str, other: str) -> str:
    """`torch.promote_types` for floating-point dtypes, without torch."""
    if one == other:
        return one
    return "float64" if "float64" in (one, other) else "float32"
