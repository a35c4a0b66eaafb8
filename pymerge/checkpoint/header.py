"""Reads the safetensors header and checks it against the file; nothing in it is trusted.

Layout: 8 bytes with the header's length (little-endian), that many bytes of JSON (name -> dtype,
    shape, data_offsets), then the data, which the tensors fill without gap or overlap.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import open_regular, reason
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import CODES, elements, storage_bytes
from pymerge.errors import CheckpointError
from pymerge.messages.words import some_names

MAX_HEADER = 100_000_000  # what the safetensors library accepts
MAX_NAME = 4096
_MOST_PROBLEMS = 4
_SHOWN = 4
_BLANK = re.compile(rb"[ \t\n\r]*")
# Dtype, shape and offsets hold no braces; a thousand dimensions fit.
_VALUE = re.compile(rb"\{[^{}]{0,8192}\}")
_SIMPLE = re.compile(rb'[\w.+-]{1,64}|"[^"\\]{0,64}"')
_PLAIN = re.compile(rb"[ -!#-\[\]-~]*")  # text that stands for itself: no escapes, no controls
# An entry as safetensors writes it, with its name: what a header is made of, at a third of the time
# that its parts take.
_NUMBER = rb"(?:0|[1-9]\d{0,17})"
_USUAL = re.compile(
    rb'"([\w./-]{1,256})":\{"dtype":"(\w{1,16})","shape":\[((?:%(n)b(?:,%(n)b){0,31})?)\],'
    rb'"data_offsets":\[(%(n)b),(%(n)b)\]\}' % {b"n": _NUMBER}
)
_BACKSLASH = 0x5C
_ESCAPE = 6  # length of the longest escape, as in \u00e9
_NOT_EXACTLY = "does not have exactly dtype, shape and data_offsets"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and the range of its bytes, from the start of the file."""

    info: TensorInfo
    start: int
    nbytes: int


@dataclass(frozen=True)
class Limits:
    """What a header may hold, beside its length, and how it is read.

    tensors: a header of 100 MB can hold millions of empty ones. The largest models have 140,000, in
        dozens of files.
    names: memory for names and shapes as Python stores them: 4 bytes for every character of a name
        with an emoji or the like. 140,000 names of 100 letters take 14 MB.
    piece: bytes of free text that are decoded at a time.
    """

    tensors: int = 1 << 18
    names: int = 64 << 20
    piece: int = 1 << 16


LIMITS = Limits()


def read_header(path: Path, limits: Limits = LIMITS) -> list[Entry]:
    """Every tensor of a safetensors file, in the order of its bytes.

    Raises CheckpointError that names the file and everything found wrong with its header; the data
    is not read. Stricter than the safetensors library, whose `safe_open` costs an import of numpy:
    the tests hold that the library takes every file that this function takes.
    """
    return _Scan(path, limits).checked()


def read_all(path: Path, limits: Limits = LIMITS) -> tuple[dict[str, bytes], list[Entry]]:
    """As `read_header`, preceded by the header's free text: a mapping of names to UTF-8."""
    scan = _Scan(path, limits, keeps_metadata=True)
    return scan.metadata, scan.checked()


