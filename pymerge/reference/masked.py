"""`masked` in plain PyTorch, one line per rule of docs/spec/masked.md. Written to be right and
readable, not fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pymerge.reference.ties import cast, scalar, task_vector, working_dtype
from pymerge.rules.masked import MaskedOptions, MaskedRule, row_of
from pymerge.rules.options import Counts

_SUM = 16  # lanes of the sums of P2
_CHUNK, _LANES = 16384, 64  # of those of P6


@torch.inference_mode()  # writes any `out` and records no gradient, as the kernels do
def masked(
    models: Sequence[torch.Tensor], base: torch.Tensor, options: MaskedOptions, out: torch.Tensor
) -> Counts:
    """Merge K tensors into `out` by rules P1 to P8. All share out's shape and device."""
    tensor = ReferenceTensor(models, base, out.dtype)
    return tensor.merge(options.rule(out.numel(), row_of(out.shape), tensor), out)


class ReferenceTensor:
    """One tensor as `Measures` of pymerge/rules/masked.py has it."""

    def __init__(
        self, models: Sequence[torch.Tensor], base: torch.Tensor, out_dtype: torch.dtype
    ) -> None:
        work = working_dtype([*models, base])
        if out_dtype == torch.float64:
            work = torch.float64
        self.wide = work == torch.float64
        self._models = [x.reshape(-1).to(work) for x in models]
        self._base = base.reshape(-1).to(work)
        deltas = [task_vector(x, self._base, work) for x in models]
        self._non_finite = [int((~d.isfinite()).sum()) for d in deltas]
        self._void = torch.zeros_like(self._base, dtype=torch.bool)
        for delta in deltas:  # P1
            self._void |= ~delta.isfinite()
        self._deltas = [torch.where(self._void, 0, delta) for delta in deltas]
        self._divergences = self._base.new_zeros(0)

    def divergences(self, rule: MaskedRule, exact: bool) -> float:
        work = self._base.dtype
        self._divergences = divergences(self._models[0], self._base, rule.row, work, exact)
        return float(self._divergences.min())

    def nonzero(self, rule: MaskedRule) -> int:
        return int((self._keys(rule) > 0).sum())

    def select(self, rule: MaskedRule, ranks: Sequence[int]) -> list[float]:
        ordered = self._keys(rule).clamp(min=0).sort(descending=True).values
        return [float(ordered[rank - 1]) for rank in ranks]

    def energies(self, rule: MaskedRule) -> list[float]:
        selected = self._selected(rule)
        wide = [torch.where(selected, delta, 0).double() for delta in self._deltas]
        return [_ordered_sum(delta * delta) for delta in wide]

    def overlaps(self, rule: MaskedRule) -> list[tuple[int, int]]:
        contributes, count = self._contributions(rule)
        return [
            (int((has & (count > 1)).sum()), int((has & (count == 1)).sum())) for has in contributes
        ]

    def merge(self, rule: MaskedRule, out: torch.Tensor) -> Counts:
        """P4 to P8."""
        merge = {
            "near": self._near,
            "overlap": self._overlap,
            "consensus": self._consensus,
            "importance": self._importance,
        }[rule.merge]
        result, kept, conflicts = merge(rule)
        result = torch.where(self._void, torch.nan, result)
        out.copy_(cast(result, out.dtype).reshape(out.shape))
        return Counts(
            kept=tuple(int(mask.sum()) for mask in kept),
            conflicts=int(conflicts.sum()),
            non_finite=tuple(self._non_finite),
            remark=rule.remark,
        )

    def _keys(self, rule: MaskedRule) -> torch.Tensor:
        """P2, signed."""
        if rule.key == "variance":
            wide = [delta.double() for delta in self._deltas]
            away = [delta - wide[0] for delta in wide]
            mean = torch.zeros_like(away[0])
            for each in away[1:]:
                mean = mean + each
            mean = mean / len(away)
            total = torch.zeros_like(mean)
            for each in away:
                total = total + (each - mean) * (each - mean)
            return (total / len(away)).to(self._base.dtype)
        by_row = self._divergences.repeat_interleave(rule.row)
        importance = self._deltas[0].abs() * by_row
        return -importance if rule.key == "negative_importance" else importance

    def _selected(self, rule: MaskedRule) -> torch.Tensor:
        if rule.whole:
            return torch.ones_like(self._void)
        return self._keys(rule) >= scalar(rule.bound, self._base)

    def _near(self, rule: MaskedRule) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """P4."""
        away = self._deltas[0].abs().clamp(min=scalar(1e-6, self._base))
        weight = (scalar(rule.bound, away) / away).clamp(0, 1)
        result = weight * self._models[0] + (1 - weight) * self._base
        return result, [weight > 0], torch.zeros_like(self._void)

    def _contributions(self, rule: MaskedRule) -> tuple[list[torch.Tensor], torch.Tensor]:
        epsilon = scalar(rule.bound, self._base)
        contributes = [delta.abs() > epsilon for delta in self._deltas]
        return contributes, torch.stack(contributes).sum(0)

    def _overlap(self, rule: MaskedRule) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """P5."""
        contributes, count = self._contributions(rule)
        total = torch.zeros_like(self._base)
        scaled = torch.zeros_like(self._base)
        for has, delta, factor in zip(contributes, self._deltas, rule.factors, strict=True):
            total = total + torch.where(has, delta, 0)
            scaled = scaled + torch.where(has, delta * scalar(factor, delta), 0)
        mean = total / count.clamp(min=1)
        result = self._base + torch.where(count == 1, scaled, mean)
        return result, contributes, torch.zeros_like(self._void)

    def _consensus(self, rule: MaskedRule) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """P6, steps 3 and 4."""
        selected = self._selected(rule)
        total = torch.zeros_like(self._base)
        for delta in self._deltas:
            total = total + delta
        agree = [torch.where(total >= 0, delta > 0, delta < 0) for delta in self._deltas]
        merged, divisor = torch.zeros_like(self._base), torch.zeros_like(self._base)
        for mask, delta, factor in zip(agree, self._deltas, rule.factors, strict=True):
            weight = scalar(factor, delta)
            merged = merged + torch.where(mask, delta * weight, 0)
            divisor = divisor + torch.where(mask, weight, 0)
        divisor = torch.maximum(divisor, scalar(rule.floor, divisor))
        merged = merged / torch.where(divisor == 0, 1, divisor)
        up = torch.stack([delta > 0 for delta in self._deltas]).any(0)
        down = torch.stack([delta < 0 for delta in self._deltas]).any(0)
        result = self._base + torch.where(selected, merged, 0)
        return result, [mask & selected for mask in agree], up & down & selected

    def _importance(
        self, rule: MaskedRule
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """P7."""
        kept = self._selected(rule)
        result = self._base + torch.where(kept, self._deltas[0], 0)
        return result, [kept], torch.zeros_like(kept)


def _ordered_sum(terms: torch.Tensor) -> float:
    """The sum of float64 numbers, in the order that P6 fixes."""
    padded = torch.nn.functional.pad(terms, (0, -terms.numel() % _CHUNK)).reshape(
        -1, _CHUNK // _LANES, _LANES
    )
    lanes = torch.zeros(padded.shape[0], _LANES, dtype=torch.float64, device=terms.device)
    for row in padded.unbind(1):
        lanes = lanes + row
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    total = 0.0
    for chunk in lanes[:, 0].tolist():
        total += chunk
    return total


@torch.inference_mode()
def divergences(
    model: torch.Tensor, base: torch.Tensor, row: int, work: torch.dtype, exact: bool
) -> torch.Tensor:
    """The divergence D of each row (P2) of two flat tensors, in the working precision `work`.

    exact: computed in binary64.
    """
    dtype = torch.float64 if exact else work
    floor = torch.tensor(1e-8, dtype=dtype, device=base.device)
    p, q = (_softmax(x.reshape(-1, row).to(dtype)) + floor for x in (model, base))
    terms = p * _logarithm((p / q).double()).to(dtype)
    return _cascade(terms).to(work).nan_to_num(0, 0, 0)


def _softmax(x: torch.Tensor) -> torch.Tensor:
    """P2: softmax along the last dimension."""
    largest = torch.where(x.isnan(), -torch.inf, x).amax(-1, keepdim=True)
    e = (_exp64 if x.dtype == torch.float64 else _exp32)(x - largest)
    return e * (1 / _total(e))


def _exp32(x: torch.Tensor) -> torch.Tensor:
    """P2, E in binary32, x <= 0."""

    def fused(a: torch.Tensor, b: float | torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
        b, c = (scalar(v, x) if isinstance(v, float) else v for v in (b, c))
        product, addend = a.double() * b.double(), c.double()
        total = product + addend
        # What that rounded away makes it odd, so that it decides the rounding to binary32.
        rest = (product - (total - (total - product))) + (addend - (total - product))
        even = (total.view(torch.int64) & 1) == 0
        towards = torch.where(rest > 0, torch.inf, -torch.inf).double()
        odd = torch.where(even & (rest != 0), total.nextafter(towards), total)
        return odd.float()

    held = x.clamp(min=-104)
    whole = (held * scalar(1.44269504088896340736, x)).round()
    s = fused(whole, -0.693145751953125, held)
    s = fused(whole, -1.428606765330187045e-06, s)
    u = scalar(0.000198527617612853646278381, x).expand_as(s)
    for term in (
        0.00139304355252534151077271,
        0.00833336077630519866943359,
        0.0416664853692054748535156,
        0.166666671633720397949219,
        0.5,
    ):
        u = fused(u, s, term)
    u = 1 + fused(s * s, u, s)
    power = whole.nan_to_num().int()
    half = power >> 1
    scaled = u * ((half + 127) << 23).view(torch.float32)
    scaled = scaled * ((power - half + 127) << 23).view(torch.float32)
    return torch.where(x < -104, 0, scaled)


def _exp64(x: torch.Tensor) -> torch.Tensor:
    """P2, E in binary64, x <= 0."""
    held = x.clamp(min=-708)
    whole = (held * 1.4426950408889634).round()
    s = (held - whole * 0.6931471803691238) - whole * 1.9082149292705877e-10
    u = torch.full_like(s, 1 / math.factorial(13))
    for k in range(12, -1, -1):
        u = u * s + 1 / math.factorial(k)
    power = whole.nan_to_num().long()
    return torch.where(x < -708, 0, u * ((power + 1023) << 52).view(torch.float64))


def _logarithm(x: torch.Tensor) -> torch.Tensor:
    """P2: log in binary64, by the series of the inverse hyperbolic tangent."""
    bits = x.view(torch.int64)
    above = ((bits & ((1 << 52) - 1)) | (1023 << 52)).view(torch.float64)
    large = above > 1.4142135623730951
    m = torch.where(large, above * 0.5, above)
    exponent = ((bits >> 52).double() - 1023) + large
    s = (m - 1) / (m + 1)
    z = s * s
    u = torch.full_like(z, 1 / 21)
    for k in range(19, -1, -2):
        u = u * z + 1 / k
    return exponent * 0.6931471805599453 + (s + s) * u


def _total(x: torch.Tensor) -> torch.Tensor:
    """P2, R: the sum along the last dimension, in 16 lanes."""
    n = x.shape[-1]
    width = _SUM if n >= _SUM else 1
    lanes = x[..., :width]
    for first in range(width, n, width):
        part = x[..., first : first + width]
        lanes = lanes + torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=-0.0)
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def _cascade(x: torch.Tensor) -> torch.Tensor:
    """P2, S: the sum along the last dimension, by four vectors in turn and in four levels."""
    n = x.shape[-1]
    width = _SUM if n >= _SUM else 1
    count = n // width
    vectors = x[..., : count * width].reshape(*x.shape[:-1], count, width)
    turns = count // 4
    power = max(4, max(1, (turns - 1).bit_length()) // 4)
    step = 1 << power
    sums = [torch.zeros_like(x[..., :1].unsqueeze(-1)).expand(*x.shape[:-1], 4, width)] * 4
    turn = 0
    while turn + step <= turns:
        for _ in range(step):
            sums[0] = sums[0] + vectors[..., 4 * turn : 4 * turn + 4, :]
            turn += 1
        for level in (1, 2, 3):
            sums[level] = sums[level] + sums[level - 1]
            sums[level - 1] = torch.zeros_like(sums[0])
            if turn & (step - 1) << (level * power):
                break
    for each in range(turn, turns):
        sums[0] = sums[0] + vectors[..., 4 * each : 4 * each + 4, :]
    total = ((sums[0] + sums[1]) + sums[2]) + sums[3]
    first = total[..., 0, :]
    for v in range(4 * turns, count):
        first = first + vectors[..., v, :]
    lanes = ((first + total[..., 1, :]) + total[..., 2, :]) + total[..., 3, :]
    if width == 1:
        return lanes[..., 0]
    result = torch.zeros_like(lanes[..., 0])
    for part in (*x[..., count * width :].unbind(-1), *lanes.unbind(-1)):
        result = result + part
    return result
