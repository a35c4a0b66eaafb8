"""PyTorch's own files (.bin, .pt, .pth, .ckpt). torch is imported when one is opened.

torch finds the tensors in the file, by mapping it. Their bytes are then read as those of any other
file, so that changes of the file are noticed here too.
"""

from __future__ import annotations

import bisect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.header import Entry
from pymerge.checkpoint.memory import forced_io
from pymerge.checkpoint.nested import is_weight, state_dict_in
from pymerge.checkpoint.pickles import check_pickled, record_sizes
from pymerge.checkpoint.stored import FileTensor, InputFile, LoadedTensor, StoredTensor
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import CODE_OF, name_of, storage_bytes
from pymerge.errors import CheckpointError
from pymerge.messages.words import some_names, type_of

if TYPE_CHECKING:
    from torch import Tensor

# A tensor may be stored as a few repeated values (torch.Tensor.expand), so that many bytes more
# than the file holds are tolerated.
_EXPANDED = 64 << 20
_PROTOCOLS = {2, 3}  # of pickles that torch loads without running code; torch.save writes 2
_ELSEWHERE = (
    "Where you trust the file, load it elsewhere and save its tensors alone with"
    " safetensors.torch.save_file"
)
_MAPS = Path("/proc/self/maps")


def open_pickled(file: InputFile) -> tuple[list[StoredTensor], list[str]]:
    """The named tensors of a file, and notes. Raises CheckpointError."""
    loaded, notes = load_pickled(file.path)
    file.check()
    ranges = _Ranges()
    records = record_sizes(file.path)
    found: list[StoredTensor] = []
    cut = []
    for name, tensor in loaded.items():
        info = TensorInfo(name, name_of(tensor.dtype), tuple(tensor.shape))
        storage = ranges.place(tensor.untyped_storage().data_ptr())
        if storage is None:
            found.append(LoadedTensor(info, tensor))
            continue
        # torch compares the two where it reads a record, and not where it maps the file: the
        # tensor would go on with the bytes of the next record.
        if records.get(storage) != tensor.untyped_storage().nbytes():
            cut.append(name)
        start = storage + int(tensor.storage_offset()) * tensor.element_size()
        if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            entry = Entry(info, start, storage_bytes(info.dtype, info.shape))
            found.append(FileTensor(entry, file))
        else:
            found.append(StridedTensor(info, tensor, file, start))
    if cut:
        raise CheckpointError(
            f"{file.path}: has records of other lengths than their tensors ({some_names(cut)}); it"
            " is damaged: download it again, or take its safetensors version"
        )
    return found, notes


class StridedTensor(LoadedTensor):
    """A tensor whose elements are not in order in its file: transposed, a view, conjugated."""

    def __init__(self, info: TensorInfo, tensor: Tensor, file: InputFile, start: int) -> None:
        """tensor: mapped by torch; its bytes are read from the file, from byte `start` on."""
        super().__init__(info, tensor)
        self._file = file
        self._start = start

    @property
    def in_place(self) -> bool:
        return False

    def _whole(self) -> Tensor:
        import torch

        like = self._tensor
        steps = zip(like.shape, like.stride(), strict=True)
        last = sum((size - 1) * step for size, step in steps)
        held = bytearray((last + 1) * like.element_size())
        self._file.read_into(self._start, memoryview(held))
        whole = torch.frombuffer(held, dtype=like.dtype).as_strided(like.shape, like.stride())
        whole = whole.conj() if like.is_conj() else whole
        return torch._neg_view(whole) if like.is_neg() else whole


