"""What is the Triton kernels' own, beside the spec suite: sizes, selection by digits, tables,
speculation and parts, against the reference, bit for bit, on CPU tensors through Triton's
interpreter.

Run by tests/backends/test_interpreted.py in processes of their own, since TRITON_INTERPRET counts
when a kernel is defined.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from gpu_cases import differences, draw, parts_differ
from ties_cases import DISTRIBUTIONS, DTYPES, family, same_bits, ulp_family

from pymerge.reference import ties as reference
from pymerge.rules.ties import MERGES, resolve_options
from pymerge.triton_kernels import ties as kernels
from pymerge.triton_kernels.ties import _descriptors, _launch_plan

np.seterr(all="ignore")  # the interpreter computes in NumPy; overflow and NaN are part of the cases


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch, request):
    """Fewer, larger blocks: the interpreter's time goes by blocks. Tests marked `as_launched` take
    the real ones.
    """
    if "as_launched" not in request.fixturenames:
        monkeypatch.setattr(_launch_plan, "_CHUNK", 8192)
        monkeypatch.setattr(_launch_plan, "_WARPS", 16)


@pytest.fixture
def as_launched():
    """Blocks as on a device."""


def check(models, base=None, *, out_dtype=None, rule=None, **options):
    """Output bits and every count equal the reference's."""
    like = models[0] if base is None else base
    if rule is None:
        rule = resolve_options(len(models), **options).rule(like.numel(), "name")
    got = torch.full(like.shape, math.nan, dtype=out_dtype or like.dtype)
    want = got.clone()
    lazy = kernels.ties(models, base, rule, got)
    wanted = reference.ties(models, base, rule, want)
    compare(got, lazy.resolve(), want, wanted)
    return lazy


def compare(got, stats, want, wanted):
    assert same_bits(got, want), f"{int((got != want).sum())} of {got.numel()} elements differ"
    assert repr(stats) == repr(wanted)  # as text, so that a NaN equals itself


def seeds(first, few, many):
    """Seeds of drawn cases: a few, and the others with `-m slow`."""
    rest = pytest.param(range(first + few, first + many), id="rest", marks=pytest.mark.slow)
    return pytest.mark.parametrize(
        "seeds", [pytest.param(range(first, first + few), id="some"), rest]
    )


@seeds(7000, 8, 24)
def test_any_options(seeds):
    """What the spec suite does not put together: any options at once, with weights, dtypes and
    alignments of every kind.
    """
    for seed in seeds:
        case = draw(seed, [0, 1, 2, 5, 100, 777, 1501], [1, 2, 3, 4, 9])
        found, _ = differences(case, kernels.ties, "cpu")
        assert not found, (found, case.about, case.options)


@pytest.mark.parametrize("n", [1, 2, 3, 511, 512, 513, 1025, 4099])
def test_sizes_as_launched(n, as_launched):
    models, base = family(n, 2, dtypes=(torch.float32, torch.bfloat16, torch.float32))
    check(models, base, density=0.37)


@pytest.mark.parametrize("n", [16384, 16385, 20011])
def test_large_tensors_select_by_digits(n):
    models, base = family(n, 2, "heavy_tailed")
    check(models, base, density=[0.2, 0.003])
    check(models, base, trim="outliers", density=0.9, gamma=0.05, merge="sum")


