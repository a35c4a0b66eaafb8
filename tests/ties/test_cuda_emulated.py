"""The CUDA kernels without a GPU: the same source, run on the host by tests/cuda_emulation (threads
as fibers, blocks in a shuffled order, size classes lowered), bit for bit against the reference.
Finds errors of logic; not of memory ordering.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from gpu_cases import Case, differences, draw, draw_alike, parts_differ, plain, same_bits
from ties_cases import DTYPES, family

import pymerge
from pymerge.backends import cuda, native, registry
from pymerge.reference import ties as reference
from pymerge.rules.ties import resolve_options


@pytest.fixture(autouse=True)
def on_the_host(emulated, monkeypatch):
    monkeypatch.setattr(native, "cuda", lambda: emulated.cuda)
    monkeypatch.setattr(cuda, "place", lambda device: (0, 3, 0))  # three multiprocessors, no stream


def check(case):
    found, pending = differences(case, cuda.ties, "cpu")
    assert not found, (found, case.about, case.options)
    return pending


def parts(count):
    """Drawn cases in so many parts: the first one, and the others with `-m slow`."""
    rest = [pytest.param(part, marks=pytest.mark.slow) for part in range(1, count)]
    return pytest.mark.parametrize("part", [0, *rest])


@parts(4)
def test_any_option_on_any_tensor(part):
    for seed in range(part * 25, part * 25 + 25):
        check(draw(seed, [0, 1, 2, 3, 5, 100, 777, 4096, 5003, 9001], [1, 2, 3, 4, 8, 9, 17]))


@parts(4)
def test_any_option_on_tensors_that_are_guessed(part):
    for seed in range(1000 + part * 8, 1000 + part * 8 + 8):
        check(draw(seed, [16384, 20_000, 33_333], [1, 2, 3, 4, 5, 8, 11], doubles=False))


@parts(4)
def test_tensors_of_one_type_to_the_ends_of_its_range(part):
    for seed in range(part * 40, part * 40 + 40):
        check(draw_alike(seed, [4099, 5000, 8192, 20_000]))


@pytest.mark.parametrize(
    "count", [3, 6, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 4, 5, 7, 8))]
)
def test_division_by_a_count_is_ieee_division(emulated, count):
    """Every number of one binade, which stands for those above it, and all below; sixths have the
    limit that the kernel sees to.
    """
    binade, safe = 0x40000000, 0x0DA24260  # 2, and 1e-30
    assert emulated.wrong_quotients(count, binade, binade + (1 << 23)) == 0
    assert emulated.wrong_quotients(count, 0x7F000000, 0x7F7FFFFF) == 0
    first = safe if count == 6 else 0
    assert emulated.wrong_quotients(count, first, first + (1 << 25)) == 0
    if count == 6:
        assert emulated.wrong_quotients(6, 0, 1 << 25) > 0


@pytest.mark.parametrize("majority", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_of_many_tiles_in_a_block(monkeypatch, dtype, majority):
    """More than a register's counts hold; with zero signs of both kinds."""
    monkeypatch.setattr(cuda, "place", lambda device: (0, 1, 0))  # one multiprocessor
    n = 90_000
    models, base = family(n, 2, "few_values", [dtype])
    rule = resolve_options(2, density=0.5, zero_sign="majority").rule(n)
    rule = rule.with_precomputed(majority=majority)
    out, expected = torch.empty_like(base), torch.empty_like(base)
    stats = cuda.ties(models, base, rule, out).resolve()
    assert stats == reference.ties(models, base, rule, expected)
    assert same_bits(out, expected)


@pytest.mark.parametrize("count", [6, 7, 8])
def test_sixths_of_subnormal_sums(count):
    """Some lie midway between two numbers, which a product with the rounded sixth does not know."""
    g = torch.Generator().manual_seed(count)
    drawn = [torch.randint(1, 40, (5003,), generator=g) for _ in range(6)]
    models = [(x * 2.0**-149).float() for x in drawn] + [torch.zeros(5003)] * (count - 6)
    check(Case(models, None, torch.float32, {"trim": "none", "merge": "mean"}))