class _Scan:
    """Scans a header entry by entry, and holds no more than its text and the valid entries."""

    def __init__(self, path: Path, limits: Limits, *, keeps_metadata: bool = False) -> None:
        self.path = path
        self._limits = limits
        self.metadata: dict[str, bytes] = {}
        self._keeps_metadata = keeps_metadata
        self.entries: list[Entry] = []
        self.problems: list[str] = []
        self._more = 0  # problems that are not listed
        self._names: set[str] = set()
        self._memory = 0  # of names and shapes
        self._twice: list[str] = []
        self._text, self._room = self._read()
        self._data = 8 + len(self._text)
        self._at = 0
        try:
            self._scan()
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise _bad(path, f"has a header that is not JSON ({error})") from None
        finally:
            self._text = b""
        if self._twice:
            raise _bad(path, f"names twice in its header: {', '.join(sorted(self._twice))}")

    def checked(self) -> list[Entry]:
        """The entries in the order of their bytes."""
        self.entries.sort(key=lambda entry: (entry.start, entry.nbytes))
        if not self.problems:
            for problem in _layout_problems(self.entries, self._room, self._data):
                self._problem(problem)
        if self.problems:
            more = [f"and {self._more} more"] if self._more else []
            raise _bad(self.path, f"bad safetensors header: {'; '.join([*self.problems, *more])}")
        return self.entries

    def _read(self) -> tuple[bytes, int]:
        """The header's text, and the number of bytes that follow it."""
        path = self.path
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                if len(prefix) < 8:
                    raise _bad(path, f"is {size} bytes long, too short for a safetensors file")
                length = int.from_bytes(prefix, "little")
                if length > MAX_HEADER:
                    raise _bad(
                        path,
                        f"announces a header of {length} bytes, and {MAX_HEADER} is the most that"
                        " is allowed; it is not a safetensors file, or it is damaged",
                    )
                text = file.read(length) if 8 + length <= size else b""
        except OSError as error:
            raise CheckpointError(f"{path}: {reason(error)}") from None
        if len(text) < length:
            raise _bad(
                path,
                f"announces a header of {length} bytes but is only {size} bytes long; "
                "it is truncated or not a safetensors file",
            )
        return text, size - 8 - length

    def _scan(self) -> None:
        """Raises ValueError for what is not JSON, CheckpointError for what is not a header."""
        if self._text[:1] != b"{":
            raise _bad(self.path, "has a header that is not a JSON object")
        self._at = 1
        if self._next() == b"}":
            self._end()
            return
        while True:
            usual = _USUAL.match(self._text, self._at)
            if usual is not None and usual[1] != b"__metadata__":
                self._at = usual.end()
                name = usual[1].decode("ascii")
                self._take(sys.getsizeof(name))
                shape = [int(size) for size in usual[3].split(b",") if size]
                offsets = [int(usual[4]), int(usual[5])]
                self._add(name, usual[2].decode("ascii"), shape, offsets)
            else:
                name = self._name()
                self._expect(b":")
                if name == "__metadata__":
                    self._metadata()
                else:
                    self._entry(name)
            if name in self._names and len(self._twice) < _SHOWN:
                self._twice.append(name)
            self._names.add(name)
            if len(self._names) > self._limits.tensors:
                raise _bad(self.path, f"has a header of more than {self._limits.tensors} tensors")
            if self._expect(b",}") == b"}":
                self._end()
                return

    def _next(self) -> bytes:
        """The next non-blank character, which is not consumed."""
        blank = _BLANK.match(self._text, self._at)
        assert blank is not None
        self._at = blank.end()
        return self._text[self._at : self._at + 1]

    def _expect(self, allowed: bytes) -> bytes:
        found = self._next()
        if not found or found not in allowed:
            raise ValueError(
                f"{' or '.join(map(repr, allowed.decode()))} is expected at byte {self._at}"
            )
        self._at += 1
        return found

    def _end(self) -> None:
        self._at += self._text[self._at : self._at + 1] == b"}"
        if self._next():
            raise ValueError(f"something follows its end at byte {self._at}")

    def _string(self) -> tuple[int, int]:
        """Skip a string; returns its first and last position, without the quotes."""
        self._expect(b'"')
        begin = end = self._at
        while True:
            end = self._text.find(b'"', end)
            if end < 0:
                raise ValueError(f"a string without an end at byte {begin}")
            slash = end
            while self._text[slash - 1] == _BACKSLASH:
                slash -= 1
            if (end - slash) % 2 == 0:
                break
            end += 1
        self._at = end + 1
        return begin, end

    def _name(self) -> str:
        begin, end = self._string()
        if end - begin > MAX_NAME:
            raise ValueError(f"a name of more than {MAX_NAME} bytes at byte {begin}")
        text = _decoded(self._text[begin:end])
        text.encode()  # raises for half a surrogate pair
        self._take(sys.getsizeof(text))
        return text

    def _take(self, nbytes: int) -> None:
        self._memory += nbytes
        if self._memory > self._limits.names:
            raise _bad(
                self.path,
                f"has a header whose names and shapes take more than {self._limits.names}"
                " bytes of memory, which those of no model do",
            )

    def _pieces(self, begin: int, end: int) -> Iterator[bytes]:
        """A string in UTF-8, in pieces: as Python text it could take 4 bytes per letter."""
        while begin < end:
            stop = self._cut(begin, end)
            text = _decoded(self._text[begin:stop])
            if stop < end and len(text) > 1 and "\ud800" <= text[-1] <= "\udbff":
                text, stop = text[:-1], stop - _ESCAPE  # keep the surrogate pair together
            yield text.encode()
            begin = stop

    def _cut(self, begin: int, end: int) -> int:
        """Where a piece that starts at `begin` may end: inside no escape and no character."""
        stop = begin + self._limits.piece
        if stop >= end:
            return end
        slash = self._text.rfind(b"\\", stop - _ESCAPE, stop)
        if slash < 0:
            return next(
                (at for at in range(stop, stop - 4, -1) if not _within(self._text[at])), stop
            )
        first = slash
        while first > begin and self._text[first - 1] == _BACKSLASH:
            first -= 1
        return first if first > begin else begin + (slash + 1 - begin) // 2 * 2

    def _metadata(self) -> None:
        if self._next() != b"{":
            self._simple()
            self._problem("__metadata__ is not an object of strings")
            return
        self._at += 1
        if self._next() == b"}":
            self._at += 1
            return
        found: set[str] = set()
        while True:
            key = self._name()
            self._expect(b":")
            if self._next() != b'"':
                self._simple()
                self._problem("__metadata__ is not an object of strings")
            else:
                if key in found and len(self._twice) < _SHOWN:
                    self._twice.append(f"__metadata__.{key}")
                found.add(key)
                pieces = self._pieces(*self._string())
                if self._keeps_metadata:
                    self.metadata[key] = b"".join(pieces)
                else:
                    deque(pieces, maxlen=0)  # checked nevertheless
            if len(found) > self._limits.tensors:
                raise _bad(
                    self.path, f"has __metadata__ of more than {self._limits.tensors} entries"
                )
            if self._expect(b",}") == b"}":
                return

    def _entry(self, name: str) -> None:
        self._next()
        found = _VALUE.match(self._text, self._at)
        if found is None:
            self._simple()
            self._problem_of(name, _NOT_EXACTLY)
            return
        self._at = found.end()
        value = _DECODER.decode(found[0].decode("utf-8"))
        if set(value) == {"dtype", "shape", "data_offsets"}:
            self._add(name, value["dtype"], value["shape"], value["data_offsets"])
        else:
            self._problem_of(name, _NOT_EXACTLY)

    def _add(self, name: str, code: Any, shape: Any, offsets: Any) -> None:
        try:
            entry = _entry(name, code, shape, offsets, self._data)
            self._take(8 * len(entry.info.shape))
            self.entries.append(entry)
        except _EntryError as error:
            self._problem_of(name, str(error))

    def _simple(self) -> None:
        """Skip a number, a constant or a short string."""
        self._next()
        found = _SIMPLE.match(self._text, self._at)
        if found is None:
            raise ValueError(f"a value that is no tensor's at byte {self._at}")
        _DECODER.decode(found[0].decode("utf-8"))
        self._at = found.end()

    def _problem_of(self, name: str, text: str) -> None:
        self._problem(f"tensor {name if len(name) <= 200 else f'{name[:200]}...'!r} {text}")

    def _problem(self, text: str) -> None:
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(text)
        else:
            self._more += 1


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a name is in an object twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _within(byte: int) -> bool:
    """Whether a byte continues a UTF-8 character."""
    return 0x80 <= byte < 0xC0


