"""Opens a statistics file for its model: header, places of the sums, whether the model is the right
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymerge.checkpoint import schemas
from pymerge.checkpoint.header import read_all
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import FileTensor, InputFile, StoredTensor
from pymerge.checkpoint.types import StatisticsHeader
from pymerge.dtypes import MERGEABLE, elements, item_size, torch_dtype


class OpenStatistics:
    """tensors: the sums by key ("input_gram/<layer>"), packed fp32. header: what planning needs."""

    def __init__(self, path: Path, model: OpenModel | None) -> None:
        """Reads the headers and, where the model could be opened, a few elements of its weights.
        Raises CheckpointError.
        """
        self.file = InputFile(path)  # before anything is read, so that every change is noticed
        metadata, entries = read_all(path)
        infos = {entry.info.name: entry.info for entry in entries}
        content = schemas.statistics(metadata, infos, path)
        self.tensors: Mapping[str, StoredTensor] = {
            entry.info.name: FileTensor(entry, self.file) for entry in entries
        }
        foreign = () if model is None else _foreign(content, model)
        self.header = StatisticsHeader(str(path), content, infos, foreign)


def _foreign(content: Mapping[str, Any], model: OpenModel) -> tuple[str, ...]:
    """Names of the model's tensors whose values changed since the statistics were collected
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
