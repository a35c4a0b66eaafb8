"""`matrix` in plain PyTorch float64, one line per rule of docs/spec/matrix.md. Written to be right
and readable, not fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pymerge.reference.mats import mats
from pymerge.reference.ties import cast
from pymerge.rules.matrix import (
    DEPENDENT,
    MatrixOptions,
    floor_of,
    rounding_level,
    share_of,
)
from pymerge.rules.mats import resolve
from pymerge.rules.options import Counts

Tensors = Sequence[torch.Tensor]


@torch.no_grad()
def matrix(
    models: Tensors, base: torch.Tensor, options: MatrixOptions, out: torch.Tensor
) -> Counts:
    """Merge K matrices, or stacks of them, into `out` by rules X1 to X8."""
    wide = any(x.dtype == torch.float64 for x in (*models, base))
    work = torch.float64 if wide else torch.float32
    start = base.detach().to(work)
    deltas = [model.detach().to(work) - start for model in models]  # X1
    bad = [int((~delta.isfinite()).sum()) for delta in deltas]
    counts = Counts((out.numel(),) * options.count, 0, tuple(bad))
    if (any(bad) and options.non_finite == "error") or out.numel() == 0:
        return counts
    for at in [()] if out.ndim == 2 else [(i,) for i in range(out.shape[0])]:
        kept = [k for k in range(options.count) if bool(deltas[k][at].isfinite().all())]  # X8
        own = [deltas[k][at].double() for k in kept]
        levels = [level(models[k][at]) for k in kept]
        merged = torch.zeros_like(start[at], dtype=torch.float64)
        if kept and options.method == "wudi":
            merged = wudi(own, options.iterations, options.damping)
        elif kept and options.method == "tsv":
            merged = tsv(own, levels, share_of(own[0].shape, options.count))
        elif kept:
            merged = iso_c(own, levels)
        # X1: one rounding of T, of lambda T, of the sum, and to the output.
        total = start[at] + merged.to(work) * options.scaling
        out[at].copy_(cast(total, out.dtype))
    return counts


def wudi(deltas: Tensors, iterations: int, damping: float) -> torch.Tensor:
    """X4, X5."""
    some = [delta for delta in deltas if bool(delta.any())]
    total = torch.stack([*deltas]).sum(0)
    if not some:
        return total
    units = [delta / delta.norm() for delta in some]
    grams = [unit.T @ unit for unit in units]
    rule = resolve(len(some), iterations=iterations, damping=damping)
    return mats(some, grams, None, rule, total)[0]


def objective(merged: torch.Tensor, deltas: Tensors) -> float:
    """X4: f(T)."""
    return sum(
        float(((merged - delta) @ delta.T).square().sum() / delta.square().sum())
        for delta in deltas
        if bool(delta.any())
    )


def tsv(deltas: Tensors, levels: Sequence[float], share: int) -> torch.Tensor:
    """X6."""
    parts = [truncated(delta, own, share) for delta, own in zip(deltas, levels, strict=True)]
    left = torch.cat([u for u, _, _ in parts], 1)
    values = torch.cat([s for _, s, _ in parts])
    right = torch.cat([v for _, _, v in parts], 1)
    return (polar(left) * values) @ polar(right).T


def iso_c(deltas: Tensors, levels: Sequence[float]) -> torch.Tensor:
    """X7."""
    total = torch.stack([*deltas]).sum(0)
    u, s, v = truncated(total, math.hypot(*levels), min(total.shape))
    return (u * s.mean()) @ v.T if len(s) else torch.zeros_like(total)


def truncated(
    x: torch.Tensor, rounding: float, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X3: at most so many singular triplets, of those that are some."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > floor_of(float(s[0]), rounding)
    count = min(most, int(kept.sum()))
    return u[:, :count], s[:count], vh[:count].T


def polar(x: torch.Tensor) -> torch.Tensor:
    """X6: U V^T of the singular vectors of x, without those of singular values that are none."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s.square() > DEPENDENT * s.square().max() if len(s) else s > 0
    return u[:, kept] @ vh[kept]


def level(model: torch.Tensor) -> float:
    """X3."""
    rows, columns = model.shape
    dtype = str(model.dtype).removeprefix("torch.")
    return rounding_level(dtype, float(model.double().norm()), (rows, columns))