def _decoded(raw: bytes) -> str:
    if _PLAIN.fullmatch(raw):
        return raw.decode("ascii")
    text: str = _DECODER.decode(f'"{raw.decode("utf-8")}"')
    return text


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; download or copy it again")


class _EntryError(ValueError):
    """A problem of one tensor."""


def _entry(name: str, code: Any, shape: Any, offsets: Any, data: int) -> Entry:
    if not isinstance(code, str) or code not in CODES:
        raise _EntryError(f"has the unknown dtype {code!r}; known are {', '.join(CODES)}")
    if not isinstance(shape, list) or not all(_natural(size) for size in shape):
        raise _EntryError(f"has the shape {shape!r}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise _EntryError(f"has data_offsets {offsets!r}, not [begin, end]")
    dtype = CODES[code][0]
    if elements(tuple(size for size in shape if size)) >= 1 << 63:
        raise _EntryError(f"has the shape {shape!r}, with more elements than can be counted")
    try:
        expected = storage_bytes(dtype, tuple(shape))
    except ValueError as error:
        raise _EntryError(str(error)) from None
    if offsets[1] - offsets[0] != expected:
        raise _EntryError(
            f"of shape {shape} and dtype {code} takes {expected} bytes, "
            f"but its data_offsets {offsets} give {offsets[1] - offsets[0]}"
        )
    return Entry(TensorInfo(name, dtype, tuple(shape)), data + offsets[0], expected)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _layout_problems(entries: list[Entry], room: int, data: int) -> list[str]:
    problems = []
    beyond = [entry for entry in entries if entry.start + entry.nbytes > data + room]
    if len(beyond) > 1:
        names = some_names(repr(entry.info.name) for entry in beyond)
        return [f"tensors {names} end beyond byte {data + room}, where the file ends (truncated?)"]
    position = data
    for entry in entries:
        if entry.start + entry.nbytes > data + room:
            problems.append(
                f"tensor {entry.info.name!r} ends at byte {entry.start + entry.nbytes} of a file of"
                f" {data + room} (truncated?)"
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
