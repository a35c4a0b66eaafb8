"""Sums of outer products, in full precision (rule S9)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pymerge.statistics._gradients import up

# fp32 products of this many rows go into the fp64 sum at a time.
_ROWS = 2048


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: hooks run inside both (S9)."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def add_gram(
    total: torch.Tensor, rows: torch.Tensor, index: torch.Tensor | None, scale: float = 1.0
) -> None:
    """total += sum of row row^T over the indexed rows: products of chunks in fp32 (fp64 for fp64
    rows), the sum in fp64.
    """
    count = rows.shape[0] if index is None else index.shape[0]
    for start in range(0, count, _ROWS):
        if index is None:
            chunk = up(rows[start : start + _ROWS])
        else:
            chunk = up(rows.index_select(0, index[start : start + _ROWS].to(rows.device)))
        if scale != 1.0:
            chunk = chunk * scale
        total += chunk.T @ chunk
