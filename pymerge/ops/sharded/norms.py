"""T9 over ranks: the quotients of norms, rounded once.

Sums of magnitudes, or of squares, are made in binary64 a block at a time, which bounds their error,
and added up over blocks and ranks as integers, without a further one. A quotient whose rounding
that error could change is made from exact sums instead.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from pymerge.ops.sharded.layout import Ranks, Run
from pymerge.ops.sharded.parts import keeping, parts, unit_of
from pymerge.ops.sharded.sums import added, largest
from pymerge.reference.exact import LEAST_NORM, exact_sum, rounded_quotient
from pymerge.rules.ties import TiesRule

_BLOCK = 1 << 18  # elements of a sum in binary64
# Relative error of such a sum, twice over: _BLOCK roundings of 2**-53, in whatever order.
_ERROR = Fraction(1, 1 << 34)
# A sum as an integer in units of 2**-2300, which is below every term: 32 bits in each of so many
# numbers. The last two count infinite sums and those that are NaN.
_UNIT, _LIMBS = 2300, 142

Sum = Fraction | float
# Merges (models, rule, out) with a backend.
Kernel = Callable[[Sequence[torch.Tensor], TiesRule, torch.Tensor], None]


@dataclass(frozen=True)
class NormJob:
    """A tensor whose models are rescaled by a norm: the flat shards, where they are in the whole
    tensor, its rule with the thresholds filled in, and the working precision.
    """

    models: Sequence[torch.Tensor]
    base: torch.Tensor | None
    runs: Sequence[Run]
    rule: TiesRule
    work: torch.dtype
    ranks: Ranks

    @property
    def rescaled(self) -> list[int]:
        """The models whose factor is not 1 by their density (T3r)."""
        return [k for k, d in enumerate(self.rule.densities) if 0 < d < 1]


def factors(jobs: Sequence[NormJob], kernel: Kernel) -> list[tuple[float, ...]]:
    """f_k of every job's models; the same on all ranks."""
    found = [[1.0] * len(job.rule.densities) for job in jobs]
    places = [(at, k) for at, job in enumerate(jobs) for k in job.rescaled]
    maxima = [place for place in places if jobs[place[0]].rule.rescale == "linf"]
    sums = [place for place in places if jobs[place[0]].rule.rescale != "linf"]
    near = [place for place in sums if _by_blocks(jobs[place[0]])]
    open_ = [place for place in sums if not _by_blocks(jobs[place[0]])]

    tables = [_maxima(jobs[at], k, kernel) for at, k in maxima]
    ranks = [jobs[at].ranks for at, _ in maxima]
    for (at, k), bits in zip(maxima, largest([*zip(ranks, tables, strict=True)]), strict=True):
        before, after = (_sum_of(x) for x in bits.view(torch.float64).tolist())
        found[at][k] = rounded_quotient(before, after, jobs[at].work, False)
    for which, exact in ((near, False), (open_, True)):
        tables = [_sums(jobs[at], k, kernel, exact) for at, k in which]
        ranks = [jobs[at].ranks for at, _ in which]
        for (at, k), table in zip(which, added([*zip(ranks, tables, strict=True)]), strict=True):
            job, (before, after) = jobs[at], (_from_limbs(row) for row in table)
            error = Fraction(0) if exact else _ERROR
            quotient = _quotient(before, after, job.work, job.rule.rescale == "l2", error)
            if quotient is None:
                open_.append((at, k))
            else:
                found[at][k] = quotient
    return [tuple(each) for each in found]


def _by_blocks(job: NormJob) -> bool:
    """Whether sums of blocks in binary64 are worth making: the same on all ranks."""
    return job.work == torch.float32 and unit_of(job.rule) * 4 <= _BLOCK


def _maxima(job: NormJob, k: int, kernel: Kernel) -> torch.Tensor:
    """(2,) the bits of the largest magnitudes in binary64, in their order, of model k's task vector
    and of what is kept of it; NaN is above all.
    """
    most = torch.zeros(2, dtype=torch.int64, device="cpu")
    for pair in _blocks(job, k, kernel):
        for row, values in enumerate(pair):
            bits = values.abs().max().double().abs().reshape(1).cpu().view(torch.int64)
            most[row] = torch.maximum(most[row], bits[0])
    return most


def _sums(job: NormJob, k: int, kernel: Kernel, exact: bool) -> torch.Tensor:
    """(2, limbs) sums over model k's task vector, and over what is kept of it."""
    square = job.rule.rescale == "l2"
    units, infinite, not_numbers = [0, 0], [0, 0], [0, 0]
    for pair in _blocks(job, k, kernel):
        for row, values in enumerate(pair):
            total = exact_sum(values, square) if exact else _in_binary64(values, square)
            if isinstance(total, Fraction):
                units[row] += total.numerator * ((1 << _UNIT) // total.denominator)
            elif total != total:
                not_numbers[row] += 1
            else:
                infinite[row] += 1
    rows = [
        [*struct.unpack(f"<{_LIMBS}I", number.to_bytes(4 * _LIMBS, "little")), *others]
        for number, *others in zip(units, infinite, not_numbers, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _blocks(job: NormJob, k: int, kernel: Kernel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    alone, count = keeping(job.rule, k)
    for part in parts(job.runs, job.rule, _BLOCK):
        delta = part.of(job.models[k]).to(job.work)
        if job.base is not None:
            delta = delta - part.of(job.base).to(job.work)
        kept = torch.empty_like(delta)
        kernel([delta] * count, part.rule(alone), kept)
        yield delta, kept


def _in_binary64(values: torch.Tensor, square: bool) -> Sum:
    terms = values.double()
    return _sum_of(float((terms * terms if square else terms.abs_()).sum()))


def _sum_of(value: float) -> Sum:
    return Fraction(value) if math.isfinite(value) else value


def _from_limbs(row: torch.Tensor) -> Sum:
    *limbs, infinite, not_numbers = row.tolist()
    if not_numbers:
        return float("nan")
    if infinite:
        return float("inf")
    return Fraction(sum(limb << (32 * at) for at, limb in enumerate(limbs)), 1 << _UNIT)


def _quotient(
    before: Sum, after: Sum, work: torch.dtype, root: bool, error: Fraction
) -> float | None:
    """The quotient of two sums, rounded once; None where this error of theirs could change it."""
    if not isinstance(before, Fraction) or not isinstance(after, Fraction) or not error:
        return rounded_quotient(before, after, work, root)
    least = Fraction(LEAST_NORM) ** (2 if root else 1)
    if any(abs(each - least) <= each * 2 * error for each in (before, after)):
        return None
    low = rounded_quotient(before * (1 - error), after * (1 + error), work, root)
    high = rounded_quotient(before * (1 + error), after * (1 - error), work, root)
    return low if low == high else None
