"""Opens a statistics file for its model: header, offsets of the sums, whether it belongs to the
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import schemas
from pymerge.checkpoint.header import read_all
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import FileTensor, InputFile, StoredTensor
from pymerge.checkpoint.types import StatisticsHeader
from pymerge.dtypes import MERGEABLE, item_size, torch_dtype

if TYPE_CHECKING:
    from pymerge.checkpoint.weight_tags import Beside


class OpenStatistics:
    """tensors: the sums by key ("input_gram/<layer>"), packed fp32. header: what planning needs."""

    def __init__(self, path: Path, model: OpenModel | None) -> None:
        """Reads the headers and, where the model could be opened, a few elements of its weights.
        Raises CheckpointError.
        """
        self.file = InputFile(path)  # before anything is read, so that every change is noticed
        metadata, entries = read_all(path)
        infos = {entry.info.name: entry.info for entry in entries}
        content: Mapping[str, Any] = schemas.statistics(metadata, infos, path)
        self.tensors: Mapping[str, StoredTensor] = {
            entry.info.name: FileTensor(entry, self.file) for entry in entries
        }
        content, foreign, renamed = _beside(content, model)
        self.header = StatisticsHeader(str(path), content, infos, foreign, renamed)


def _beside(content: Mapping[str, Any], model: OpenModel | None) -> Beside:
    """S14 to S16; without a model, pools alone."""
    import torch

    from pymerge.checkpoint.weight_tags import beside

    tensors = {} if model is None else model.tensors

    def sample(name: str, begin: int, size: int) -> torch.Tensor | None:
        stored = tensors[name]
        if stored.info.dtype not in MERGEABLE:
            return None
        width = item_size(stored.info.dtype)
        held = bytearray(size * width)
        stored.read_into(begin * width, memoryview(held))
        return torch.frombuffer(held, dtype=torch_dtype(stored.info.dtype))

    return beside(content, {name: each.info.shape for name, each in tensors.items()}, sample)
