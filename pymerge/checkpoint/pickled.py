"""PyTorch's own files (.bin, .pt, .pth). The only module here that imports torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.dtypes import BITS
from pymerge.checkpoint.pickles import check_pickled
from pymerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# A tensor may be stored as a few values that repeat (torch.Tensor.expand). So many bytes more than the file has are let pass.
_EXPANDED = 64 << 20


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, mapped and not read where the format allows; code in it is never run.

    A state dict may lie under "state_dict" or "model". Raises CheckpointError.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: is a PyTorch file and torch is not installed; pip install torch, or convert it to safetensors"
        ) from None
    check_pickled(path)
    content: Any = None
    failure: Exception | None = None
    for mapped in (True, False):  # files from before torch 1.6 cannot be mapped
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


def _why_not(failure: Exception) -> str:
    """torch's message is advice to run the file's code; this names what was refused and what is safe."""
    text = str(failure).strip()
    refused = re.search(r"GLOBAL ([\w.]*\w)", text)
    if refused:
        return (
            f"holds more than tensors: unpickling it would call {refused[1]}, and no code of a file is run here. Where you "
            "trust the file, load it elsewhere and save its tensors alone with safetensors.torch.save_file"
        )
    if text.startswith("Weights only load failed"):
        return "is not a file of torch.save, or is damaged; download it again, or take its safetensors version"
    reason = text.splitlines()[0] if text else type(failure).__name__
    return f"cannot be loaded ({reason}); it is damaged: download it again, or take its safetensors version"


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    import torch

    from pymerge.ops._memory import why_unreadable

    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named tensors")
    tensors = {}
    problems = []
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            continue
        # Views to be conjugated or negated are read as what they stand for (`LoadedTensor`).
        reason = why_unreadable(value.resolve_neg())
        dtype = str(value.dtype).removeprefix("torch.")
        if reason:
            problems.append(f"{path}: tensor {name!r} {reason}, and save the file again")
        elif dtype not in BITS:
            problems.append(
                f"{path}: tensor {name!r} is {dtype}; convert it, and save the file again"
            )
        elif value.numel() * value.element_size() > path.stat().st_size + _EXPANDED:
            problems.append(
                f"{path}: tensor {name!r} of {tuple(value.shape)} repeats a few values in memory and would take more than its "
                "file; store it as one number, or contiguous"
            )
        else:
            tensors[name] = value.detach()
    if problems:
        raise CheckpointError(problems)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors
