"""`ties` and `select` in plain PyTorch, one line per rule of docs/spec/ties.md. Written to be right
and readable, not fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pymerge.reference.exact import LEAST_NORM, exact_sum, rounded, rounded_quotient
from pymerge.rules.ties import TiesRule, TiesStats, random_cutoff

_MASK32 = 0xFFFFFFFF


@torch.inference_mode()  # writes any `out` and records no gradient, as the kernels do
def ties(
    models: Sequence[torch.Tensor], base: torch.Tensor | None, rule: TiesRule, out: torch.Tensor
) -> TiesStats:
    """Merge K tensors into `out` by rules T1 to T9, N1 and N2. Models and base share out's shape
    and device.
    """
    work = working_dtype([*models, out] if base is None else [*models, base, out])
    shape = out.shape
    flat_base = None if base is None else base.reshape(-1).to(work)
    deltas = [task_vector(x, flat_base, work) for x in models]  # T1
    kept, thresholds = [], []
    for k, delta in enumerate(deltas):  # T3
        mask, threshold = trim_mask(delta, rule, k)
        kept.append(mask)
        thresholds.append(threshold)
    trimmed = [
        rescaled(delta, mask, rule, k)
        for k, (delta, mask) in enumerate(zip(deltas, kept, strict=True))
    ]

    n = shape.numel()
    zero = torch.zeros(n, dtype=work, device=out.device)
    values = [
        torch.where(m, t * scalar(e, t), zero)
        for m, t, e in zip(kept, trimmed, rule.elect_weights, strict=True)
    ]
    above = torch.stack([v > 0 for v in values]).sum(0)
    below = torch.stack([v < 0 for v in values]).sum(0)
    positive = negative = 0
    if rule.elect == "none":
        agree = list(kept)
    else:  # T4
        if rule.elect == "sum":
            total = zero.clone()
            for mask, value in zip(kept, values, strict=True):
                total = torch.where(mask, total + value, total)
        else:
            total = above - below
        zero_sign = 1
        if rule.zero_sign == "majority":
            positive, negative = int((total > 0).sum()), int((total < 0).sum())
            zero_sign = rule.majority or (1 if positive > negative else -1)
        sign = torch.where(total > 0, 1, torch.where(total < 0, -1, zero_sign))
        agree = [torch.where(sign > 0, v > 0, v < 0) for v in values]
    merged = disjoint_merge(trimmed, agree, rule, zero)  # T5
    result = merged * scalar(rule.scaling, merged)  # T6
    if flat_base is not None:
        result = flat_base + result

    poison = torch.zeros(n, dtype=torch.bool, device=out.device)  # N2
    infinite = {}
    for sign_of in (1, -1):
        infinite[sign_of] = torch.zeros_like(poison)
        for mask, t in zip(kept, trimmed, strict=True):
            infinite[sign_of] |= mask & (t == sign_of * torch.inf)
    for delta in deltas:
        poison |= delta.isnan()
    poison |= infinite[1] & infinite[-1]
    result = torch.where(poison, torch.nan, result)
    out.copy_(cast(result, out.dtype).reshape(shape))
    return TiesStats(
        kept=tuple(int(m.sum()) for m in kept),
        conflicts=int(((above > 0) & (below > 0)).sum()),
        non_finite=tuple(int((~d.isfinite()).sum()) for d in deltas),
        thresholds=tuple(thresholds) if rule.trim in ("magnitude", "outliers") else (),
        positive=positive,
        negative=negative,
    )


@torch.inference_mode()
def select(
    tensors: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor | None]], ranks: Sequence[int]
) -> list[float]:
    """The ranks[k]-th largest magnitude of model k's task vector over the concatenation of all
    tensors (T7).

    tensors: (models, base) pairs, each with the same number of models. Rank 0 gives NaN, a rank of
        all elements or more gives 0.
    """
    every = [x for models, base in tensors for x in (*models, *([] if base is None else [base]))]
    work = working_dtype(every)
    thresholds = []
    for k, rank in enumerate(ranks):
        parts = [
            task_vector(models[k], None if base is None else base.reshape(-1).to(work), work)
            for models, base in tensors
        ]
        values = torch.cat(parts) if parts else torch.empty(0, dtype=work, device="cpu")
        thresholds.append(order_statistic(values, rank))
    return thresholds


def working_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Binary64 where any tensor is fp64, else binary32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def cast(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The one rounding of T6. NaN becomes that of N2, whatever the device's own is.

    torch takes float64 to 16 bits by way of float32, which would be two; so where float32 is
    inexact it is first rounded to odd, from which the second rounding is that of the float64.
    """
    if result.dtype == torch.float64 and dtype not in (torch.float64, torch.float32):
        near = result.to(torch.float32)
        bits = near.view(torch.int32)
        above = (near.double().abs() > result.abs()).int()
        odd = ((bits - above) | 1).view(torch.float32)
        result = torch.where((near.double() == result) | result.isnan(), near, odd)
    nan = torch.tensor(math.nan, dtype=dtype, device="cpu").to(result.device)
    return torch.where(result.isnan(), nan, result.to(dtype))


