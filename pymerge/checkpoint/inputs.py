"""What a merge reads: opened models, and their tensors by source. Imports NumPy for token alignment
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from pymerge.checkpoint.adapter import AdaptedModel
from pymerge.checkpoint.reader import OpenModel, open_model
from pymerge.checkpoint.statistics import OpenStatistics
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.tokens import TokenReader, Tokens
from pymerge.checkpoint.types import Rows, Source
from pymerge.errors import CheckpointError, MergeError
from pymerge.messages.words import counted

# Models that cannot be opened, after which no more are tried: each of the hub is a request.
_MOST_FAILED = 32


def open_models(
    references: Iterable[str],
    statistics: Sequence[str | None] = (),
    tokenizer: int | None = None,
    opened: Callable[[str, bool], OpenModel] | None = None,
) -> list[OpenModel]:
    """Open every model with its tokenizer and its statistics file. Raises one CheckpointError that
    lists what is wrong with any of them.

    tokenizer: index of a model that is needed for its tokenizer alone, so that it may lack weights.
    opened: opens a model by its reference, and whether it needs weights; by default `open_model`.
    """
    models: list[OpenModel] = []
    problems: list[str] = []
    failed = 0
    reader = TokenReader()
    wanted = list(zip_longest(references, statistics))
    for place, (reference, path) in enumerate(wanted):
        if failed == _MOST_FAILED:
            problems.append(
                f"{counted(len(wanted) - place, 'further model was', 'further models were')} not"
                " looked at"
            )
            break
        model = None
        try:
            needs_weights = place != tokenizer
            if opened is None:
                model = open_model(reference, needs_weights=needs_weights)
            else:
                model = opened(reference, needs_weights)
            models.append(model)
            model.header = replace(model.header, tokens=_tokens(model, reader))
        except MergeError as error:
            problems.extend(error.problems)
            failed += 1
        try:
            statistics_file = None if path is None else OpenStatistics(Path(path), model)
        except MergeError as error:
            problems.extend(error.problems)
            continue
        if model is not None and statistics_file is not None:
            model.statistics = statistics_file.tensors
            model.files = (*model.files, statistics_file.file)
            model.header = replace(model.header, statistics=statistics_file.header)
    if problems:
        for model in models:
            model.close()
        raise CheckpointError(list(dict.fromkeys(problems)))
    return models


def _tokens(model: OpenModel, reader: TokenReader) -> Tokens | None:
    """Those of the model's adapter where it has a tokenizer of its own, which `speaker` then is."""
    own = reader.read(model.folder)
    if not isinstance(model, AdaptedModel) or model.speaker is None:
        return own
    its = reader.read(model.speaker.folder)
    if its is None or its is own:
        model.speaker = None
        return own
    return its


class Inputs:
    """The tensors that a merge reads, by source: as they are stored, or with their rows aligned to
    the result's tokens.
    """

    def __init__(self, models: Sequence[OpenModel]) -> None:
        self._models = models
        self._aligned: dict[Rows, StoredTensor] = {}

    def __call__(self, source: Source) -> StoredTensor:
        rows = source.rows
        if rows is None:
            return self._models[source.model].tensors[source.tensor]
        if rows not in self._aligned:
            from pymerge.checkpoint.gather import aligned_tensor

            stored = [self(each) for each in rows.tensors]
            self._aligned[rows] = aligned_tensor(source.tensor, rows, stored)
        return self._aligned[rows]
