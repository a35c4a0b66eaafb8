"""Low-rank updates in plain PyTorch (docs/spec/low_rank.md)."""

from __future__ import annotations

import torch


def add_low_rank(
    base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float
) -> torch.Tensor:
    """base + scale (left right), by L2: base (rows, columns), left (rows, r), right (r, columns).

    Returns fp32, or fp64 where base is that.
    """
    work = torch.float64 if base.dtype == torch.float64 else torch.float32
    left, right = left.to(work), right.to(work)
    total = left[:, :1] * right[:1]
    for k in range(1, left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    return base.to(work) + total * torch.tensor(scale, dtype=work, device=base.device)


def with_magnitudes(
    weight: torch.Tensor, magnitudes: torch.Tensor, *, by_column: bool = False
) -> torch.Tensor:
    """DoRA's m V / ||V|| of rows, or of columns (L4)."""
    norms = weight.double().square().sum(dim=0 if by_column else 1).sqrt().to(weight.dtype)
    factors = magnitudes.to(weight.dtype).reshape(-1) / norms
    return weight * (factors if by_column else factors[:, None])
