"""T9 of docs/spec/ties.md: the quotient of two exact sums, rounded once."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from ties_backends import FAST, INTERPRETED, check_equal, make_backend
from ties_cases import family

from pymerge.reference.exact import add_sums, exact_sum, rounded_quotient
from pymerge.reference.ties import norm, norm_factor
from pymerge.rules.ties import resolve_options

RULE = {"elect": "none", "merge": "sum", "density": 0.5}
SEEDS = range(1 if INTERPRETED else 4)
HALF_ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@pytest.fixture(params=FAST)
def fast(request, monkeypatch):
    backend, undo = make_backend(request.param, monkeypatch, request)
    yield backend
    undo()


def check(fast, x, **options):
    rule = resolve_options(1, **RULE | options).rule(x.numel(), "w")
    check_equal(fast, [x], None, rule=rule)


def midway(dtype, n, off=0.0):
    """A tensor of which a half is kept, whose l1 norms' quotient is 1 and half a unit in the last
    place, and something more or less.
    """
    x = torch.zeros(n, dtype=dtype)
    x[: n // 2] = 8.0
    x[-1] = HALF_ULP[dtype] * 8 * (n // 2)
    x[-2] = abs(off)
    if off < 0:
        x[-1] -= abs(off) * 2
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [16] if INTERPRETED else [16, 1024, 4096])
def test_a_quotient_midway_is_rounded_to_even_and_what_is_beside_it_to_its_side(fast, dtype, n):
    """A sum in binary64 rounds the smallest of these terms away."""
    ulp = 2 * HALF_ULP[dtype]
    exact = midway(dtype, n)
    above = midway(dtype, n, 1e-30)
    assert norm_factor(exact, exact >= 8, "l1") == 1
    assert norm_factor(above, above >= 8, "l1") == 1 + ulp
    for x in (exact, above):
        out, _ = fast.run([x], rescale="l1", **RULE)
        assert out[0].item() == 8 * norm_factor(x, x >= 8, "l1")
        check(fast, x, rescale="l1")


@pytest.mark.parametrize("kind", ["l1", "l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitudes_over_the_whole_range(fast, kind, dtype):
    """Subnormals beside the largest numbers, whose squares no binary64 holds."""
    limits = torch.finfo(dtype)
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        exponents = torch.rand(
            300 if INTERPRETED else fast.size(3000), generator=draw, dtype=torch.float64
        )
        span = math.log2(limits.max) - math.log2(limits.tiny) + 10
        x = torch.exp2(exponents * span + math.log2(limits.tiny) - 11).to(dtype)
        x[torch.rand(len(x), generator=draw) < 0.5] *= -1
        assert x.isfinite().all()
        check(fast, x, rescale=kind, density=0.3, trim="random", seed=seed)
        check(fast, x[:50] * limits.tiny, rescale=kind, density=0.6)  # norms below 1e-7


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_least_norm_is_compared_exactly(fast, kind):
    """1e-7 has neighbours that a sum of terms reaches, one in 2^53 of it below or above."""
    least = 1e-7
    for other in (0.0, math.ulp(least) / 4, -math.ulp(least) / 4):
        x = torch.tensor([least, other, 0, 0], dtype=torch.float64)
        if other < 0:
            x = torch.tensor([math.nextafter(least, 0), -other, 0, 0], dtype=torch.float64)
        check(fast, x, rescale=kind, density=0.75)


@pytest.mark.parametrize("kind", ["l1", "l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_that_are_not_finite(fast, kind, dtype):
    inf, nan = math.inf, math.nan
    for values in ([inf, 1, 2, 3], [inf, -inf, 1, 2], [nan, 1, 2, 3], [nan, inf, 5, 1]):
        x = torch.tensor(values, dtype=dtype)
        check(fast, x, rescale=kind, density=0.5)
        for seed in SEEDS:
            check(fast, x, rescale=kind, density=0.5, trim="random", seed=seed)


def test_the_reference_sums_as_fractions_do():
    draw = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        for scale in (limits.smallest_normal / 2, 1.0, limits.max / 8):
            x = (torch.randn(301, generator=draw, dtype=torch.float64) * scale).to(dtype)
            x = x[x.isfinite()]
            for square in (False, True):
                terms = [abs(Fraction(each)) ** (2 if square else 1) for each in x.tolist()]
                assert exact_sum(x, square) == sum(terms)


def test_sums_of_parts_are_added_whatever_their_size():
    huge = Fraction(2) ** 3000  # no float
    assert add_sums(huge, huge) == 2 * huge
    assert add_sums(huge, math.inf) == add_sums(math.inf, huge) == math.inf
    assert math.isnan(add_sums(math.inf, math.nan)) and math.isnan(add_sums(math.nan, huge))


def test_the_norm_itself():
    x = torch.tensor([3.0, -4.0, 0.0])
    assert [norm(x, kind) for kind in ("l1", "l2", "linf")] == [7.0, 5.0, 4.0]
    assert norm(x[2:], "l2") == norm(x[:0], "linf") == 0.0 and norm(x / 0, "l1") != norm(x, "l1")


@pytest.mark.parametrize("root", [False, True])
def test_the_reference_rounds_as_python_does(root):
    """Python's division of integers is rounded once; a root is checked by its neighbours."""
    draw = torch.Generator().manual_seed(4)
    numbers = torch.randint(1, 1 << 40, (400, 2), generator=draw).tolist()
    for a, b in [*numbers, (1, 3), (1 << 60, 1), ((1 << 53) + 1, 1 << 53)]:
        found = rounded_quotient(Fraction(a), Fraction(b), torch.float64, root)
        if not root:
            assert found == a / b
            continue
        half = Fraction(math.ulp(found)) / 2
        assert (Fraction(found) - half) ** 2 <= Fraction(a, b) <= (Fraction(found) + half) ** 2
    for a, b, expected in [
        (Fraction(2) ** 300, Fraction(1), math.inf),
        (Fraction(2) ** 128 - Fraction(2) ** 103, Fraction(1), math.inf),
        (Fraction(2) ** 128 - Fraction(2) ** 103 - 1, Fraction(1), torch.finfo(torch.float32).max),
        (Fraction(2) ** -20, Fraction(2) ** 129, 2.0**-149),
        (Fraction(2) ** -20, Fraction(2) ** 130, 0.0),
        (Fraction(3) * Fraction(2) ** -20, Fraction(2) ** 130, 2.0**-148),
    ]:
        result = rounded_quotient(a, b, torch.float32, False)
        assert result == expected, (a, b)


@pytest.mark.parametrize("fast", [name for name in FAST if name.startswith("cpu-")], indirect=True)
@pytest.mark.parametrize("kind", ["l1", "l2", "linf"])
@pytest.mark.parametrize("distribution", ["gaussian", "few_values", "mostly_zero"])
def test_norms_of_what_a_selection_keeps(fast, kind, distribution):
    """More elements than are selected from keys that stay in the caches, and more models than are
    selected together; ranks at the ends.
    """
    for n, dtypes in ((150_001, [torch.float32]), (180_000, [torch.bfloat16])):
        models, base = family(n, 10, distribution, dtypes)
        density = [0.2, 0.5, 0.9, 0.01, 1e-9, 0.3, 0.5, 0.5, 1.0, 0.0]
        rule = resolve_options(10, density=density, rescale=kind, flavor="peft").rule(n, "w")
        check_equal(fast, models, base, rule=rule)
        models[1][70_000], models[3][5] = math.nan, math.inf
        rule = resolve_options(4, rescale=kind, density=0.3).rule(n, "w")
        check_equal(fast, models[:4], None, rule=rule)
