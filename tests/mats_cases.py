"""Random layers with statistics, for the tests of `mats` and its companions."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Case:
    """weights: K of (d_out, d_in). a, b: their statistics. base: what they were fine-tuned from."""

    weights: list[torch.Tensor]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    base: torch.Tensor


def case(
    count: int = 3,
    d_out: int = 6,
    d_in: int = 5,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    tokens: int | None = None,
    decay: float = 0.0,
    scale_b: float = 1.0,
) -> Case:
    """tokens: rows behind each Gram matrix (few: singular). decay: each eigenvalue falls by up to
    10^-decay.
    """
    g = torch.Generator().manual_seed(seed)

    def gram(d: int) -> torch.Tensor:
        rows = torch.randn(tokens or 3 * d, d, generator=g, dtype=torch.float64)
        spread = 10 ** (-decay / 2 * torch.linspace(0, 1, d, dtype=torch.float64))
        turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
        rows = rows * spread @ turn
        return rows.T @ rows / len(rows)

    base = torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
    weights = [
        base + 0.1 * torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
        for _ in range(count)
    ]
    a = [gram(d_in) for _ in range(count)]
    b = [gram(d_out) * scale_b for _ in range(count)]
    cast = [[x.to(dtype) for x in xs] for xs in (weights, a, b)]
    return Case(*cast, base.to(dtype))


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """||x - y|| / ||y|| in float64."""
    return float((x.double() - y.double()).norm() / y.double().norm())
