"""The safetensors header: read, checked against the file, never trusted.

Layout: 8 bytes with the header's length (little-endian), that many bytes of JSON (name -> dtype, shape,
data_offsets), then the data, which the tensors fill without gap or overlap.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.dtypes import CODES, elements, storage_bytes
from pymerge.errors import CheckpointError
from pymerge.plan import TensorInfo

MAX_HEADER = 100_000_000  # what the safetensors library accepts


@dataclass(frozen=True)
class Entry:
    """A tensor and where its bytes lie, counted from the start of the file."""

    info: TensorInfo
    start: int
    nbytes: int


def read_metadata(path: Path) -> dict[str, str]:
    """The free text of a safetensors header, as a mapping of names to text. Raises CheckpointError."""
    header, _, _ = _read(path)
    metadata = header.get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def read_header(path: Path) -> list[Entry]:
    """Every tensor of a safetensors file, in the order of its bytes.

    Raises CheckpointError that names the file and everything found wrong with its header; the data is not
    read. Stricter than the safetensors library, whose `safe_open` costs an import of numpy: the tests hold
    that the library takes every file that this function takes.
    """
    return _entries(path, *_read(path))


def _read(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as an object, the bytes that follow it, and where they begin."""
    size = _regular_file_size(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _bad(path, f"is {size} bytes long, too short for a safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise _bad(
                path,
                f"announces a header of {length} bytes, and {MAX_HEADER} is the most that is allowed; "
                "it is not a safetensors file, or it is damaged",
            )
        if 8 + length > size:
            raise _bad(
                path,
                f"announces a header of {length} bytes but is only {size} bytes long; "
                "it is truncated or not a safetensors file",
            )
        text = file.read(length)
    return _json_object(path, text), size - 8 - length, 8 + length


def _regular_file_size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: cannot be read (permission denied)")
    return status.st_size


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; download or copy it again")


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    duplicates: set[str] = set()

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in items:
            if name in result:
                duplicates.add(name)
            result[name] = value
        return result

    if text[:1] != b"{":
        raise _bad(path, "has a header that is not a JSON object")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
        if b"\\u" in text:
            json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair is not text
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"has a header that is not JSON ({error})") from None
    if duplicates:
        raise _bad(path, f"names twice in its header: {', '.join(sorted(duplicates))}")
    return header


def _entries(path: Path, header: dict[str, Any], room: int, data: int) -> list[Entry]:
    metadata = header.pop("__metadata__", {})
    problems = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append("__metadata__ is not an object of strings")
    entries = []
    for name, value in header.items():
        try:
            entries.append(_entry(name, value, data))
        except ValueError as error:
            problems.append(f"tensor {name!r} {error}")
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    if not problems:
        problems = _layout_problems(entries, room, data)
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise _bad(path, f"bad safetensors header: {'; '.join(shown)}")
    return entries


def _entry(name: str, value: Any, data: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("does not have exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in CODES:
        raise ValueError(f"has the unknown dtype {code!r}; known are {', '.join(CODES)}")
    if not isinstance(shape, list) or not all(_natural(size) for size in shape):
        raise ValueError(f"has the shape {shape!r}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise ValueError(f"has data_offsets {offsets!r}, not [begin, end]")
    dtype = CODES[code][0]
    if elements(tuple(size for size in shape if size)) >= 1 << 63:
        raise ValueError(f"has the shape {shape!r}, with more elements than can be counted")
    expected = storage_bytes(dtype, tuple(shape))
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"of shape {shape} and dtype {code} takes {expected} bytes, "
            f"but its data_offsets {offsets} give {offsets[1] - offsets[0]}"
        )
    return Entry(TensorInfo(name, dtype, tuple(shape)), data + offsets[0], expected)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _layout_problems(entries: list[Entry], room: int, data: int) -> list[str]:
    problems = []
    position = data
    for entry in entries:
        if entry.start + entry.nbytes > data + room:
            problems.append(
                f"tensor {entry.info.name!r} ends at byte {entry.start + entry.nbytes} of a file of "
                f"{data + room} (truncated?)"
            )
        elif entry.start < position:
            problems.append(f"tensor {entry.info.name!r} overlaps the one before it")
        elif entry.start > position:
            problems.append(
                f"a hole of {entry.start - position} bytes before tensor {entry.info.name!r}"
            )
        position = max(position, entry.start + entry.nbytes)
    if not problems and position < data + room:
        problems.append(f"{data + room - position} bytes after the last tensor belong to none")
    return problems
