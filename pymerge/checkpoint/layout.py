"""Where every output tensor lies: shards as transformers cuts them, their headers, their index."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pymerge.checkpoint.dtypes import CODE_OF, item_size

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_ALIGN = 64  # of the data region: whole cache lines for the kernels' stores


class OutputTensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def elements(self) -> int: ...


@dataclass(frozen=True)
class Shard:
    """An output file. tensors: indices into the plan, in the order of their bytes."""

    file: str
    header: bytes
    tensors: tuple[int, ...]
    offsets: tuple[int, ...]  # from the start of the file
    nbytes: int  # of the whole file


def parse_size(text: str | int, what: str = "out_shard_size") -> int:
    """Bytes in "5GB", "500MB", "2GiB" or a number; decimal units as transformers takes them."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match.group(2).upper() if match else ""
    count = float(match.group(1)) * _UNITS.get(unit, 0) if match else 0
    if not 0 < count < 1 << 63:
        raise ValueError(
            f"{what}={text!r} is not a size; pass a number of bytes or e.g. '5GB', '500MB'"
        )
    return max(1, int(count))


def lay_out(tensors: Sequence[OutputTensor], shard_size: int) -> list[Shard]:
    """Cut the tensors into shards of at most `shard_size` bytes of data, a larger tensor alone in its own.

    Within a shard wider elements come first, so that every tensor is aligned to its element size.
    """
    groups: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for index, tensor in enumerate(tensors):
        if tensor.nbytes > shard_size:
            groups.append([index])
            continue
        if filled + tensor.nbytes > shard_size:
            groups.append(current)
            current, filled = [], 0
        current.append(index)
        filled += tensor.nbytes
    if current or not groups:
        groups.append(current)
    shards = []
    for number, group in enumerate(groups, 1):
        alone = len(groups) == 1
        file = (
            "model.safetensors" if alone else f"model-{number:05}-of-{len(groups):05}.safetensors"
        )
        shards.append(_shard(file, tensors, group))
    return shards


def _shard(file: str, tensors: Sequence[OutputTensor], group: Sequence[int]) -> Shard:
    order = sorted(group, key=lambda index: -item_size(tensors[index].dtype))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins = []
    position = 0
    for index in order:
        tensor = tensors[index]
        begins.append(position)
        position += tensor.nbytes
        header[tensor.name] = {
            "dtype": CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[-1], position],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    prefix = len(text).to_bytes(8, "little") + text
    offsets = tuple(len(prefix) + begin for begin in begins)
    return Shard(file, prefix, tuple(order), offsets, len(prefix) + position)


def index_json(tensors: Sequence[OutputTensor], shards: Sequence[Shard]) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {tensors[index].name: shard.file for shard in shards for index in shard.tensors}
    metadata = {
        "total_parameters": sum(tensor.elements for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    return (
        json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        + "\n"
    )
