"""T3 `outliers` in one read: both ends of every band are found while merging, by the compiled
kernels, and the result is the reference's.
"""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from ties_cases import DISTRIBUTIONS, family, ulp_family
from ties_native import ONE_PASS, ONE_PASS_16_BIT, atoms, best_level_first, check, path

from pymerge.rules.ties import resolve_options


def bands(count, n, **options):
    return resolve_options(count, trim="outliers", **options).rule(n)


def ranked(n, rank, dropped):
    """The (dropped + 1)-th to the rank-th largest magnitude of one model."""
    return dataclasses.replace(bands(1, n, elect="none"), ranks=(rank,), dropped=(dropped,))


@best_level_first
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, "ulp"])
def test_adversarial_distributions(level, distribution, dtype):
    n, count = ONE_PASS + 12_345, 5
    if distribution == "ulp":
        models, base = ulp_family(n, count, dtype)
    else:
        models, base = family(n, count, distribution, [dtype])
    rule = bands(
        count,
        n,
        density=[0.01, 0.2, 0.5, 0.97, 1.0],
        gamma=[0.3, 0.01, 0.0, 0.02, 0.5],
        weights=0.7,
    )
    assert path(models, base, rule) in ("one pass", "two passes")
    check(models, base, rule, threads=2)


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float32],
        [torch.bfloat16],
        [torch.float16],
        [torch.float32, torch.bfloat16, torch.bfloat16],
        [torch.bfloat16, torch.float16, torch.float32],
    ],
    ids=["fp32", "bf16", "fp16", "bf16 of fp32", "mixed"],
)
def test_every_kind_of_tensors(level, dtypes):
    n, count = ONE_PASS + 1999, 2
    models, base = family(n, count, dtypes=dtypes)
    for threads, options in enumerate(
        ({"elect": "none", "merge": "sum"}, {"rescale": "density", "elect": "count"}), start=1
    ):
        rule = bands(count, n, density=0.4, gamma=[0.01, 0.1], **options)
        assert path(models, base, rule, threads) == "one pass"
        check(models, base, rule, threads=threads)


@pytest.mark.parametrize("threads", [1, 64, 1024])
def test_any_number_of_threads(threads):
    models, base = family(ONE_PASS + 17, 4)
    rule = bands(4, base.numel(), density=0.3)
    assert path(models, base, rule, threads) == "one pass"
    check(models, base, rule, threads=threads)


def test_as_many_models_as_are_sampled_together():
    n = ONE_PASS_16_BIT
    models, base = family(n, 3, dtypes=[torch.bfloat16])
    for count, way in ((21, "select"), (20, "one pass")):
        rule = bands(count, n, density=0.3, gamma=0.02)
        assert path((models * 7)[:count], base, rule) == way
    check((models * 7)[:20], base, rule, threads=2)


