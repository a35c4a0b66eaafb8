"""A statistics file opened beside its model: its header, where its sums lie, whether they are of
this very model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint import schemas
from pymerge.checkpoint.header import read_all
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import FileTensor, InputFile, StoredTensor
from pymerge.checkpoint.types import StatisticsHeader
from pymerge.dtypes import MERGEABLE, elements, item_size, torch_dtype
from pymerge.errors import CheckpointError, MergeError


class OpenStatistics:
    """`tensors`: the sums by key ("input_gram/<layer>"), packed fp32. `header`: what the planner
    needs to know.
    """

    def __init__(self, path: Path, model: OpenModel) -> None:
        """Reads headers and a few elements of the model's weights. Raises CheckpointError."""
        self.file = InputFile(path)  # before anything of it is read, so that no change goes unseen
        metadata, entries = read_all(path)
        infos = {entry.info.name: entry.info for entry in entries}
        content = schemas.statistics(metadata, infos, path)
        self.tensors: Mapping[str, StoredTensor] = {
            entry.info.name: FileTensor(entry, self.file) for entry in entries
        }
        foreign = _foreign(content, model)
        self.header = StatisticsHeader(str(path), content, infos, foreign)


def open_statistics(models: list[OpenModel], paths: tuple[str | None, ...]) -> None:
    """Open every model's statistics file and give it to the model. Raises one CheckpointError with
    all that is wrong.
    """
    problems: list[str] = []
    for model, path in zip(models, paths, strict=bool(paths)):
        if path is None:
            continue
        try:
            opened = OpenStatistics(Path(path), model)
        except MergeError as error:
            problems.extend(error.problems)
            continue
        model.statistics = opened.tensors
        model.files = (*model.files, opened.file)
        model.header = replace(model.header, statistics=opened.header)
    if problems:
        raise CheckpointError(problems)


def _foreign(content: Mapping[str, Any], model: OpenModel) -> tuple[str, ...]:
    """Names of the model's tensors that have other values than when the statistics were collected
    (S14).
    """
    if not content.get("weights"):
        return ()
    import torch

    from pymerge.checkpoint.weight_tags import foreign_weights, sample_of

    def sample(name: str) -> torch.Tensor | None:
        stored = model.tensors.get(name)
        if stored is None or stored.info.dtype not in MERGEABLE:
            return None
        begin, size = sample_of(elements(stored.info.shape))
        width = item_size(stored.info.dtype)
        held = bytearray(size * width)
        stored.read_into(begin * width, memoryview(held))
        return torch.frombuffer(held, dtype=torch_dtype(stored.info.dtype)) if size else None

    return foreign_weights(content, sample)
