"""Checks a PyTorch file before torch loads it: `weights_only` runs no code but may allocate any
amount of memory.

torch.save writes a zip of uncompressed records, one of which is a pickle; before torch 1.6 it wrote
consecutive pickles followed by the tensors' bytes.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

from pymerge.checkpoint.files import open_regular, reason
from pymerge.errors import CheckpointError

# A state dict takes about 40 operations per tensor; each can create an object of some 100 bytes.
MOST_OPERATIONS = 2_000_000
_MOST_REPEATED = 20


def _codes(*names: str) -> frozenset[int]:
    return frozenset(ord(each.code) for each in pickletools.opcodes if each.name in names)


_LINES = -100  # of an argument that ends with its line; other negative sizes are those of a length
_LENGTHS = {-2: -1, -3: -4, -4: -4, -5: -8, -1: _LINES}  # by pickletools' own numbers


def _argument_sizes() -> list[int | None]:
    """For each code, the size of its argument; None for a code of no operation."""
    found: list[int | None] = [None] * 256
    for each in pickletools.opcodes:
        size = 0 if each.arg is None else each.arg.n
        found[ord(each.code)] = size if size >= 0 else _LENGTHS[size]
    return found


_ARGUMENTS = _argument_sizes()
_READERS = {ord(each.code): each.arg.reader for each in pickletools.opcodes if each.arg is not None}
_PUTS = _codes("PUT", "BINPUT", "LONG_BINPUT")
_GETS = _codes("GET", "BINGET", "LONG_BINGET")
_NUMBERED = _PUTS | _GETS
_TEXTS = _codes("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING")
_PAIRS = _codes("GLOBAL", "INST")
_SIGNED = _codes("LONG4", "BINSTRING")
(_MEMOIZE,), (_DUP,), (_STOP,), (_PROTO,) = map(_codes, ("MEMOIZE", "DUP", "STOP", "PROTO"))
# Operations after which the object that is memoised is no tuple.
_NO_TUPLE = _codes(
    *"BINUNICODE SHORT_BINUNICODE UNICODE BINSTRING SHORT_BINSTRING STRING BINBYTES SHORT_BINBYTES"
    " GLOBAL STACK_GLOBAL EMPTY_DICT EMPTY_LIST DICT LIST REDUCE NEWOBJ BINPERSID BUILD"
    " LONG1".split()
)
_BLOCK = 1 << 20
_HEAD = 1 << 12  # bytes; a line of an argument is not longer
_SHORT = 16  # bytes at the end of a text that are looked at
_MOST_DIRECTORY = 16 << 20  # bytes of a zip's list of records, some 100 a record
_TAIL = 1 << 17
_LOCAL_HEADER = 30  # bytes before the name of a zip's record
_OLD_PICKLES = 5  # magic number, protocol, system, content, keys of the storages


class Refused(Exception):
    """Why a file, or a part of one, is not unpickled."""


def check_operations(pickled: bytes, most_operations: int = MOST_OPERATIONS) -> None:
    """Scan one pickle, without executing it. Raises `Refused` where unpickling it would take far
    more memory than its size, and ValueError where it is none.
    """
    _Scanner(io.BytesIO(pickled), len(pickled)).check(most_operations)


def check_pickled(path: Path, most_operations: int = MOST_OPERATIONS) -> set[int]:
    """The protocols of a file's pickles, as far as they are whole. Raises CheckpointError for a
    file that torch.save did not write, or that would take far more memory than its size.

    most_operations: of one pickle.
    """
    protocols: set[int] = set()
    try:
        with open_regular(path) as file:
            if file.read(2) == b"PK":
                _check_zip(file, most_operations, protocols)
                return protocols
            size = file.seek(0, 2)
            file.seek(0)
            scanner = _Scanner(file, size)
            for _ in range(_OLD_PICKLES):
                protocols.add(scanner.check(most_operations))
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    except Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError):
        pass  # torch reports what is wrong
    return protocols


def record_sizes(path: Path) -> dict[int, int]:
    """Of each record of a zip file: the byte at which its content begins -> its length. Empty for
    other files. Raises CheckpointError.
    """
    found = {}
    try:
        with open_regular(path) as file:
            if file.read(2) != b"PK":
                return {}
            with zipfile.ZipFile(file) as records:
                every = records.infolist()
            for record in every:
                found[record_start(file, record)] = record.file_size
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    except (ValueError, zipfile.BadZipFile, NotImplementedError):
        raise CheckpointError(
            f"{path}: is a zip file whose list of records is damaged; download it again"
        ) from None
    return found


def record_start(file: IO[bytes], record: zipfile.ZipInfo) -> int:
    """The byte of a zip file at which a record's content begins."""
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER)
    named, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return record.header_offset + _LOCAL_HEADER + named + extra


def _check_zip(file: IO[bytes], most_operations: int, protocols: set[int]) -> None:
    size = file.seek(0, 2)
    if directory_bytes(file, size) > min(size, _MOST_DIRECTORY):
        raise Refused(
            "is a zip file whose list of records is damaged or too long; download it again"
        )
    with zipfile.ZipFile(file) as records:
        found = records.infolist()
        for record in found:
            if record.compress_type != zipfile.ZIP_STORED:
                raise Refused(
                    "is a zip file with compressed records, which torch.save does not write; unpack"
                    " it where it was packed again, or save its tensors anew"
                )
        if sum(record.file_size for record in found) > size:
            raise Refused("is a zip file whose records are longer than the file; download it again")
        for record in found:
            if record.filename.lower().endswith((".pkl", "/data")):
                with records.open(record) as pickled:
                    scanner = _Scanner(pickled, record.file_size)
                    protocols.add(scanner.check(most_operations))


