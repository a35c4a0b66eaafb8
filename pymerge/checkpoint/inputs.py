"""The tensors that a merge reads, by their source. Imports NumPy only where rows are moved."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import Rows, Source


class Inputs:
    """The tensors that a merge reads, by their source: as they are stored, or with their rows
    moved.
    """

    def __init__(self, models: Sequence[OpenModel]) -> None:
        self._models = models
        self._moved: dict[Rows, StoredTensor] = {}

    def __call__(self, source: Source) -> StoredTensor:
        rows = source.rows
        if rows is None:
            return self._models[source.model].tensors[source.tensor]
        if rows not in self._moved:
            from pymerge.checkpoint.gather import moved_tensor

            stored = [self(each) for each in rows.tensors]
            self._moved[rows] = moved_tensor(source.tensor, rows, stored)
        return self._moved[rows]
