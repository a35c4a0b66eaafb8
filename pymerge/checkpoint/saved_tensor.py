"""A single tensor of torch.save inside a larger file, as distributed checkpoints have them: finds
its bytes without torch, and runs no code of the file.
"""

from __future__ import annotations

import io
import math
import sys
import zipfile
from dataclasses import dataclass
from typing import IO, Any

from pymerge.checkpoint.inert import unpickled
from pymerge.checkpoint.pickles import Refused, directory_bytes, record_start
from pymerge.dtypes import BITS, item_size

_MOST_PICKLE = 1 << 16  # bytes; it says shape and strides in some 200
_MOST_DIRECTORY = 1 << 14  # bytes; it lists about six records
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "",
}


@dataclass(frozen=True)
class SavedTensor:
    """start: of its first byte in the file. strides: None where it is contiguous."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None


def read_saved(file: IO[bytes], offset: int, length: int) -> SavedTensor:
    """The tensor whose archive are these bytes of a file. Raises ValueError, with what is wrong
    with it as the predicate of a sentence.
    """
    window: IO[bytes] = io.BufferedReader(_Window(file, offset, length), 4096)
    try:
        if directory_bytes(window, length, _MOST_DIRECTORY) > _MOST_DIRECTORY:
            raise Refused("has an archive with a damaged or too long list of records")
        with zipfile.ZipFile(window) as archive:
            records = {each.filename.partition("/")[2]: each for each in archive.infolist()}
            order = records.get("byteorder")
            if order is not None and _content(archive, order) != sys.byteorder.encode():
                raise Refused("was saved by a machine with the other order of bytes")
            content = _content(archive, records["data.pkl"])
            rebuilt = unpickled(content, _known, _storage)
            if not isinstance(rebuilt, _Rebuilt):
                raise Refused("is not a plain tensor; save it as one")
            return rebuilt.placed(records, lambda each: offset + _start(window, each, length))
    except Refused as error:
        raise ValueError(str(error)) from None
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError):
        raise ValueError("is damaged, or not in the format of torch.save") from None


def _content(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bytes:
    if record.compress_type != zipfile.ZIP_STORED or record.file_size > _MOST_PICKLE:
        raise Refused("has records that torch.save does not write")
    return archive.read(record)


def _start(window: IO[bytes], record: zipfile.ZipInfo, length: int) -> int:
    """The first byte of a record, from the start of its archive."""
    start = record_start(window, record)
    if record.compress_type != zipfile.ZIP_STORED or start + record.file_size > length:
        raise zipfile.BadZipFile
    return start


class _Window(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view) if len(view) else 0  # type: ignore[attr-defined]
        self._at += count
        return int(count)


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Rebuilt:
    """What torch's own function for it is called with."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: str = ""

    def placed(self, records: Any, start: Any) -> SavedTensor:
        shape, strides = self.shape, self.strides
        numbers = (self.offset, *shape, *strides)
        if any(type(each) is not int or each < 0 for each in numbers) or len(shape) != len(strides):
            raise ValueError("numbers")
        dtype = self.dtype or self.storage.dtype
        if not dtype:
            raise Refused("has no dtype that is known")
        size = item_size(dtype)
        record = records[f"data/{self.storage.key}"]
        count = math.prod(shape)
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if count else -1
        if last + 1 != count:
            raise Refused("is a view with gaps; save it contiguous")
        if (self.offset + count) * size > record.file_size:
            raise ValueError("storage")
        begin = start(record) + self.offset * size
        return SavedTensor(dtype, shape, begin, None if _contiguous(shape, strides) else strides)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    due = 1
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and step != due:
            return math.prod(shape) == 0
        due *= size
    return True


def _storage(pid: Any) -> _Storage:
    kind, storage, key, *_ = pid
    if kind != "storage" or not isinstance(storage, str) or not isinstance(key, str):
        raise ValueError("storage")
    return _Storage(_STORAGES[storage], key)


def _known(module: str, name: str) -> Any:
    if name in _STORAGES and module in ("torch", "torch.storage"):
        return name
    if module == "torch._utils" and name == "_rebuild_tensor_v2":
        return _rebuild
    if module == "torch._utils" and name == "_rebuild_tensor_v3":
        return _rebuild_by_dtype
    if (module, name) == ("torch", "Size"):
        return tuple
    return dtype_named(module, name)


def dtype_named(module: str, name: str) -> str | None:
    """The name of torch's dtype, as `torch.float32` in a pickle; None for anything else."""
    return name if module == "torch" and name in BITS else None


def _rebuild(
    storage: _Storage,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> _Rebuilt:
    if metadata:
        raise Refused("is conjugated or negated lazily; save it resolved")
    return _Rebuilt(storage, offset, tuple(shape), tuple(strides))


def _rebuild_by_dtype(
    storage: _Storage,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Rebuilt:
    if metadata or not isinstance(dtype, str):
        raise Refused("is conjugated or negated lazily; save it resolved")
    return _Rebuilt(storage, offset, tuple(shape), tuple(strides), dtype)
