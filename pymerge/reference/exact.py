"""T9 of docs/spec/ties.md in integers of Python: norms that are never rounded, and their quotient
rounded once.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

LEAST_NORM = 1e-7
_PIECE = 18  # bits; three pieces make a significand, and 2**26 products of two an int64
_SIGNIFICAND = {torch.float32: (24, -149), torch.float64: (53, -1074)}  # bits, least exponent


def exact_sum(delta: torch.Tensor, square: bool) -> Fraction | float:
    """The sum of |delta|, or of delta**2, as it is; infinity or NaN where a term is."""
    size = delta.abs().reshape(-1)
    if not bool(size.isfinite().all()):
        return float(size.sum())
    if size.numel() == 0:
        return Fraction(0)
    total = 0
    for part in torch.split(size, 1 << 24):
        significand, exponent = torch.frexp(part.double())
        whole = (significand * 2.0**53).long()
        lowest, highest = (int(each) for each in exponent.aminmax())
        index = exponent - lowest
        pieces = [whole >> (_PIECE * i) & ((1 << _PIECE) - 1) for i in range(3)]
        terms = (
            [(i + j, pieces[i] * pieces[j]) for i in range(3) for j in range(3)]
            if square
            else list(enumerate(pieces))
        )
        for i, term in terms:
            sums = torch.zeros(highest - lowest + 1, dtype=torch.int64, device=part.device)
            for place, its in enumerate(sums.index_add_(0, index, term).tolist(), lowest):
                # In units of 2**-2300, which is below every term.
                total += its << (_PIECE * i + (place - 53) * (2 if square else 1) + 2300)
    return Fraction(total, 1 << 2300)


def add_sums(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    """Of two parts: infinity or NaN where one is, which no Fraction can become."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a + b
    return sum(each for each in (a, b) if isinstance(each, float))


def rounded_quotient(
    before: Fraction | float, after: Fraction | float, work: torch.dtype, root: bool
) -> float:
    """before / after, or its root, rounded once to nearest, ties to even. 1 where either, or its
    root, is not at least 1e-7.
    """
    least = Fraction(LEAST_NORM) ** (2 if root else 1)
    if not (before >= least and after >= least):
        return 1.0
    if not isinstance(before, Fraction) or not isinstance(after, Fraction):
        return math.inf if isinstance(after, Fraction) else math.nan
    return rounded(before / after, work, root)


def rounded(quotient: Fraction, work: torch.dtype, root: bool) -> float:
    """A number of 0 or more, or its root, rounded once to nearest, ties to even."""
    bits, lowest = _SIGNIFICAND[work]
    # The units of the result, 2**e: it has `bits` bits in them, or one more or less.
    e = quotient.numerator.bit_length() - quotient.denominator.bit_length()
    e = max((e // 2 if root else e) - bits, lowest)
    while True:
        unit = Fraction(2) ** (2 * e if root else e)
        ratio = 4 * quotient / unit if root else 2 * quotient / unit  # of half units
        halves = math.isqrt(math.floor(ratio)) if root else math.floor(ratio)
        if halves >> (bits + 1) == 0:
            break
        e += 1
    exact = Fraction(halves) ** (2 if root else 1) == ratio
    up = halves & 1 and (not exact or halves & 2)
    try:
        result = math.ldexp(halves // 2 + bool(up), e)
    except OverflowError:
        return math.inf
    largest = torch.finfo(work).max
    return result if result <= largest else math.inf