def test_large_float64_tensors_select_by_digits():
    large, base = family(17000, 1, "gaussian", (torch.float64,))
    check(large, base, density=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float64_is_rounded_to_16_bits_once(dtype):
    middle = torch.tensor(
        [1 + 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65519.99, 2**-25], dtype=torch.float64
    )
    model = torch.cat([middle * (1 + 2**-40), middle, middle * (1 - 2**-40), -middle])
    check([model], out_dtype=dtype, trim="none", elect="none", merge="sum")


@pytest.mark.parametrize("rescale", ["density", "l2", "linf"])
def test_not_finite(rescale):
    n = 600
    models, base = family(n, 3)
    models[0][5], models[1][5], models[2][5] = math.inf, -math.inf, 0
    models[1][7], models[2][9], models[0][n - 1] = math.nan, math.inf, -math.inf
    check(models, base, density=0.5, rescale=rescale)
    check(models, None, density=1.0, elect="none", rescale=rescale)


def test_overflow_by_rescaling_is_seen():
    models = [torch.full((5000,), 3e38), torch.full((5000,), -3e38)]
    check(models, trim="none", elect="none", rescale="density", density=0.5)


def test_known_thresholds_bounds_and_majority():
    models, base = family(800, 2)
    rule = resolve_options(2, trim="outliers", zero_sign="majority").rule(800)
    for majority in (1, -1):
        check(
            models, base,
            rule=rule.with_precomputed(thresholds=(0.01, math.nan), bounds=(0.03, 0.04), majority=majority),
        )  # fmt: skip


def test_strided_overlapping_unaligned_and_empty():
    whole, _ = family(4000, 1)
    x = whole[0]
    check([x[1:1001], x[:2000:2]], x[3:1003], density=0.5)
    check([x[:1200].reshape(30, 40).t()], x[1200:2400].reshape(40, 30), density=0.5)
    check([x[:0], x[:0]], x[:0])
    check([x[0]], x[1], density=0.5)
    with pytest.raises(ValueError, match="strided"):
        kernels.ties([x[:10]], None, resolve_options(1).rule(10), torch.empty(20)[::2])


def test_many_tensors_share_launches(as_launched):
    rng = random.Random(0)
    requests, wanted = [], []
    for i in range(9):
        n = [1, 100, 1024, 1500, 0, 5000, 4096, 33, 800][i]
        dtypes = (torch.bfloat16,) if i % 2 else (torch.float32,)
        models, base = family(n, 2, rng.choice(list(DISTRIBUTIONS)), dtypes, seed=i)
        options = {
            "density": 0.1 * (i + 1),
            "zero_sign": "majority",
            "rescale": "l1" if i == 3 else "none",
        }
        rule = resolve_options(2, **options).rule(n)
        out = torch.full_like(base, math.nan)
        requests.append((models, base, rule, out))
        want = torch.empty_like(base)
        wanted.append((want, reference.ties(models, base, rule, want)))
    for (_, _, _, out), lazy, (want, stats) in zip(
        requests, kernels.ties_many(requests), wanted, strict=True
    ):
        compare(out, lazy.resolve(), want, stats)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16, torch.float16, torch.float64)]
)
def test_select_over_segments(dtypes):
    segments = [
        family(n, 2, d, dtypes, seed=n)
        for n, d in ((0, "gaussian"), (700, "blocks"), (3000, "few_values"))
    ]
    total = sum(base.numel() for _, base in segments)
    for rank in (0, 1, 500, total - 1, total, total + 5):
        assert repr(kernels.select(segments, [rank, 40])) == repr(
            reference.select(segments, [rank, 40])
        )
    assert repr(kernels.select(segments[:1], [1, 1])) == "[nan, nan]"


def test_counts_of_64_bits(monkeypatch):
    monkeypatch.setattr(_launch_plan, "_WIDE", 0)
    segments = [family(n, 1, "few_values", seed=n) for n in (700, 3000)]
    assert repr(kernels.select(segments, [500])) == repr(reference.select(segments, [500]))


def test_poked_table_is_the_uploaded_one():
    words = [0, -1, 2**63 - 1, -(2**63), *range(150)]
    assert _descriptors.poke(words, torch.device("cpu"))[: len(words)].tolist() == words


# --- one pass with guessed thresholds
# ----------------------------------------------------------------------------


def missed(lazy):
    return int(lazy._row[_descriptors.MISSED.value])


