"""Exact solutions of `mats` in float64 (M11, M14): RegMean's system, one model, two models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Statistics come in fp32: eigenvalues below d * 2^-24 of the largest are rounding.
_ROUNDING = 2.0**-24


def solve_right(rest: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The smallest D with D total = rest, for rest (..., d_out, d), total (..., d, d) symmetric
    (M14).

    Returns (D, whether `total` was numerically singular anywhere in the stack).
    """
    d = total.shape[-1]
    factor, info = torch.linalg.cholesky_ex(total)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    sound = (info == 0) & (pivots.amin(-1) > d * _ROUNDING * pivots.amax(-1))
    if bool(sound.all()):
        return torch.cholesky_solve(rest.mT, factor).mT, False
    values, basis = torch.linalg.eigh(total)
    keep = values > d * _ROUNDING * values.amax(-1, keepdim=True)
    inverse = torch.where(keep, 1 / torch.where(keep, values, 1), 0)
    return ((rest @ basis) * inverse[..., None, :]) @ basis.mT, True


def solve_one(rest: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The smallest D with b D a = rest (M11, K = 1)."""
    half, singular_a = solve_right(rest, a)
    step, singular_b = solve_right(half.mT, b)
    return step.mT, singular_a or singular_b


def solve_two(
    rest: torch.Tensor, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, bool]:
    """D with b[0] D a[0] + b[1] D a[1] = rest, by two generalized eigenproblems (M11, K = 2)."""
    u, x, singular_a = _diagonalise(a[0], a[1])
    v, y, singular_b = _diagonalise(b[0], b[1])
    divisor = torch.outer(y, x) + torch.outer(1 - y, 1 - x)
    # An entry where both models' statistics vanish has nothing on the right either (M5).
    keep = divisor > rest.shape[-1] * _ROUNDING
    inner = v.mT @ rest @ u
    inner = torch.where(keep, inner / torch.where(keep, divisor, 1), 0)
    return v @ inner @ u.mT, singular_a or singular_b or not bool(keep.all())


def _diagonalise(one: torch.Tensor, two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """U and x with U^T (one + two) U = I and U^T one U = diag(x), on the range of the sum."""
    values, basis = torch.linalg.eigh(one + two)
    keep = values > len(values) * _ROUNDING * values[-1]
    whiten = basis[:, keep] / values[keep].sqrt()
    x, rotation = torch.linalg.eigh(whiten.mT @ one @ whiten)
    return whiten @ rotation, x.clamp(0, 1), not bool(keep.all())
