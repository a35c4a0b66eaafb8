"""Folders of torch.distributed.checkpoint, as training writes them: `.metadata`, which says what
there is, and files in which each process saved its parts of the tensors.

Neither torch nor any code of the folder is needed to read them. The model is found in what was
saved; the optimizer's state and the rest is left alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pymerge.checkpoint.boxes import Box, BoxedTensor, why_not_whole
from pymerge.checkpoint.files import (
    exists,
    irregular,
    open_regular,
    parse_object,
    reason,
    stays_inside,
)
from pymerge.checkpoint.header import Entry, read_all
from pymerge.checkpoint.nested import state_dict_in
from pymerge.checkpoint.saved_metadata import (
    Chunk,
    SavedMetadata,
    StoredPart,
    TensorMetadata,
    are_sizes,
)
from pymerge.checkpoint.saved_tensor import read_saved
from pymerge.checkpoint.stored import FileTensor, InputFile, StoredTensor
from pymerge.checkpoint.training_folders import METADATA, safetensors_parts
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import BITS, CODE_OF, MERGEABLE, storage_bytes
from pymerge.errors import CheckpointError, MergeError
from pymerge.messages.words import counted, some_names

_OFFSETS = "DCP_SHARDING_INFO"


@dataclass
class Found:
    """The model of a training checkpoint."""

    files: list[InputFile]
    tensors: dict[str, StoredTensor]
    notes: list[str] = field(default_factory=list)


def open_distributed(folder: Path) -> Found:
    """The model's tensors of a checkpoint that `distributed_in` found. Raises CheckpointError."""
    if exists(folder / METADATA):
        return _Saved(folder).opened()
    return _safetensors_parts(folder)


class _Leaf:
    """A tensor of the saved state, for the search of the model in it."""

    def __init__(self, name: str, described: TensorMetadata) -> None:
        self.name = name
        self._shape = described.size
        self._dtype = described.dtype

    def dim(self) -> int:
        return len(self._shape) if isinstance(self._shape, tuple) else 0

    def numel(self) -> int:
        return math.prod(self._shape) if are_sizes(self._shape) else 0

    def is_floating_point(self) -> bool:
        return self._dtype in MERGEABLE


class _Saved:
    """A checkpoint by its metadata file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / METADATA
        self._file = InputFile(self._path)  # before it is read, so that changes are noticed
        self._saved = SavedMetadata(self._path)

    def opened(self) -> Found:
        names, notes = self._model()
        wanted: dict[str, list[_Part]] = {}
        problems: list[str] = []
        for full in names.values():
            try:
                self._find_parts(full, wanted)
            except ValueError as error:
                problems += self._problems(full, error)
        inputs, wrong = self._inputs(wanted)
        problems += wrong
        boxes: dict[str, list[Box]] = {full: [] for full in names.values()}
        for file in inputs if not problems else ():
            # One file after the other, since a training may have more than a process may open.
            with _opened(inputs[file]) as opened:
                for part in wanted[file]:
                    try:
                        boxes[part.tensor].append(_box(opened, inputs[file], part))
                    except ValueError as error:
                        problems += self._problems(part.tensor, error)
        tensors = {}
        for name, full in names.items() if not problems else ():
            described = self._saved.tensors[full]
            try:
                info = TensorInfo(name, described.dtype, described.size)
                tensors[name] = _assembled(info, boxes[full])
            except ValueError as error:
                problems += self._problems(full, error)
        if problems:
            raise CheckpointError(list(dict.fromkeys(problems)))
        return Found([self._file, *inputs.values()], tensors, notes)

    def _problems(self, full: str, error: ValueError) -> Sequence[str]:
        if isinstance(error, MergeError):
            return error.problems
        return [f"{self._folder}: tensor {full!r} {error}"]

    def _model(self) -> tuple[dict[str, str], list[str]]:
        """The model's tensors, each by its name in the model and in the checkpoint; and notes."""
        nested: dict[Any, Any] = {}
        for full, path in self._saved.paths.items():
            inner = nested
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = _Leaf(full, self._saved.tensors[full])
        try:
            found = state_dict_in(nested)
        except ValueError as error:
            raise CheckpointError(f"{self._folder}: {error}") from None
        names = {
            name: leaf.name
            for name, leaf in found.content.items()
            if isinstance(name, str) and isinstance(leaf, _Leaf)
        }
        beside = self._beside(found.keys, set(names.values()))
        if not beside and not found.keys:
            return names, []
        note = f"{self._folder}: a training checkpoint, whose model "
        note += f"is {'.'.join(found.keys)!r}" if found.keys else "lies at its top"
        note += f" ({counted(len(names), 'tensor')})"
        if beside:
            rest = [f"{key!r} ({counted(count, 'tensor')})" for key, count in beside.items()]
            note += f"; {some_names(rest)} beside it {'is' if len(rest) == 1 else 'are'} left out"
        return names, [note]

    def _beside(self, keys: tuple[str, ...], taken: Collection[str]) -> dict[str, int]:
        """What lies beside the model, by the first key that is not one of its own -> tensors."""
        found: dict[str, int] = {}
        for full, path in self._saved.paths.items():
            if full not in taken:
                depth = 0
                while depth < min(len(keys), len(path)) and path[depth] == keys[depth]:
                    depth += 1
                key = ".".join(map(str, path[: depth + 1]))
                found[key] = found.get(key, 0) + 1
        return found

    def _find_parts(self, full: str, wanted: dict[str, list[_Part]]) -> None:
        """Add a tensor's parts, by file. ValueError, as the predicate of a sentence, for a tensor
        that cannot be read.
        """
        dtype = self._saved.tensors[full].dtype
        if dtype not in CODE_OF or BITS[dtype] < 8:
            raise ValueError(f"is {dtype or 'of no known dtype'}; convert it, and save it again")
        for chunk in self._saved.chunks(full):
            place = self._saved.parts.get((full, chunk.offsets))
            if place is None or not isinstance(place.file, str):
                raise ValueError(f"has parts of which {METADATA} gives no file; copy it again")
            if place.changed:
                raise ValueError(
                    f"was saved with transforms ({str(place.changed)[:80]!r}), which are not undone"
                    " here; save it without"
                )
            wanted.setdefault(place.file, []).append(_Part(full, chunk, place, dtype))

    def _inputs(self, names: Iterable[str]) -> tuple[dict[str, InputFile], list[str]]:
        """The files, and what is wrong with any of them."""
        inputs: dict[str, InputFile] = {}
        wrong: dict[str, list[str]] = {}
        for name in names:
            path = self._folder / name
            if not stays_inside(name):
                wrong.setdefault("is outside its folder; do not trust it", []).append(name)
            elif not exists(path):
                wrong.setdefault("is missing; copy it too", []).append(name)
            elif (why := irregular(path)) is not None:
                wrong.setdefault(f"{why}; copy it", []).append(name)
            else:
                inputs[name] = InputFile(path)
        return inputs, [
            f"{self._path}: names {some_names(map(repr, each))},"
            f" {'which' if len(each) == 1 else 'each of which'} {why}"
            for why, each in wrong.items()
        ]