def scalar(value: float, like: torch.Tensor) -> torch.Tensor:
    """A Python number, rounded once to the working precision; a bare float would be used in
    double.
    """
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def task_vector(x: torch.Tensor, flat_base: torch.Tensor | None, work: torch.dtype) -> torch.Tensor:
    """T1."""
    flat = x.reshape(-1).to(work)
    return flat if flat_base is None else flat - flat_base


def magnitude(delta: torch.Tensor) -> torch.Tensor:
    """|δ|, with NaN as 0 (N1)."""
    return torch.where(delta.isnan(), 0, delta.abs())


def order_statistic(delta: torch.Tensor, rank: int) -> float:
    """The rank-th largest magnitude: NaN for rank 0 or no elements, 0 for all of them (T3, E1)."""
    n = delta.numel()
    if rank <= 0 or n == 0:
        return float("nan")
    if rank >= n:
        return 0.0
    return largest(delta, rank)


def largest(delta: torch.Tensor, rank: int) -> float:
    """The rank-th largest magnitude, 1 <= rank <= n."""
    return float(magnitude(delta).kthvalue(delta.numel() - rank + 1).values)


def trim_mask(delta: torch.Tensor, rule: TiesRule, k: int) -> tuple[torch.Tensor, float]:
    """T3: what is kept of model k's task vector, and the lower threshold."""
    if rule.trim == "none":
        return torch.ones_like(delta, dtype=torch.bool), 0.0
    if rule.trim == "random":
        words = philox(delta.numel(), k, rule.key, delta.device, rule.first)
        return words < random_cutoff(rule.densities[k]), 0.0
    if rule.trim == "magprune":
        return magprune_mask(delta, rule, k), 0.0
    size = magnitude(delta)
    lower = order_statistic(delta, rule.ranks[k]) if rule.thresholds is None else rule.thresholds[k]
    mask = size >= lower
    if rule.trim == "outliers" and rule.dropped[k] > 0:
        upper = largest(delta, rule.dropped[k] + 1) if rule.bounds is None else rule.bounds[k]
        mask &= size <= upper
    return mask, lower


