"""The backend "triton" of `gram` and `combine`: tables and launches. Nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.dtypes import KERNEL_CODES, name_of
from pymerge.triton_kernels._launch import launch
from pymerge.triton_kernels._load import MIXED
from pymerge.triton_kernels.gram.kernels import combine_kernel, gram_kernel

_PRODUCTS = 4096  # that a program of 128 threads holds: 32 numbers of 64 bits a thread
_ROW_PART = 16384  # elements of a row that a program adds up
_COLUMN_PART = 1024  # rows, of columns
_BLOCK = 1024


def gram(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
) -> torch.Tensor:
    """docs/spec/gram.md, G2 to G4: (rows or columns, pairs), float64."""
    (rows, columns), count, device = shape, len(models), models[0].device
    pairs, groups = count * (count + 1) // 2, shape[by_column]
    if rows == 0 or columns == 0:
        return torch.zeros((groups, pairs), dtype=torch.float64, device=device)
    table, held = _table(models, base)
    along, part_size = (rows, _COLUMN_PART) if by_column else (columns, _ROW_PART)
    parts = -(-along // part_size)
    sums = torch.empty((parts, groups, pairs), dtype=torch.float64, device=device)
    power = 1 << (count - 1).bit_length()
    block = max(1, min(_BLOCK, _PRODUCTS // power**2))
    launch(
        gram_kernel,
        (-(-columns // block) * parts if by_column else rows * parts,),
        device,
        table,
        sums,
        rows,
        columns,
        parts,
        part_size,
        K=count,
        MODELS=power,
        BY_COLUMN=by_column,
        HAS_BASE=base is not None,
        **_dtypes(models, base),
        WORK=_work([*held]),
        BLOCK=block,
        num_warps=4,
    )
    return sums.sum(0)


def combine(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
    coefficients: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """docs/spec/gram.md, G5. coefficients: (rows or columns, K), float64."""
    n = out.numel()
    if n == 0:
        return
    table, held = _table(models, base)
    factors = coefficients.to(device=out.device, dtype=torch.float64).contiguous()
    launch(
        combine_kernel,
        (-(-n // _BLOCK),),
        out.device,
        table,
        factors,
        out.data_ptr(),
        n,
        shape[1],
        K=len(models),
        BY_COLUMN=by_column,
        HAS_BASE=base is not None,
        **_dtypes(models, base),
        OD=_code(out),
        WORK=_work([*held, out]),
        BLOCK=_BLOCK,
        num_warps=4,
    )


def _table(
    models: Sequence[torch.Tensor], base: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(the table, the tensors that it points at)."""
    held = [tensor.contiguous() for tensor in ([*models] if base is None else [*models, base])]
    rows = [(tensor.data_ptr(), _code(tensor)) for tensor in held]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(held[0].device)
    return table, held


def _dtypes(models: Sequence[torch.Tensor], base: torch.Tensor | None) -> dict[str, int]:
    codes = {_code(model) for model in models}
    return {
        "XD": codes.pop() if len(codes) == 1 else MIXED,
        "BD": -1 if base is None else _code(base),
    }


def _code(tensor: torch.Tensor) -> int:
    return KERNEL_CODES[name_of(tensor.dtype)]


def _work(tensors: Sequence[torch.Tensor]) -> int:
    return 64 if any(tensor.dtype == torch.float64 for tensor in tensors) else 32
