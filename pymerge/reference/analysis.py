"""The figures of an analysis (docs/analyze.md) in plain PyTorch. Written to be right and readable,
not fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pymerge.reference.ties import (
    disjoint_merge,
    rescaled,
    scalar,
    task_vector,
    trim_mask,
    working_dtype,
)
from pymerge.rules.ties import TiesRule


@torch.inference_mode()
def figures(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    rule: TiesRule,
    densities: Sequence[float],
) -> dict[str, Any]:
    """Every figure of one tensor that `ties` merges by `rule`, by its name in docs/analyze.md."""
    work = working_dtype([*models] if base is None else [*models, base])
    flat_base = None if base is None else base.reshape(-1).to(work)
    deltas = [task_vector(x, flat_base, work) for x in models]
    finite = [delta.isfinite() for delta in deltas]
    clean = [torch.where(f, d, 0).double() for f, d in zip(finite, deltas, strict=True)]
    masks = [trim_mask(delta, rule, k)[0] for k, delta in enumerate(deltas)]
    trimmed = [rescaled(d, m, rule, k) for k, (d, m) in enumerate(zip(deltas, masks, strict=True))]
    parts, agree, positive, negative = contributions(trimmed, masks, rule)
    for part in parts:  # an element that is not finite in some model counts for none
        part[~torch.stack(finite).all(0)] = 0
    update = sum(parts, torch.zeros_like(clean[0]))
    count, n = len(models), deltas[0].numel()
    signs = torch.zeros(count + 1, count + 1, dtype=torch.int64, device="cpu")
    for p in range(count + 1):
        for q in range(count + 1 - p):
            signs[p, q] = ((positive == p) & (negative == q)).sum()
    return {
        "elements": n,
        "products": [[float(a @ b) for b in clean] for a in clean],
        "base_square": 0.0 if flat_base is None else float(flat_base.double().square().sum()),
        "largest": [float(d.abs().max()) if n else 0.0 for d in clean],
        "kept": [int(m.sum()) for m in masks],
        "both_kept": [[int((a & b).sum()) for b in masks] for a in masks],
        "agreed": [int(a.sum()) for a in agree],
        "signs": signs.tolist(),
        "parts": [float(part @ update) for part in parts],
        "update_square": float(update @ update),
        "mass": [mass_above(d, densities) for d in clean],
        "non_finite": [int((~f).sum()) for f in finite],
    }


def mass_above(delta: torch.Tensor, densities: Sequence[float]) -> list[float]:
    """The sum of the int(d n) largest magnitudes, over the sum of all, for each density d."""
    size = delta.abs().sort(descending=True).values
    total = float(size.sum())
    if total == 0:
        return [math.nan] * len(densities)
    return [float(size[: int(d * len(size))].sum()) / total for d in densities]


def contributions(
    trimmed: list[torch.Tensor], masks: list[torch.Tensor], rule: TiesRule
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What each model adds to scaling * merged, in float64; which of its elements agree; and for
    every element the numbers of models that vote for + and for - (T4, T5).
    """
    zero = torch.zeros_like(trimmed[0])
    votes = [
        torch.where(m, t * scalar(e, t), zero)
        for m, t, e in zip(masks, trimmed, rule.elect_weights, strict=True)
    ]
    positive = torch.stack([v > 0 for v in votes]).sum(0)
    negative = torch.stack([v < 0 for v in votes]).sum(0)
    agree = list(masks)
    if rule.elect != "none":
        total = positive - negative if rule.elect == "count" else zero.clone()
        for mask, vote in zip(masks, votes, strict=True) if rule.elect == "sum" else ():
            total = torch.where(mask, total + vote, total)
        zero_sign = 1
        if rule.zero_sign == "majority":
            more = int((total > 0).sum()) > int((total < 0).sum())
            zero_sign = rule.majority or (1 if more else -1)
        plus = (total > 0) | (~(total < 0) & (zero_sign > 0))
        agree = [torch.where(plus, v > 0, v < 0) for v in votes]
    merged = disjoint_merge(trimmed, agree, rule, zero)
    parts = []
    before = torch.zeros_like(zero)
    for k, t in enumerate(trimmed):
        if rule.merge == "max":  # the first of the largest products has all
            up_to = [a if j <= k else torch.zeros_like(a) for j, a in enumerate(agree)]
            now = disjoint_merge(trimmed, up_to, rule, zero)
            parts.append(torch.where((now != before) & (now == merged), merged, 0).double())
            before = now
            continue
        product = torch.where(agree[k], t * scalar(rule.weights[k], t), zero).double()
        parts.append(product / _divisor(trimmed, agree, rule))
    return [part * rule.scaling for part in parts], agree, positive, negative


def _divisor(
    trimmed: list[torch.Tensor], agree: list[torch.Tensor], rule: TiesRule
) -> torch.Tensor:
    """T5's."""
    zero = torch.zeros_like(trimmed[0], dtype=torch.float64)
    if rule.merge == "sum":
        return zero + 1
    if rule.merge == "mean":
        taking = [a & (t != 0) for a, t in zip(agree, trimmed, strict=True)]
        return torch.stack(taking).sum(0).double().clamp(min=1)
    whole = rule.elect == "none"
    for mask, weight in zip(agree, rule.weights, strict=True):
        zero += torch.ones_like(zero) * weight if whole else mask * weight
    return torch.where(zero.abs() < (1e-8 if whole else 1e-300), 1, zero)


def alignment(
    delta: torch.Tensor, grams: Sequence[torch.Tensor | None]
) -> list[tuple[float, float]]:
    """For each Gram matrix A_j, (tr(delta A_j delta^T) d_in / tr(A_j), ||delta||^2); NaN without
    one.

    delta: (d_out, d_in).
    """
    delta = delta.double()
    found = []
    for gram in grams:
        if gram is None or not float(gram.trace()) > 0:
            found.append((math.nan, math.nan))
            continue
        seen = torch.einsum("oi,ij,oj->", delta, gram.double(), delta)
        scale = delta.shape[1] / gram.double().trace()
        found.append((float(seen * scale), float(delta.square().sum())))
    return found