def test_sixty_four_models_of_mixed_types():
    check(draw(7, [700], [64]))
    models, base = family(5000, 64, "gaussian", DTYPES)
    out, expected = torch.empty(5000), torch.empty(5000)
    rule = resolve_options(64, density=0.3).rule(5000)
    stats = cuda.ties(models, base.float(), rule, out).resolve()
    assert stats == reference.ties(models, base.float(), rule, expected) and torch.equal(
        out, expected
    )
    with pytest.raises(ValueError, match="takes 1 to 64"):
        cuda.ties([*models, base], None, rule, out)


def at(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins so many elements into its memory."""
    return torch.empty(offset + len(tensor), dtype=tensor.dtype)[offset:].copy_(tensor)


@pytest.mark.parametrize("length", range(8))
def test_vectors_end_and_begin_anywhere(length):
    """More models than fast.cuh takes, or mixed types: each tensor at a place of its own in memory,
    of which some are a multiple of 16 bytes, and a last vector of any length. Nothing is written
    beside the output.
    """
    everything: list[dict[str, Any]] = [
        {"trim": "magnitude", "density": [0.3, 0.2, 1.0] + 8 * [0.4]},
        {"trim": "random", "density": 0.5, "rescale": "l2", "seed": length},
        {"trim": "outliers", "density": 0.4, "gamma": 0.1, "elect": "count", "merge": "max"},
        {"trim": "none", "flavor": "peft", "zero_sign": "majority", "rescale": "linf"},
    ]
    everything = everything[length % 2 :: 2]
    sizes = [2152, 4160, 16_392]  # in one block, which takes 2048 at a time; searched; guessed
    types = [
        [*DTYPES, torch.float64],
        [torch.bfloat16],
        [torch.float16],
        [torch.bfloat16, torch.float32],
    ]
    for (j, n), options in itertools.product(enumerate(sizes), everything):
        size, dtypes = n + length, types[(j + length) % 4]
        models, base = family(size, 11, "few_values", dtypes, seed=length)
        models[4][-1 - length :] = math.nan
        models[0][: min(300, size // 2)] = math.inf  # all that a warp takes at a time
        offsets = [(3 * k + length) % 10 * (k % 3 > 0) for k in range(12)]
        models = [at(m, offset) for m, offset in zip(models, offsets, strict=False)]
        base = at(base, offsets[-1])
        rule = resolve_options(11, **options).rule(size)
        room = torch.full((size + 16,), -7.0, dtype=dtypes[-1])
        out, expected = room[length : length + size], torch.empty(size, dtype=dtypes[-1])
        stats = cuda.ties(models, base, rule, out).resolve()
        assert repr(stats) == repr(reference.ties(models, base, rule, expected))
        assert same_bits(out, expected), (size, options, dtypes)
        assert (room[:length] == -7).all() and (room[length + size :] == -7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", range(1, 9))
def test_every_number_of_models_of_one_type(dtype, count):
    """fast.cuh: aligned, one dtype; with a guess (magnitude) and without (none), the last elements
    apart.
    """
    for case in (
        plain(17_003, count, dtype, density=0.2),
        plain(
            9_001, count, dtype, with_base=False, trim="none", elect="none", merge="weighted_mean"
        ),
        plain(6_007, count, dtype, density=0.5, merge="mean", flavor="peft", zero_sign="majority"),
    ):
        case.models[0][5], case.models[-1][-1] = math.nan, -math.inf
        check(case)


@pytest.mark.parametrize("elect", ["sum", "none"])
@pytest.mark.parametrize("merge", ["weighted_mean", "mean", "sum", "max"])
def test_merges_of_one_type(elect, merge):
    weights = [0.5, -0.3, 0.0, 1.25]
    for trim, flavor in itertools.product(["magnitude", "none"], ["mergekit", "peft"]):
        check(plain(5003, 4, torch.bfloat16, "few_values", trim=trim, flavor=flavor, elect=elect, merge=merge,
                    density=[0.3, 1.0, 0.0, 0.6], weights=weights, scaling=0.7))  # fmt: skip


@pytest.mark.parametrize("distribution", ["gaussian", "outliers"])
def test_a_guess_holds(distribution):
    """One pass is enough, and its candidates are resolved and mended to the exact result."""
    assert not check(plain(30_000, 2, torch.float32, distribution, density=0.2)).missed()
    assert not check(
        plain(30_000, 2, torch.float32, distribution, density=0.2, elect="count")
    ).missed()


@pytest.mark.parametrize("distribution", ["all_equal", "mostly_zero", "signed_zero"])
def test_a_bracket_collapses_to_a_heavy_value(distribution):
    assert not check(plain(30_000, 3, torch.bfloat16, distribution, density=0.2)).missed()


def test_sorted_tensors():
    """All candidates lie in a few neighbouring tiles, which may not have the room: with or without
    the second pass.
    """
    for n in (30_000, 60_000):
        check(plain(n, 2, torch.float32, "sorted_up", density=0.2))
        check(plain(n, 2, torch.float32, "sorted_up", density=0.2, elect="count"))


def test_a_guess_that_fails_is_repeated_exactly():
    """Rows of very different sizes between the sampled places; ranks too small for a sample to
    tell.
    """
    assert check(plain(20_000, 2, torch.float32, "blocks", density=0.2)).missed()
    assert check(plain(20_000, 2, torch.float32, density=1e-4)).missed()


def test_many_tensors_take_a_handful_of_launches(emulated):
    options = resolve_options(3, density=0.3)
    jobs, expected = [], []
    for j in range(120):
        n = 1 + 37 * j % 2000
        models, base = family(n, 3, "gaussian", [DTYPES[j % 3]], seed=j)
        rule = options.rule(n, str(j))
        jobs.append((models, base, rule, torch.full_like(base, math.nan)))
        out = torch.empty_like(base)
        expected.append((out, reference.ties(models, base, rule, out)))
    emulated.launches()
    stats = cuda.ties_many(jobs)
    assert emulated.launches() <= 4
    for (_, _, _, out), one, (want, wanted) in zip(jobs, stats, expected, strict=True):
        assert torch.equal(out, want) and one.resolve() == wanted


def test_tensors_of_all_sizes_in_one_call():
    jobs = [
        draw(seed, [0, 5, 3000, 5003, 17_001], [2], doubles=seed % 3 == 0) for seed in range(12)
    ]
    outs = [torch.full(c.models[0].shape, math.nan, dtype=c.out_dtype) for c in jobs]
    stats = cuda.ties_many(
        [(c.models, c.base, c.rule, out) for c, out in zip(jobs, outs, strict=True)]
    )
    for case, out, one in zip(jobs, outs, stats, strict=True):
        want = torch.empty_like(out)
        wanted = reference.ties(case.models, case.base, case.rule, want)
        assert repr(one.resolve()) == repr(wanted), case.about
        assert same_bits(out, want), case.about


def test_strided_inputs_are_read_in_their_own_order():
    models = [torch.randn(90, 70).T for _ in range(3)]
    base, out, expected = torch.randn(70, 180)[:, ::2], torch.empty(70, 90), torch.empty(70, 90)
    rule = resolve_options(3).rule(out.numel())
    assert cuda.ties(models, base, rule, out).resolve() == reference.ties(
        models, base, rule, expected
    )
    assert torch.equal(out, expected)


def test_a_strided_out_is_refused():
    models, base = family(64, 2)
    with pytest.raises(ValueError, match="contiguous"):
        cuda.ties(models, base, resolve_options(2).rule(32), torch.empty(64)[::2])


def test_select_over_segments():
    models, base = family(30_011, 3, "blocks", DTYPES)
    cuts = [0, 1, 1, 700, 20_000, 30_011]
    segments = [([m[a:b] for m in models], base[a:b]) for a, b in itertools.pairwise(cuts)]
    for ranks in ([6002, 1, 30_000], [0, 30_011, 15_000]):
        got = cuda.select(segments, ranks)
        assert repr(got.tolist()) == repr(reference.select(segments, ranks))
    wide = [([m.double() for m in models], base)]
    assert cuda.select(wide, [7, 77, 777]).tolist() == reference.select(wide, [7, 77, 777])


def test_known_thresholds_bounds_and_majority():
    models, base = family(6000, 3, "few_values")
    options = resolve_options(
        3, trim="outliers", density=0.5, gamma=0.1, zero_sign="majority", merge="sum"
    )
    rule = options.rule(6000).with_precomputed(
        thresholds=(0.125, math.nan, 0.25), bounds=(0.375, 1.0, 0.5), majority=-1
    )
    out, expected = torch.empty(6000), torch.empty(6000)
    stats = cuda.ties(models, base, rule, out).resolve()
    assert repr(stats) == repr(reference.ties(models, base, rule, expected)) and torch.equal(
        out, expected
    )


@parts(2)
def test_tensors_in_parts(part):
    """The rest of a tensor's rule filled in, its parts have the bits of the whole, whatever the
    option.
    """
    for seed in range(3000 + part * 15, 3015 + part * 15):
        case = draw(seed, [5003, 9001, 33_333], [1, 2, 3, 5, 9])
        assert not parts_differ(case, cuda.ties, 3000 + 4 * (seed % 3)), seed


@pytest.mark.parametrize(
    ("codes", "capability", "runs"),
    [
        ("sm_80,sm_90,compute_90", (8, 0), True),
        ("sm_80,sm_90,compute_90", (8, 6), True),
        ("sm_80,sm_90,compute_90", (9, 0), True),
        ("sm_80,sm_90,compute_90", (12, 0), True),
        ("sm_80,sm_90,compute_90", (7, 5), False),
        ("sm_86", (8, 0), False),
        ("sm_90", (10, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a,compute_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("sm_100f", (12, 0), False),
        ("", (9, 0), False),
    ],
)
def test_which_devices_the_kernels_were_compiled_for(emulated, codes, capability, runs):
    assert emulated.runs(codes, *capability) is runs


@pytest.fixture
def dispatched(monkeypatch):
    """Tensors of the host are a GPU's: "auto" and "cuda" take the emulated kernels."""
    monkeypatch.setitem(registry.ORDER, "cpu", ("cuda",))
    monkeypatch.setattr(registry, "why_not", lambda backend: None)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ties", "density": 0.3},
        {"method": "dare_ties", "density": 0.4, "seed": 3},
        {"method": "ties", "density": 0.3, "flavor": "paper"},
        {"method": "breadcrumbs", "density": 0.7, "gamma": 0.1, "non_finite": "allow"},
    ],
    ids=str,
)
def test_state_dicts_are_merged_where_they_are(emulated, dispatched, monkeypatch, options):
    """No tensor leaves the device, and many small ones are a few launches."""
    sizes = {f"layer{j}": 5 + 61 * j % 1500 for j in range(60)} | {"large": 9001, "empty": 0}
    drawn = {n: family(size, 2, "few_values", [torch.bfloat16]) for n, size in sizes.items()}
    models = [{n: made[k] for n, (made, _) in drawn.items()} for k in range(2)]
    base = {n: b for n, (_, b) in drawn.items()}
    wanted = pymerge.merge(models, base, backend="reference", **options)
    for moves in ("cpu", "to", "cuda", "numpy"):
        monkeypatch.setattr(torch.Tensor, moves, _refuse)
    emulated.launches()
    found = pymerge.merge(models, base, **options)
    assert emulated.launches() <= 40
    monkeypatch.undo()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a tensor was moved")


def test_a_state_dict_that_is_not_finite(dispatched):
    models = [{"a": torch.ones(9), "b": torch.full((8,), math.inf)} for _ in range(2)]
    base = {"a": torch.zeros(9), "b": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"of tensor 'b' \(models\[0\]: 8, models\[1\]: 8, of 8\)"):
        pymerge.merge(models, base)
