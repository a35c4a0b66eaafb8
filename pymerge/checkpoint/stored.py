"""Stored tensors of an input, in a mapped safetensors file or a loaded PyTorch file."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.checkpoint.header import Entry
from pymerge.checkpoint.identity import FileIdentity, WatchedFile
from pymerge.checkpoint.memory import Region, prefers_reads
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import storage_bytes
from pymerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class InputFile(WatchedFile):
    """A file of tensors, mapped as a whole on first use and unmapped by `close`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.better_read = prefers_reads(path)
        self._region: Region | None = None
        self._lock = threading.Lock()

    @property
    def region(self) -> Region:
        """The mapped file. Raises CheckpointError where the file changed before it was mapped."""
        with self._lock:
            if self._region is None:
                with self.opened() as fd:
                    self._region = Region.of_input(fd)
            else:
                self.check()
            return self._region

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` from byte `start` on."""
        with self.opened() as fd:
            if not _filled(fd, start, target):
                raise self.changed("was truncated")

    def check(self) -> None:
        super().check()
        if self._region is not None and self._region.lost:
            raise CheckpointError(
                f"{self.path}: could not be read to its end; look for errors of its disk (dmesg),"
                " or copy it again"
            )

    def close(self) -> None:
        if self._region is not None:
            self._region.close()
            self._region = None


class HeldFile(WatchedFile):
    """A file that is held open and read, not mapped: it survives a rename, and truncation cannot
    end the process.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self.opened() as fd:
            self._file = os.fdopen(os.dup(fd), "rb", buffering=0)

    def read(self, start: int, nbytes: int) -> bytearray:
        """The bytes from `start` on. CheckpointError where the file changed since it was opened."""
        held = bytearray(nbytes)
        fd = self._file.fileno()
        whole = _filled(fd, start, memoryview(held))
        what = self.identity.content_changed(FileIdentity.of(os.fstat(fd)))
        if what or not whole:
            raise self.changed(what or "was truncated")
        return held


def _filled(fd: int, start: int, target: memoryview) -> bool:
    """Fill `target` from byte `start` on; False where the file is too short."""
    done = 0
    while done < len(target):
        got = os.preadv(fd, [target[done : done + (64 << 20)]], start + done)
        if got == 0:
            return False
        done += got
    return True


class StoredTensor:
    """One tensor of an input, in a safetensors file or in a loaded PyTorch file."""

    at_once = False  # whether several threads may read it

    def __init__(self, info: TensorInfo, nbytes: int) -> None:
        self.info = info
        self.nbytes = nbytes

    @property
    def in_place(self) -> bool:
        """Whether the bytes are contiguous at `address`, at any alignment."""
        return True

    @property
    def copies(self) -> bool:
        """Whether to use `read_into` rather than `address`."""
        return not self.in_place

    def address(self) -> int:
        """The address of the mapped bytes."""
        raise NotImplementedError

    def expect(self, offset: int, length: int) -> None:
        """Bring these bytes into memory; waits for the disk."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Copy the bytes from `offset` on."""
        raise NotImplementedError


class FileTensor(StoredTensor):
    at_once = True

    def __init__(self, entry: Entry, file: InputFile) -> None:
        super().__init__(entry.info, entry.nbytes)
        self.file = file
        self.start = entry.start

    @property
    def copies(self) -> bool:
        return self.file.better_read

    def address(self) -> int:
        return self.file.region.address + self.start

    def expect(self, offset: int, length: int) -> None:
        region = self.file.region
        region.expect(self.start + offset, length)
        region.populate(self.start + offset, length)

    def read_into(self, offset: int, target: memoryview) -> None:
        self.file.read_into(self.start + offset, target)


class LoadedTensor(StoredTensor):
    def __init__(self, info: TensorInfo, tensor: Tensor) -> None:
        super().__init__(info, storage_bytes(info.dtype, info.shape))
        self._tensor = tensor
        self._flat: Tensor | None = None  # the bytes in order, while they are being read

    @property
    def in_place(self) -> bool:
        tensor = self._tensor
        return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()

    def address(self) -> int:
        return self._tensor.data_ptr()

    def _whole(self) -> Tensor:
        return self._tensor

    def read_into(self, offset: int, target: memoryview) -> None:
        import torch

        if not len(target):
            return
        if self._flat is None:
            plain = self._whole().resolve_conj().resolve_neg().contiguous()
            self._flat = plain.reshape(-1).view(torch.uint8)
        end = offset + len(target)
        torch.frombuffer(target, dtype=torch.uint8).copy_(self._flat[offset:end])
        if end == self.nbytes:
            self._flat = None
