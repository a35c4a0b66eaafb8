"""The metadata file of torch.distributed.checkpoint: a pickle of what was saved and where it lies,
read as plain data. Nothing in it is trusted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import MAX_DEPTH, read_file
from pymerge.checkpoint.inert import unpickled
from pymerge.checkpoint.pickles import Refused
from pymerge.checkpoint.saved_tensor import dtype_named
from pymerge.errors import CheckpointError

# 250 MB are 500,000 parts with an optimizer's; a part takes about 70 operations of the pickle.
_MAX_METADATA = 256 << 20
_MOST_OPERATIONS = 50_000_000
_LARGEST = 1 << 48  # elements along an axis
_OPTIMIZER = re.compile(r"(?:^|\.)optim\w*\.")
_PLACE = "torch.distributed.checkpoint."


class SavedMetadata:
    """tensors: by their names in the checkpoint. paths: where each was in the nested state that was
    saved. parts: where each part lies, by its tensor's name and its offsets.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError."""
        self._path = path
        content = read_file(path, _MAX_METADATA)
        try:
            read = unpickled(content, _known, most_operations=_MOST_OPERATIONS)
        except Refused as error:
            raise CheckpointError(f"{path}: {error}") from None
        except ValueError:
            raise self.damaged() from None
        if not isinstance(read, _Metadata):
            raise self.damaged()
        if not isinstance(read.described, dict) or not isinstance(read.stored, dict):
            raise self.damaged()
        self.tensors: dict[str, TensorMetadata] = {
            name: each
            for name, each in read.described.items()
            if isinstance(name, str) and isinstance(each, TensorMetadata)
        }
        if not self.tensors:
            raise CheckpointError(f"{path}: lists no tensors")
        self.paths = _paths(read.planned, self.tensors)
        self.parts: dict[tuple[str, tuple[int, ...]], StoredPart] = {}
        for index, place in read.stored.items():
            if isinstance(index, _Index) and isinstance(place, StoredPart):
                if isinstance(index.name, str) and are_sizes(index.offset):
                    self.parts[index.name, index.offset] = place

    def damaged(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: is damaged, or not what torch.distributed.checkpoint writes; copy the"
            " folder again"
        )

    def chunks(self, name: str) -> list[Chunk]:
        """The parts of a tensor that hold elements."""
        chunks, shape = self.tensors[name].chunks, self.tensors[name].size
        if not isinstance(chunks, list) or not are_sizes(shape):
            raise self.damaged()
        for chunk in chunks:
            fits = (
                isinstance(chunk, Chunk)
                and are_sizes(chunk.offsets)
                and are_sizes(chunk.sizes)
                and len(chunk.offsets) == len(chunk.sizes) == len(shape)
                and all(
                    begin + size <= whole
                    for begin, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
                )
            )
            if not fits:
                raise self.damaged()
        return [chunk for chunk in chunks if math.prod(chunk.sizes)]


# What a metadata file is made of, by the names of torch's classes.


class _State:
    """An object that is restored from a mapping of its attributes. Those in `_names` are kept."""

    __slots__ = ()
    _names: tuple[tuple[str, str], ...] = ()  # (of torch's attribute, of that here)

    def __new__(cls, *given: Any) -> _State:
        made = super().__new__(cls)
        for _, own in cls._names:
            setattr(made, own, None)
        return made

    def __setstate__(self, state: Any) -> None:
        for name, own in self._names:
            setattr(self, own, state.get(name))


class _Metadata(_State):
    __slots__ = ("described", "planned", "stored")
    _names = (
        ("state_dict_metadata", "described"),
        ("planner_data", "planned"),
        ("storage_data", "stored"),
    )
    described: Any
    planned: Any
    stored: Any


class TensorMetadata(_State):
    __slots__ = ("chunks", "properties", "size")
    _names = tuple((name, name) for name in __slots__)
    chunks: Any
    properties: Any
    size: Any

    @property
    def dtype(self) -> str:
        """torch's name; "" where it is not known."""
        found = self.properties.dtype if isinstance(self.properties, _Properties) else None
        return found if isinstance(found, str) else ""


class _Properties(_State):
    __slots__ = ("dtype",)
    _names = (("dtype", "dtype"),)
    dtype: Any

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class Chunk(_State):
    """A part of a tensor: `offsets` and `sizes`, a number for each axis."""

    __slots__ = ("offsets", "sizes")
    _names = tuple((name, name) for name in __slots__)
    offsets: Any
    sizes: Any


class _Index(_State):
    """The name of a part: that of its tensor, and its offsets."""

    __slots__ = ("name", "offset")
    _names = (("fqn", "name"), ("offset", "offset"))
    name: Any
    offset: Any


class StoredPart(_State):
    """Where a part lies: `length` bytes of a file from `offset` on."""

    __slots__ = ("changed", "file", "length", "offset")
    _names = (
        ("relative_path", "file"),
        ("offset", "offset"),
        ("length", "length"),
        ("transform_descriptors", "changed"),
    )
    file: Any
    offset: Any
    length: Any
    changed: Any


_CLASSES: Mapping[tuple[str, str], type] = {
    (f"{_PLACE}metadata", "Metadata"): _Metadata,
    (f"{_PLACE}metadata", "TensorStorageMetadata"): TensorMetadata,
    (f"{_PLACE}metadata", "TensorProperties"): _Properties,
    (f"{_PLACE}metadata", "ChunkStorageMetadata"): Chunk,
    (f"{_PLACE}metadata", "MetadataIndex"): _Index,
    (f"{_PLACE}filesystem", "_StorageInfo"): StoredPart,
}


def _known(module: str, name: str) -> Any:
    if (module, name) == ("torch", "Size"):
        return tuple
    return _CLASSES.get((module, name)) or dtype_named(module, name)


def are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(
        type(each) is int and 0 <= each <= _LARGEST for each in numbers
    )


def _paths(planned: Any, described: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Where each tensor was in the nested state that was saved. Without what torch's own planner
    says of it, all that does not look like an optimizer's is one mapping.
    """
    if isinstance(planned, dict):
        paths: dict[str, Any] = {name: planned.get(name) for name in described}
        if all(map(_is_path, paths.values())):
            inner = {path[:depth] for path in paths.values() for depth in range(len(path))}
            if not any(path in inner for path in paths.values()):
                return paths
    return {name: ("optimizer", name) if _OPTIMIZER.search(name) else (name,) for name in described}


def _is_path(path: Any) -> bool:
    return (
        isinstance(path, tuple)
        and 0 < len(path) <= MAX_DEPTH
        and all(isinstance(key, (str, int)) for key in path)
    )