@dataclass(frozen=True)
class _Part:
    """A part of a tensor, which is named as in the checkpoint."""

    tensor: str
    chunk: Chunk
    place: StoredPart
    dtype: str


@contextlib.contextmanager
def _opened(file: InputFile) -> Iterator[BinaryIO]:
    try:
        with open_regular(file.path) as opened:
            yield opened
    except OSError as error:
        raise CheckpointError(f"{file.path}: {reason(error)}") from None


def _box(opened: BinaryIO, file: InputFile, part: _Part) -> Box:
    """Where the part's elements lie. ValueError, as the predicate of a sentence."""
    chunk, place, path = part.chunk, part.place, file.path.name
    if not are_sizes((place.offset, place.length)):
        raise ValueError("has a part at no place of its file; copy the folder again")
    if place.offset + place.length > file.identity.size:
        raise ValueError(
            f"has a part that ends behind the end of {path}, which has {file.identity.size} bytes;"
            " copy the file again"
        )
    try:
        saved = read_saved(opened, place.offset, place.length)
    except ValueError as error:
        raise ValueError(f"has a part in {path} that {error}") from None
    if (saved.dtype, saved.shape) != (part.dtype, chunk.sizes):
        raise ValueError(
            f"has a part in {path} that is {saved.dtype} of {list(saved.shape)}, and by"
            f" {METADATA} {part.dtype} of {list(chunk.sizes)}; copy the folder again"
        )
    return Box(chunk.offsets, chunk.sizes, file, saved.start, saved.strides)


def _assembled(info: TensorInfo, boxes: Sequence[Box]) -> StoredTensor:
    why = why_not_whole(info.shape, boxes)
    if why is not None:
        raise ValueError(f"{why}; copy all files of the checkpoint")
    if len(boxes) == 1 and boxes[0].strides is None:
        nbytes = storage_bytes(info.dtype, info.shape)
        return FileTensor(Entry(info, boxes[0].start, nbytes), boxes[0].file)
    return BoxedTensor(info, boxes)


def _safetensors_parts(folder: Path) -> Found:
    """What each process saved by itself with HuggingFaceStorageWriter, which leaves no metadata
    beside it: the offsets of parts are in the files' free text.
    """
    files = []
    problems: list[str] = []
    boxes: dict[str, list[Box]] = {}
    dtypes: dict[str, set[str]] = {}
    for path in safetensors_parts(folder):
        try:
            file = InputFile(path)
            metadata, entries = read_all(path)
            offsets = _saved_offsets(path, metadata)
            for entry in entries:
                info = entry.info
                begin = offsets.get(info.name, (0,) * len(info.shape))
                if not are_sizes(begin) or len(begin) != len(info.shape):
                    raise CheckpointError(f"{path}: has no usable offsets for {info.name!r}")
                boxes.setdefault(info.name, []).append(Box(begin, info.shape, file, entry.start))
                dtypes.setdefault(info.name, set()).add(info.dtype)
            files.append(file)
        except MergeError as error:
            problems += error.problems
    tensors = {}
    for name, parts in boxes.items() if not problems else ():
        ends = [[a + b for a, b in zip(box.begin, box.shape, strict=True)] for box in parts]
        one = len(dtypes[name]) == 1 and len({len(each) for each in ends}) == 1
        if not one:
            problems.append(f"{folder}: tensor {name!r} has parts of several dtypes or dimensions")
            continue
        info = TensorInfo(name, min(dtypes[name]), tuple(map(max, zip(*ends, strict=True))))
        try:
            tensors[name] = _assembled(info, [box for box in parts if math.prod(box.shape)])
        except ValueError as error:
            problems.append(f"{folder}: tensor {name!r} {error}")
    if problems:
        raise CheckpointError(problems)
    return Found(files, tensors)


def _saved_offsets(path: Path, metadata: Mapping[str, bytes]) -> dict[str, tuple[Any, ...]]:
    if _OFFSETS not in metadata:
        raise CheckpointError(
            f"{path}: does not say of which tensors it holds parts ({_OFFSETS}); copy it again"
        )
    read = parse_object(metadata[_OFFSETS], path, len(metadata[_OFFSETS]))
    return dict(_offsets(read))


def _offsets(read: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, each in read.items():
        begin = each.get("saved_offsets") if isinstance(each, dict) else None
        if isinstance(begin, list):
            yield name, tuple(begin)
