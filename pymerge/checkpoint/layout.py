"""Where every output tensor goes: shards as transformers cuts them, with headers and index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from pymerge.dtypes import CODE_OF, item_size
from pymerge.errors import ConfigError
from pymerge.messages.arguments import argument
from pymerge.messages.words import shown

_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_PARAMETERS = {"K": 10**3, "M": 10**6, "B": 10**9}  # mergekit's, which counts parameters
_PARAMETERS |= {"PARAMETERS": 1}
_MOST_METADATA = 16 << 20  # bytes; a preview image takes some 100 KB
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


@dataclass(frozen=True)
class ShardSize:
    """The limit of an output file: bytes of tensor data, or parameters."""

    limit: int
    counts_parameters: bool = False

    def of(self, tensor: OutputTensor) -> int:
        """The share of the limit that a tensor takes."""
        return tensor.elements if self.counts_parameters else tensor.nbytes

    @property
    def plain(self) -> int | str:
        """The limit as the manifest records it."""
        return f"{self.limit} parameters" if self.counts_parameters else self.limit


def parse_size(text: str | int, name: str = "") -> int:
    """Bytes in "5GB", "500MB", "2GiB" or a number; units are decimal as in transformers. name: the
    argument.
    """
    found = _amount(text, _BYTES)
    if found is None:
        raise ValueError(
            f"{_said(text, name)} is not a size; pass '5GB', '500MB' or a number of bytes"
        )
    return found


def parse_shard_size(text: str | int, name: str = "") -> ShardSize:
    """As `parse_size`, or parameters in "5B", "500M", "100K", as mergekit's option does, and in
    "100 parameters".
    """
    size, parameters = _amount(text, _BYTES), _amount(text, _PARAMETERS)
    if size is not None:
        return ShardSize(size)
    if parameters is not None:
        return ShardSize(parameters, counts_parameters=True)
    raise ValueError(
        f"{_said(text, name)} is not a size; pass '5GB', '500MB' or a number for bytes, or '5B',"
        " '500M' for parameters"
    )


def _amount(text: str | int, units: Mapping[str, int]) -> int | None:
    text = text if isinstance(text, str) else shown(text)
    match = re.fullmatch(r"\s*(\d{1,999}(?:\.\d{1,999})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in units or not (count := Fraction(match.group(1))):
        return None
    return max(1, int(count * units[unit]))


def _said(text: str | int, name: str) -> str:
    return argument(name, text) if name else shown(text)


def check_shard_size(
    tensors: Sequence[OutputTensor], shard_size: ShardSize, given: str | int
) -> None:
    """ConfigError for a size that most tensors exceed, so that almost every tensor would be a
    separate file.
    """
    larger = sum(shard_size.of(tensor) > shard_size.limit for tensor in tensors)
    if len(tensors) > 1 and 2 * larger > len(tensors):
        raise ConfigError(
            f"{argument('out_shard_size', given)} is less than {larger} of the {len(tensors)}"
            " tensors have, and each of these would take a file of its own; pass more, such as"
            " '5GB' for bytes or '5B' for parameters"
        )


def kept_metadata(metadata: Mapping[str, bytes]) -> dict[str, str]:
    """The free text of a safetensors file that holds for a merge too: all but hashes of tensors.
    Empty where it is larger than any honest file's.
    """
    if sum(len(key) + len(value) for key, value in metadata.items()) > _MOST_METADATA:
        return {}
    return {
        key: value.decode("utf-8", "replace")
        for key, value in metadata.items()
        if "hash" not in key.lower()
    }


def lay_out(
    tensors: Sequence[OutputTensor],
    shard_size: ShardSize,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> list[Shard]:
    """Cut the tensors into shards of at most `shard_size`, a larger tensor alone in its own.

    Within a shard wider elements come first, so that every tensor is aligned to its element size.
    metadata: free text for the header of every shard. stem: what the files' names begin with.
    """
    text = {"format": "pt"} | dict(metadata or {})
    groups: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for index, tensor in enumerate(tensors):
        size = shard_size.of(tensor)
        if size > shard_size.limit:
            groups.append([index])
            continue
        if filled + size > shard_size.limit:
            groups.append(current)
            current, filled = [], 0
        current.append(index)
        filled += size
    if current or not groups:
        groups.append(current)
    shards = []
    for number, group in enumerate(groups, 1):
        part = "" if len(groups) == 1 else f"-{number:05}-of-{len(groups):05}"
        shards.append(_shard(f"{stem}{part}.safetensors", tensors, group, text))
    return shards


def _shard(
    file: str,
    tensors: Sequence[OutputTensor],
    group: Sequence[int],
    metadata: Mapping[str, str],
) -> Shard:
    order = sorted(group, key=lambda index: -item_size(tensors[index].dtype))
    begins = []
    position = 0
    # Built as bytes: as text, all of it would take 4 bytes per character if any name has an emoji.
    entries = [_json_entry("__metadata__", dict(metadata))]
    for index in order:
        tensor = tensors[index]
        begins.append(position)
        position += tensor.nbytes
        value = {
            "dtype": CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[-1], position],
        }
        entries.append(_json_entry(tensor.name, value))
    text = b"{" + b",".join(entries) + b"}"
    text += b" " * (-(8 + len(text)) % _ALIGN)
    prefix = len(text).to_bytes(8, "little") + text
    offsets = tuple(len(prefix) + begin for begin in begins)
    return Shard(file, prefix, tuple(order), offsets, len(prefix) + position)


def _json_entry(name: str, value: object) -> bytes:
    return json.dumps({name: value}, separators=(",", ":"), ensure_ascii=False)[1:-1].encode()


def index_json(tensors: Sequence[OutputTensor], shards: Sequence[Shard]) -> str:
    """The text of the shards' index, model.safetensors.index.json."""
    weight_map = {tensors[index].name: shard.file for shard in shards for index in shard.tensors}
    metadata = {
        "total_parameters": sum(tensor.elements for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    return (
        json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        + "\n"
    )
