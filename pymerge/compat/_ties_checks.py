"""What the functions of `pymerge.compat.ties_merging` take, and how they refuse the rest."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

import torch

from pymerge.errors import NonFiniteError
from pymerge.messages.words import counted, exact, shown
from pymerge.ops.memory import check_tensor
from pymerge.ops.tensors import check_floats, check_numbers
from pymerge.ops.ties.overflow import count_non_finite, report_overflow
from pymerge.rules.ties import TiesStats, _number


def rows_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, where it has the shape (models, parameters) and can be merged."""
    check_tensor(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} has {counted(tensor.dim(), 'dimension')}; pass (models, parameters)"
        )
    for k, row in enumerate(tensor):
        check_floats(f"{name}[{k}]", row, "ties", readable=True)
    if not len(tensor):
        raise ValueError(f"{name} has no rows; pass at least one task vector")
    return tensor


def signs_of(name: str, signs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The signs, where there is a finite one for every parameter of the rows, on their device."""
    check_tensor(name, signs)
    check_numbers(name, signs, "a merge by signs")
    if signs.shape != rows.shape[1:]:
        raise ValueError(
            f"{name} has shape {tuple(signs.shape)}; pass one sign per parameter,"
            f" {tuple(rows.shape[1:])}"
        )
    if signs.device != rows.device:
        raise ValueError(f"{name} is on {signs.device}, the rows on {rows.device}; move it there")
    if signs.is_floating_point():
        check_finite(name, signs[None])
    return signs


def check_finite(name: str, rows: torch.Tensor) -> None:
    found = [(k, count_non_finite(row)) for k, row in enumerate(rows)]
    counts = ", ".join(f"{name}[{k}]: {count}" for k, count in found if count)
    if counts:
        raise NonFiniteError(
            f"NaN or infinite task vector elements ({counts}, of {rows.shape[1]}); mend or leave"
            " out what holds them"
        )


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A finite result in its own dtype; ValueError where it overflows fp16 (N4)."""
    narrow = tensor.to(dtype)
    report_overflow([("", narrow, TiesStats(kept=(), conflicts=0, non_finite=()))], "error", 3)
    return narrow


def refuse(name: str, value: object, words: Collection[object]) -> NoReturn:
    raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(repr, words))}")


def check_word(name: str, value: object, words: Collection[str]) -> None:
    if not isinstance(value, str) or value not in words:
        refuse(name, value, words)


def fraction_of(name: str, value: float | str | None) -> float:
    number = _number(name, value)
    fraction = number / 100 if number > 1 else number
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name}={exact(number)} is outside [0, 1], or [0, 100] as percent")
    return fraction
