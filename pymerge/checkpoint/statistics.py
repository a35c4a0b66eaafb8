"""A statistics file opened beside its model: its header, where its sums lie, whether they are of
this very model.
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
from pymerge.dtypes import MERGEABLE, item_size, torch_dtype


class OpenStatistics:
    """`tensors`: the sums by key ("input_gram/<layer>"), packed fp32. `header`: what the planner
    needs to know.
    """

    def __init__(self, path: Path, model: OpenModel | None) -> None:
        """Reads headers and a few elements of the model's weights, where it could be opened. Raises
        CheckpointError.
        """
        self.file = InputFile(path)  # before anything of it is read, so that no change goes unseen
        metadata, entries = read_all(path)
        infos = {entry.info.name: entry.info for entry in entries}
        from pymerge.checkpoint.weight_tags import with_pools

        content: Mapping[str, Any] = schemas.statistics(metadata, infos, path)
        self.tensors: Mapping[str, StoredTensor] = {
            entry.info.name: FileTensor(entry, self.file) for entry in entries
        }
        foreign: tuple[str, ...] = ()
        content = with_pools(content)
        if model is not None and content.get("weights"):
            foreign, content = _compared(content, model)
        self.header = StatisticsHeader(str(path), content, infos, foreign)


def _compared(
    content: Mapping[str, Any], model: OpenModel
) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Names of the model's tensors that have other values than when the statistics were collected
    (S14); and the header with the names of tensors that have the same values (S15).
    """
    tags: Mapping[str, str] = content["weights"]
    # A layer's own tensor, where the weight has another name first (tied ones) that the model's
    # files do not hold.
    layers = {layer["weight"]: f"{name}.weight" for name, layer in content["layers"].items()}
    import torch

    from pymerge.checkpoint.weight_tags import tag_like, with_names_of

    def sample(name: str, begin: int, size: int) -> torch.Tensor | None:
        stored = model.tensors[name]
        if stored.info.dtype not in MERGEABLE:
            return None
        width = item_size(stored.info.dtype)
        held = bytearray(size * width)
        stored.read_into(begin * width, memoryview(held))
        return torch.frombuffer(held, dtype=torch_dtype(stored.info.dtype))

    shapes = {name: stored.info.shape for name, stored in model.tensors.items()}
    found = []
    for name, tag in tags.items():
        own = name if name in shapes else layers.get(name, name)
        if own in shapes and tag_like(tag, own, shapes[own], sample) not in (None, tag):
            found.append(name)
    return tuple(found), with_names_of(content, shapes, sample)