def magprune_mask(delta: torch.Tensor, rule: TiesRule, k: int) -> torch.Tensor:
    """T3 `magprune`."""
    density, epsilon = rule.densities[k], rule.epsilons[k]
    if density >= 1 or density <= 0:
        return torch.full_like(delta, density >= 1, dtype=torch.bool)
    n, length, step = delta.numel(), rule.row_length, rule.row_step
    rows = magnitude(delta).reshape(n // (length * step), length, step).transpose(1, 2).contiguous()
    ordered = rows.sort(-1).values
    less = torch.searchsorted(ordered, rows)
    through = torch.searchsorted(ordered, rows, right=True)
    rank = less.double() + (through - less - 1).double() / 2
    place = rank / (length - 1) if length > 1 else torch.full_like(rank, 0.5)
    probability = (density - epsilon) + place * (2 * epsilon)
    cutoff = (probability.clamp(max=1) * 4294967296.0).long().transpose(1, 2).reshape(-1)
    return philox(n, k, rule.key, delta.device, rule.first) < cutoff


def rescaled(delta: torch.Tensor, mask: torch.Tensor, rule: TiesRule, k: int) -> torch.Tensor:
    """T3r: the kept task vector, rescaled."""
    if rule.rescale == "none" or rule.densities[k] >= 1 or rule.densities[k] == 0:
        return delta
    if rule.rescale == "density":
        return delta / scalar(rule.densities[k], delta)
    if rule.factors is not None:
        return delta * scalar(rule.factors[k], delta)
    return delta * scalar(norm_factor(delta, mask, rule.rescale), delta)


def norm(delta: torch.Tensor, kind: str) -> float:
    """T9: the norm itself, rounded once to binary64."""
    if kind == "linf":
        return float(delta.abs().max()) if delta.numel() else 0.0
    total = exact_sum(delta, kind == "l2")
    return total if isinstance(total, float) else rounded(total, torch.float64, kind == "l2")


def norm_factor(delta: torch.Tensor, mask: torch.Tensor, kind: str) -> float:
    """T9: f_k, in the precision of delta."""
    kept = torch.where(mask, delta, 0)
    if kind != "linf":
        square = kind == "l2"
        return rounded_quotient(
            exact_sum(delta, square), exact_sum(kept, square), delta.dtype, square
        )
    if delta.numel() == 0:
        return 1.0
    before, after = (torch.linalg.vector_norm(x, math.inf).double() for x in (delta, kept))
    if not (before >= LEAST_NORM and after >= LEAST_NORM):
        return 1.0
    return float((before / after).to(delta.dtype))


def disjoint_merge(
    trimmed: list[torch.Tensor], agree: list[torch.Tensor], rule: TiesRule, zero: torch.Tensor
) -> torch.Tensor:
    """T5."""
    products = [t * scalar(w, t) for t, w in zip(trimmed, rule.weights, strict=True)]
    if rule.merge == "max":
        best = zero.clone()
        for mask, product in zip(agree, products, strict=True):
            best = torch.where(mask & (product.abs() > best.abs()), product, best)
        return best
    total = zero.clone()
    for mask, product in zip(agree, products, strict=True):
        total = torch.where(mask, total + product, total)
    if rule.merge == "sum":
        return total
    if rule.merge == "mean":
        count = zero.clone()
        for mask, t in zip(agree, trimmed, strict=True):
            count += mask & (t != 0)
        return total / count.clamp(min=1)
    divisor = zero.clone()
    for mask, weight in zip(agree, rule.weights, strict=True):
        taking_part = torch.ones_like(mask) if rule.elect == "none" else mask
        divisor = torch.where(taking_part, divisor + scalar(weight, zero), divisor)
    if rule.elect == "none":
        return total / torch.where(divisor.abs() < 1e-8, 1, divisor)
    return total / torch.where(divisor == 0, 1, divisor)


def philox(n: int, k: int, key: int, device: torch.device, first: int = 0) -> torch.Tensor:
    """T8: n random 32-bit words (as int64) of model k, counting models from 0; `first` is a
    multiple of 4.
    """
    group = torch.arange(first // 4, first // 4 + (n + 3) // 4, dtype=torch.int64, device=device)
    c = [group & _MASK32, group >> 32, torch.full_like(group, k), torch.zeros_like(group)]
    key_low, key_high = key & _MASK32, key >> 32
    for _ in range(10):
        low0, high0 = _multiply32(0xD2511F53, c[0])
        low1, high1 = _multiply32(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ key_low, low1, high0 ^ c[3] ^ key_high, low0]
        key_low, key_high = (key_low + 0x9E3779B9) & _MASK32, (key_high + 0xBB67AE85) & _MASK32
    return torch.stack(c, dim=1).reshape(-1)[:n]


def _multiply32(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high 32 bits of a * b, both below 2**32, without leaving signed 64-bit range."""
    a_low, a_high = a & 0xFFFF, a >> 16
    low = a_low * b
    mid = a_high * b + (low >> 16)
    return ((mid & 0xFFFF) << 16) | (low & 0xFFFF), mid >> 16