@pytest.fixture
def speculate(monkeypatch):
    """Speculate on tensors of any size; the sample is a share of the tensor, the record room as
    given.
    """

    def set_up(share=0.5, room=1.0, sigmas=3.5):
        def sample(kind, job):
            n = job.models[0].numel()
            fits = kind.WORK == 32 and kind.TRIM == 1 and kind.RESCALE < 2 and kind.K <= 8
            return (int(n * share), max(1, int(n * room))) if fits else None

        monkeypatch.setattr(_launch_plan, "_sample", sample)
        monkeypatch.setattr(_launch_plan, "_SIGMAS", sigmas)

    return set_up


@pytest.mark.parametrize(
    ("distribution", "dtypes", "count"),
    [
        ("gaussian", (torch.float32,), 2),
        ("heavy_tailed", (torch.float32, torch.bfloat16), 1),
        ("mostly_zero", (torch.float32,), 2),
        ("blocks", (torch.float32,), 1),
        ("sorted_up", (torch.float32,), 1),
        ("gaussian", (torch.bfloat16,), 4),
        ("mostly_zero", (torch.bfloat16,), 4),
        ("gaussian", (torch.float32,), 6),
    ],
)
def test_guesses_that_hold(speculate, distribution, dtypes, count):
    speculate()
    models, base = family(20011, count, distribution, dtypes)
    density = 0.02 if distribution == "mostly_zero" or count > 2 else 0.1
    lazy = check(models, base, density=density, weights=0.5, zero_sign="majority")
    assert not missed(lazy)


@pytest.mark.parametrize("elect", ["sum", "count", "none"])
@pytest.mark.parametrize("merge", MERGES)
def test_mended_elements_follow_every_rule(speculate, elect, merge):
    speculate(share=0.1, sigmas=2.5)  # a poor estimate: more to fix up
    models, base = family(17000, 2, seed=3)
    check(
        models,
        base,
        elect=elect,
        merge=merge,
        density=[0.2, 1.0],
        weights=[0.3, 0.6],
        rescale="density",
    )


def test_a_single_key_collapses_the_bracket(speculate):
    speculate()
    base = torch.zeros(17000)
    model = torch.full((17000,), 0.5).where(torch.arange(17000) % 4 > 0, 2.0)
    lazy = check([model], base, density=0.6)
    assert not missed(lazy)
    assert lazy._row[_descriptors.HEADER.value + _descriptors.LOWER.value] == _descriptors.bits(
        0.5, 32
    )


def test_few_distinct_keys_in_one_level(speculate):
    speculate(share=0.05)
    for dtype in DTYPES:
        models, base = ulp_family(17000, 1, dtype, seed=1)
        check(models, base, density=0.31)


def test_a_bracket_that_misses_is_found_out(speculate, monkeypatch):
    speculate()
    guess = _launch_plan._sample_row

    def wrong(job, size):
        words = guess(job, size)
        at = _descriptors.HEADER.value + _descriptors.RANK.value
        words[at : at + 2] = [max(1, words[at] // 3), max(1, words[at] // 4)]
        return words

    monkeypatch.setattr(_launch_plan, "_sample_row", wrong)
    models, base = family(17000, 2)
    assert missed(check(models, base, density=0.3))


def test_records_that_overflow_are_found_out(speculate):
    speculate(room=0.001)
    models, base = family(17000, 2)
    assert missed(check(models, base, density=0.1))


def test_nan_ends_speculation(speculate):
    speculate()
    models, base = family(17000, 2)
    models[1][12345] = math.nan
    assert missed(check(models, base, density=0.1))


def test_speculation_as_launched(speculate, as_launched):
    speculate()
    models, base = family(16999, 3, dtypes=(torch.bfloat16, torch.float32, torch.float32))
    assert not missed(check(models, base, density=0.05))


@seeds(5000, 6, 16)
def test_tensors_in_parts(seeds):
    """Thresholds, bounds, norms' factors and the place in the tensor are taken from the rule."""
    for seed in seeds:
        case = draw(seed, [1501, 2003], [1, 2, 3])
        assert not parts_differ(case, kernels.ties, 1000 + 4 * (seed % 3)), seed
