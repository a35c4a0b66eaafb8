"""Checks a PyTorch file before torch loads it: `weights_only` runs no code but may allocate any
amount of memory.

torch.save writes a zip of uncompressed records, one of which is a pickle; before torch 1.6 it wrote
consecutive pickles followed by the tensors' bytes.
"""

from __future__ import annotations

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
_LOCAL_HEADER = 30  # bytes before the name of a zip's record
_OLD_PICKLES = 5  # magic number, protocol, system, content, keys of the storages


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
            for _ in range(_OLD_PICKLES):
                protocols.add(_check_operations(_Bounded(file, size), most_operations))
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    except _Refused as error:
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
                file.seek(record.header_offset)
                header = file.read(_LOCAL_HEADER)
                named = int.from_bytes(header[26:28], "little")
                extra = int.from_bytes(header[28:30], "little")
                found[record.header_offset + _LOCAL_HEADER + named + extra] = record.file_size
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    except (ValueError, zipfile.BadZipFile, NotImplementedError):
        raise CheckpointError(
            f"{path}: is a zip file whose list of records is damaged; download it again"
        ) from None
    return found


class _Refused(Exception):
    """Why a file is not passed to torch."""


def _check_zip(file: IO[bytes], most_operations: int, protocols: set[int]) -> None:
    size = file.seek(0, 2)
    if _directory_bytes(file, size) > min(size, _MOST_DIRECTORY):
        raise _Refused(
            "is a zip file whose list of records is damaged or too long; download it again"
        )
    with zipfile.ZipFile(file) as records:
        found = records.infolist()
        for record in found:
            if record.compress_type != zipfile.ZIP_STORED:
                raise _Refused(
                    "is a zip file with compressed records, which torch.save does not write; unpack"
                    " it where it was packed again, or save its tensors anew"
                )
        if sum(record.file_size for record in found) > size:
            raise _Refused(
                "is a zip file whose records are longer than the file; download it again"
            )
        for record in found:
            if record.filename.lower().endswith((".pkl", "/data")):
                with records.open(record) as pickled:
                    bounded = _Bounded(pickled, record.file_size)
                    protocols.add(_check_operations(bounded, most_operations))


def _directory_bytes(file: IO[bytes], size: int) -> int:
    """The length of the zip's directory, from the end of the file; 0 where it has no zip's end."""
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    end, wide = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    found = [int.from_bytes(tail[end + 12 : end + 16], "little")] if end >= 0 else []
    found += [int.from_bytes(tail[wide + 40 : wide + 48], "little")] if wide >= 0 else []
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


def _check_operations(pickled: _Bounded, most_operations: int) -> int:
    """Scan one pickle to its end without executing it, and return its protocol; of 0 and 1, which
    say none, 0. ValueError where it is none.
    """
    protocol = 0
    tuples: set[object] = set()  # the memo's numbers of tuples
    repeated = puts = 0
    before = ""
    stream: Any = pickled  # has what genops uses of a file
    argument: Any
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        name = operation.name
        if name == "PROTO":
            protocol = argument
        if count > most_operations:
            raise _Refused(
                f"holds a pickle of more than {most_operations} operations, where a state dict has"
                " some 40 a tensor; it is not loaded: take its safetensors version"
            )
        if isinstance(argument, str) and argument.rpartition(" ")[2] == "bytearray":
            raise _Refused("holds more than tensors (a bytearray); save its tensors alone")
        if "PUT" in name or name == "MEMOIZE":
            if before not in _NO_TUPLE:
                tuples.add(puts if name == "MEMOIZE" else argument)
            puts += 1
        elif ("GET" in name and argument in tuples) or (name == "DUP" and before not in _NO_TUPLE):
            # Tuples that contain the same tuple twice, thirty deep, make a dict key of 100 bytes
            # take a minute to hash.
            repeated += 1
            if repeated > _MOST_REPEATED:
                raise _Refused("holds tuples of tuples that repeat; save its tensors alone")
        before = name
    return protocol