class _Ranges:
    """Finds the byte of a mapped file behind an address, where the system tells (Linux)."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ranges: list[tuple[int, int]] = []  # (end, byte of the file at the beginning)
        try:
            lines = _MAPS.read_text(errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            addresses, _, offset, _, inode = line.split(maxsplit=5)[:5]
            if inode != "0":
                begin, end = (int(address, 16) for address in addresses.split("-"))
                self._begins.append(begin)
                self._ranges.append((end, int(offset, 16)))

    def place(self, address: int) -> int | None:
        """The byte of the file; None for memory that is of no file."""
        found = bisect.bisect_right(self._begins, address) - 1
        if found < 0 or address >= self._ranges[found][0]:
            return None
        return self._ranges[found][1] + address - self._begins[found]


def load_pickled(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The named tensors of a file, and notes on what else it holds. Mapped where the format allows;
    code in it is never run.

    The state dict may lie in what a training loop saved (`checkpoint.nested`). Raises
    CheckpointError.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: is a PyTorch file and torch is not installed; pip install torch, or convert"
            " it to safetensors"
        ) from None
    others = sorted(check_pickled(path) - _PROTOCOLS)
    if others:  # which torch refuses too, after a warning for its developers
        named = " and ".join("0 or 1" if each == 0 else str(each) for each in others)
        raise CheckpointError(
            f"{path}: is pickled with protocol {named}, which torch reads only by running what the"
            f" file says. {_ELSEWHERE}"
        )
    content: Any = None
    failure: Exception | None = None
    for mapped in (True, False) if _can_be_mapped(path) else (False,):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            failure = None
            break
        except (
            Exception
        ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
            failure = error
    if failure is not None:
        raise CheckpointError(f"{path}: {_why_not(failure)}")
    return _state_dict(path, content)


def _can_be_mapped(path: Path) -> bool:
    """Whether torch can map the file: not from before torch 1.6, nor with foreign byte order, which
    torch swaps in memory; and only where the system tells where it is mapped, since torch's own
    mapping would otherwise be used, and truncation of the file would end the process.
    """
    import torch

    if not _MAPS.exists() and forced_io() != "mmap":
        return False

    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))
        order = reader.get_record("byteorder") if reader.has_record("byteorder") else b""
    except (RuntimeError, ValueError):  # that its text, with names of the file's, is not UTF-8
        return False
    return order in (b"", sys.byteorder.encode())


def _why_not(failure: Exception) -> str:
    """Why torch refuses the file, and what to do. torch's own message suggests running the file's
    code.
    """
    text = str(failure).strip()
    refused = re.search(r"GLOBAL ([\w.]*\w)", text)
    if refused:
        return (
            f"holds more than tensors: unpickling it would call {refused[1]}, and no code of a file"
            f" is run here. {_ELSEWHERE}"
        )
    if "legacy .tar format" in text:
        return (
            "is in the tar format of the first releases of torch, which it reads only by running"
            f" what the file says. {_ELSEWHERE}"
        )
    if "eights only" in text or "weights_only" in text:
        return (
            "is not a file of torch.save, or is damaged; download it again, or take its safetensors"
            " version"
        )
    reason = text.splitlines()[0] if text else type(failure).__name__
    return (
        f"cannot be loaded ({reason}); it is damaged: download it again, or take its safetensors"
        " version"
    )


def _state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], list[str]]:
    import torch

    from pymerge.ops.memory import why_unreadable

    problems = []
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type_of(content)}, not named tensors")
    try:
        found = state_dict_in(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    content = found.content
    tensors = {}
    odd = [
        name
        for name, value in content.items()
        if _holds_weights(value) and not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if odd:
        problems.append(
            f"{path}: has tensors that are no entries of their own, by names of text"
            f" ({some_names(map(repr, odd))}); save a flat state dict"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            continue
        # Views that are lazily conjugated or negated are read as what they stand for
        # (`StridedTensor`).
        reason = why_unreadable(value.resolve_neg())
        dtype = name_of(value.dtype)
        if reason:
            problems.append(f"{path}: tensor {name!r} {reason}, and save the file again")
        elif dtype not in CODE_OF:
            problems.append(
                f"{path}: tensor {name!r} is {dtype}; convert it, and save the file again"
            )
        elif value.numel() * value.element_size() > path.stat().st_size + _EXPANDED:
            problems.append(
                f"{path}: tensor {name!r} of {tuple(value.shape)} repeats a few values in memory"
                " and would take more than its file; store it as one number, or contiguous"
            )
        else:
            tensors[name] = value.detach()
    if problems:
        raise CheckpointError(problems)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors, [] if found.note is None else [f"{path}: {found.note}"]


def _holds_weights(value: Any) -> bool:
    """Whether a value is, or contains, a tensor of a model."""
    left, seen = [value], set()
    while left:
        each = left.pop()
        if is_weight(each):
            return True
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Mapping):
            left += each.values()
        elif isinstance(each, (list, tuple)):
            left += each
    return False
