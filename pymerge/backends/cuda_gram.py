"""`gram` and `combine` by the compiled CUDA kernels (csrc/cuda/gram/gram.h), on the current
stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pymerge.backends import cuda, native
from pymerge.dtypes import KERNEL_CODES, name_of


def gram(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
) -> torch.Tensor:
    """docs/spec/gram.md, G2 to G4: (rows or columns, pairs), float64. Nothing waits for the
    device.
    """
    call, held = _call(models, base, shape, by_column, ())
    count, device = len(models), models[0].device
    pairs = count * (count + 1) // 2
    products = torch.empty((shape[by_column], pairs), dtype=torch.float64, device=device)
    sums = torch.empty(call.sums, dtype=torch.float64, device=device)
    call.run(sums.data_ptr(), products.data_ptr(), *cuda.place(device))
    del held
    return products


def combine(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
    coefficients: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """docs/spec/gram.md, G5. coefficients: (rows or columns, K), float64."""
    call, held = _call(models, base, shape, by_column, (out,))
    factors = coefficients.to(device=out.device, dtype=torch.float64).contiguous()
    aligned = out.data_ptr() % 16 == 0
    place = cuda.place(out.device)
    call.combine(factors.data_ptr(), out.data_ptr(), name_of(out.dtype), aligned, *place)
    del held


def _call(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
    outs: Sequence[torch.Tensor],
) -> tuple[Any, list[torch.Tensor]]:
    """(the call, what has to stay alive until it is enqueued)."""
    held = [tensor.contiguous() for tensor in ([*models] if base is None else [*models, base])]
    rows = [(tensor.data_ptr(), KERNEL_CODES[name_of(tensor.dtype)]) for tensor in held]
    table = torch.tensor([*rows, (0, 0)][: len(models) + 1], dtype=torch.int64, device="cpu")
    table = table.to(held[0].device)
    # A combination takes the tensor flat; a Gram matrix each row from its beginning.
    whole = bool(outs) or shape[0] <= 1 or shape[1] % 8 == 0
    call = native.cuda().Gram(
        table.data_ptr(),
        len(models),
        base is not None,
        *shape,
        by_column,
        any(tensor.dtype == torch.float64 for tensor in (*held, *outs)),
        whole and all(address % 16 == 0 for address, _ in rows),
    )
    return call, [*held, table]