@best_level_first
def test_ranks_at_the_ends(level):
    """One element alone, the smallest, all but the largest: by rank, and by density and gamma."""
    n = ONE_PASS + 3
    models, base = family(n, 1)
    for rank, dropped in (
        (1, 0),
        (2, 1),
        (n, n - 1),
        (n - 1, n - 2),
        (n, 1),
        (n - 1, 0),
        (n // 2 + 1, n // 2),
    ):
        stats = check(models, base, ranked(n, rank, dropped), threads=2)
        assert stats.kept == (rank - dropped,)
    for density, gamma in ((1 / n, 1.0), (0.5 / n, 0.1), (0.5, 0.5 / n), (0.5, 0.0), (1.0, 0.3)):
        check(models, base, bands(1, n, density=density, gamma=gamma), threads=2)


def test_ends_at_the_edges_of_heavy_keys():
    """Near an edge the sample cannot say which key an end is: the counts must."""
    n = ONE_PASS_16_BIT
    part = n // 4
    models = [atoms(n, [part, part, part]).bfloat16()]
    base = torch.zeros(n, dtype=torch.bfloat16)
    taken = set()
    for dropped in [edge + by for edge in (part, 2 * part, 3 * part) for by in (-1, 0, 1)]:
        rule = ranked(n, min(n - 1, dropped + part), dropped)
        stats = check(models, base, rule, threads=2)
        # From the key of rank `rank` to that of rank `dropped + 1`, all elements of both.
        last, first = (rule.ranks[0] - 1) // part, dropped // part
        assert stats.kept == ((last - first + 1) * part,)
        taken.add(path(models, base, rule))
    assert taken == {"one pass", "two passes"}


@best_level_first
@pytest.mark.parametrize("spread", [1e-3, 3e-4])
def test_heavy_keys_among_others_take_one_pass(level, spread):
    """bf16 task vectors have keys of some percent each and many light ones between, in stages."""
    n = (1 << 20) + 77
    g = torch.Generator().manual_seed(0)
    weights = 0.03 * torch.randn(n, generator=g)
    tuned = [weights + spread * torch.randn(n, generator=g) for _ in range(2)]
    models, base = [m.bfloat16() for m in tuned], weights.bfloat16()
    rule = bands(2, n, density=[0.2, 0.5], gamma=[0.01, 0.07])
    assert path(models, base, rule) == "one pass"
    check(models, base, rule, threads=2)
    models[0][[5, n // 3, n - 1]] = math.inf  # such blocks are merged by the scalar rule
    models[1][n // 2] = math.nan
    check(models, base, rule, threads=3)


@pytest.mark.parametrize("unlike", [range(3, 32, 8), range(0, 32, 2)])
def test_stages_that_are_unlike_the_rest_are_found_out(unlike):
    task = 1 << 15
    n = 65 * task + 7
    g = torch.Generator().manual_seed(5)
    base = torch.randn(n, generator=g)
    models = [base + 1e-3 * torch.randn(n, generator=g)]
    rule = bands(1, n, density=0.3, gamma=0.2)
    assert path(models, base, rule) == "one pass"
    scale = torch.ones(n // task + 1)
    for place in unlike:
        scale[place::32] = 1.01
    models = [base + scale.repeat_interleave(task)[:n] * (m - base) for m in models]
    assert path(models, base, rule) == "two passes"
    check(models, base, rule, threads=2)


def test_brackets_that_miss_are_found_out():
    """Whole stretches of large values, which a sample of one element in 32 takes or misses."""
    n = 1 << 20
    g = torch.Generator().manual_seed(3)
    model, base = torch.randn(n, generator=g), torch.zeros(n)
    for start in torch.randint(0, n // 8192, (60,), generator=g).tolist():
        model[start * 8192 : (start + 1) * 8192] *= 100
    for density, gamma in ((0.2, 0.05), (0.37, 0.37)):
        check([model], base, bands(1, n, density=density, gamma=gamma), threads=2)


@best_level_first
def test_neighbouring_keys_are_told_apart(level):
    """Every key from 1 on, once: whichever ends were guessed, each element between them and the
    right ones counts.
    """
    n = 600_000
    keys = torch.arange(n, dtype=torch.int32) + 0x3F800000
    g = torch.Generator().manual_seed(n)
    models = [keys[torch.randperm(n, generator=g)].view(torch.float32) for _ in range(2)]
    rule = bands(2, n, density=[0.2, 0.5], gamma=[0.03, 0.4])
    stats = check(models, torch.zeros(n), rule, threads=2)
    assert stats.kept == (120_000, 300_000)


@pytest.mark.parametrize("gamma", [0.0, 3e-4, 0.02])
def test_elements_that_are_not_finite(level, gamma):
    """An infinity is the largest magnitude, and dropped or kept as that; NaN has magnitude 0."""
    n = ONE_PASS_16_BIT + 999
    models, base = family(n, 2, dtypes=[torch.bfloat16])
    rng = random.Random(5)
    for value in (math.nan, math.inf, -math.inf):
        for _ in range(20):
            models[rng.randrange(2)][rng.randrange(n)] = value
    rule = bands(2, n, density=[0.3, 0.95], gamma=gamma)
    assert path(models, base, rule) == "one pass"
    assert sum(check(models, base, rule, threads=2).non_finite) > 50


def test_the_zero_sign_of_the_majority_is_found(level):
    n = ONE_PASS_16_BIT
    g = torch.Generator().manual_seed(1)
    models = [torch.randint(-2, 2, (n,), generator=g).bfloat16() for _ in range(2)]
    base = torch.zeros(n, dtype=torch.bfloat16)
    for sign in (1, -1):
        rule = bands(2, n, density=0.4, gamma=0.2, zero_sign="majority", merge="mean")
        check([sign * m for m in models], base, rule, threads=2)
