"""`masked` in plain PyTorch, one line per rule of docs/spec/masked.md. Written to be right and
readable, not fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.reference.ties import cast, ordered_sum, scalar, task_vector, working_dtype
from pymerge.rules.masked import MaskedOptions, MaskedRule, row_of
from pymerge.rules.options import Counts

_ELEMENTS = 1 << 16  # of the rows whose divergences are computed together: they stay in the caches


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

    def divergences(self, row: int, exact: bool) -> float:
        self._divergences = divergences(self._models[0], self._base, row, self._base.dtype, exact)
        return float(self._divergences.min())

    def nonzero(self, rule: MaskedRule) -> int:
        return int((self._keys(rule) > 0).sum())

    def select(self, rule: MaskedRule, ranks: Sequence[int]) -> list[float]:
        ordered = self._keys(rule).clamp(min=0).sort(descending=True).values
        return [float(ordered[rank - 1]) for rank in ranks]

    def energies(self, rule: MaskedRule) -> list[float]:
        selected = self._selected(rule)
        wide = [torch.where(selected, delta, 0).double() for delta in self._deltas]
        return [ordered_sum(delta * delta) for delta in wide]

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


@torch.inference_mode()
def divergences(
    model: torch.Tensor, base: torch.Tensor, row: int, work: torch.dtype, exact: bool
) -> torch.Tensor:
    """The divergence D of each row (P2) of two flat tensors, in the working precision `work`.

    exact: computed in binary64.
    """
    dtype = torch.float64 if exact else work
    count = base.numel() // row
    found = torch.empty(count, dtype=work, device=base.device)
    rows = max(1, _ELEMENTS // row)
    for first in range(0, count, rows):
        part = slice(first * row, min(count, first + rows) * row)
        p = torch.softmax(model[part].reshape(-1, row).to(dtype), -1).add_(1e-8)
        q = torch.softmax(base[part].reshape(-1, row).to(dtype), -1).add_(1e-8)
        found[first : first + rows] = torch.div(p, q, out=q).log_().mul_(p).sum(-1)
    return found.nan_to_num_(0, 0, 0)
