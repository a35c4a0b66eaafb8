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
# Operations after which the object that is memoised is no tuple.
_NO_TUPLE = frozenset(
    "BINUNICODE SHORT_BINUNICODE UNICODE BINSTRING SHORT_BINSTRING STRING BINBYTES SHORT_BINBYTES"
    " GLOBAL STACK_GLOBAL EMPTY_DICT EMPTY_LIST DICT LIST REDUCE NEWOBJ BINPERSID BUILD"
    " LONG1".split()
)
_MOST_DIRECTORY = 16 << 20  # bytes of a zip's list of records, some 100 a record
_TAIL = 1 << 17
_OLD_PICKLES = 5  # magic number, protocol, system, content, keys of the storages


class Refused(Exception):
    """Why a file, or a part of one, is not unpickled."""


def check_operations(pickled: bytes, most_operations: int = MOST_OPERATIONS) -> None:
    """Scan one pickle, without executing it. Raises `Refused` where unpickling it would take far
    more memory than its size, and ValueError where it is none.
    """
    _check_operations(_Bounded(io.BytesIO(pickled), len(pickled)), most_operations)


def check_pickled(path: Path, most_operations: int = MOST_OPERATIONS) -> None:
    """Raises CheckpointError for a file that torch.save did not write, or that would take far more
    memory than its size. most_operations: of one pickle.
    """
    try:
        with open_regular(path) as file:
            if file.read(2) == b"PK":
                check_archive(file, most_operations)
                return
            size = file.seek(0, 2)
            file.seek(0)
            for _ in range(_OLD_PICKLES):
                _check_operations(_Bounded(file, size), most_operations)
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    except Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError):
        pass  # torch reports what is wrong


def check_archive(file: IO[bytes], most_operations: int = MOST_OPERATIONS) -> None:
    """The same for every record of a zip of torch.save. Also raises BadZipFile where it is none."""
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
                    _check_operations(_Bounded(pickled, record.file_size), most_operations)


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


class _Bounded:
    """A file from which no more is requested than it holds: memory for a damaged length would be
    allocated before the read.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self.readline = file.readline
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size - self.tell()))


def _check_operations(pickled: _Bounded, most_operations: int) -> None:
    """Scan one pickle to its end without executing it. ValueError where it is none."""
    tuples: set[object] = set()  # the memo's numbers of tuples
    repeated = puts = 0
    before = ""
    stream: Any = pickled  # has what genops uses of a file
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        name = operation.name
        if count > most_operations:
            raise Refused(
                f"holds a pickle of more than {most_operations} operations, where a state dict has"
                " some 40 a tensor; it is not loaded: take its safetensors version"
            )
        if isinstance(argument, str) and argument.rpartition(" ")[2] == "bytearray":
            raise Refused("holds more than tensors (a bytearray); save its tensors alone")
        if "PUT" in name or name == "MEMOIZE":
            if isinstance(argument, int) and argument > count:
                # Python's unpickler allocates a table for all numbers up to the largest
                raise Refused("holds a pickle whose numbers are out of order; it is not loaded")
            if before not in _NO_TUPLE:
                tuples.add(puts if name == "MEMOIZE" else argument)
            puts += 1
        elif ("GET" in name and argument in tuples) or (name == "DUP" and before not in _NO_TUPLE):
            # Tuples that contain the same tuple twice, thirty deep, make a dict key of 100 bytes
            # take a minute to hash.
            repeated += 1
            if repeated > _MOST_REPEATED:
                raise Refused("holds tuples of tuples that repeat; save its tensors alone")
        before = name