def directory_bytes(file: IO[bytes], size: int, tail: int = _TAIL) -> int:
    """The length of the zip's directory, from the last `tail` bytes; 0 where these have no zip's
    end.
    """
    file.seek(max(0, size - tail))
    last = file.read(tail)
    end, wide = last.rfind(b"PK\x05\x06"), last.rfind(b"PK\x06\x06")
    found = [int.from_bytes(last[end + 12 : end + 16], "little")] if end >= 0 else []
    found += [int.from_bytes(last[wide + 40 : wide + 48], "little")] if wide >= 0 else []
    return max((length for length in found if length != 0xFFFFFFFF), default=0)


class _Scanner:
    """Scans the pickles that lie one behind the other in a file. Little more than a block of it is
    held: memory for a damaged length would be allocated before the read.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        """size: of the file."""
        self._file = file
        self._left = size - file.tell()
        self._buffer = b""
        self._at = 0

    def check(self, most_operations: int) -> int:
        """Scan one pickle to its end without executing it, and return its protocol; of 0 and 1,
        which say none, 0. ValueError where it is none.

        Reads as pickletools.genops does, in a third of its time, which for a checkpoint of 256
        processes was 50 s.
        """
        tuples: set[object] = set()  # the memo's numbers of tuples
        repeated = puts = count = before = protocol = 0
        buffer, at, last = self._buffer, self._at, -1
        while True:
            if at > last:
                buffer, at = self._more(buffer, at)
                # Behind this another block is read, so that no operation's length is cut.
                last = len(buffer) - (_HEAD if self._left else 0)
            if at >= len(buffer):
                raise ValueError("ends before its last operation")
            code = buffer[at]
            at += 1
            count += 1
            if count > most_operations:
                raise Refused(
                    f"holds a pickle of more than {most_operations} operations, where a state dict"
                    " has some 40 a tensor; it is not loaded: take its safetensors version"
                )
            size = _ARGUMENTS[code]
            number = -1
            if size is None:
                raise ValueError(f"has no operation {code}")
            if size > 0:
                if code in _NUMBERED:
                    number = int.from_bytes(buffer[at : at + size], "little")
                elif code == _PROTO:
                    protocol = int.from_bytes(buffer[at : at + size], "little")
                at += size
            elif size < 0:
                if size == _LINES:
                    end = self._line_end(buffer, at, 2 if code in _PAIRS else 1)
                    argument = _argument(code, buffer[at:end])
                    at = end
                    if code in _NUMBERED and isinstance(argument, int):
                        number = argument
                else:
                    end = at - size
                    length = int.from_bytes(buffer[at:end], "little", signed=code in _SIGNED)
                    if length < 0:
                        raise ValueError("has a negative length")
                    at = end + length
                    argument = buffer[max(end, at - _SHORT) : at] if code in _TEXTS else b""
                    if at > len(buffer):
                        argument = b""
                        self._skip(at - len(buffer))
                        buffer, at, last = b"", 0, -1
                if _is_bytearray(argument):
                    raise Refused("holds more than tensors (a bytearray); save its tensors alone")
            if code == _MEMOIZE or code in _PUTS:
                if number > count:
                    # Python's unpickler allocates a table for all numbers up to the largest.
                    raise Refused("holds a pickle whose numbers are out of order; it is not loaded")
                if before not in _NO_TUPLE:
                    tuples.add(puts if code == _MEMOIZE else number)
                puts += 1
            elif (code in _GETS and number in tuples) or (code == _DUP and before not in _NO_TUPLE):
                # Tuples that contain the same tuple twice, thirty deep, make a dict key of 100
                # bytes take a minute to hash.
                repeated += 1
                if repeated > _MOST_REPEATED:
                    raise Refused("holds tuples of tuples that repeat; save its tensors alone")
            elif code == _STOP:
                self._buffer, self._at = buffer, at
                return protocol
            before = code

    def _more(self, buffer: bytes, at: int) -> tuple[bytes, int]:
        """What is left of a block, and another one."""
        block = self._file.read(min(_BLOCK, self._left))
        self._left = self._left - len(block) if block else 0
        return buffer[at:] + block, 0

    def _skip(self, count: int) -> None:
        if count > self._left:
            raise ValueError("ends in an operation")
        while count:
            block = self._file.read(min(_BLOCK, count))
            if not block:
                raise ValueError("ends in an operation")
            self._left -= len(block)
            count -= len(block)

    def _line_end(self, buffer: bytes, at: int, lines: int) -> int:
        for _ in range(lines):
            found = buffer.find(b"\n", at)
            if found < 0:
                if not self._left:
                    raise ValueError("ends in a line")
                raise Refused("holds a pickle with a very long line; it is not loaded")
            at = found + 1
        return at


def _argument(code: int, lines: bytes) -> Any:
    """The value of a text argument, as pickletools reads it."""
    return _READERS[code](io.BytesIO(lines))


def _is_bytearray(argument: Any) -> bool:
    """Whether text names the class, by itself or behind its module."""
    if isinstance(argument, str):
        argument = argument.encode("utf-8", "replace")
    return isinstance(argument, bytes) and argument.rpartition(b" ")[2] == b"bytearray"
