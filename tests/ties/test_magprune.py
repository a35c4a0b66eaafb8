"""Trim "magprune" (DELLA; T3 of docs/spec/ties.md)."""

from __future__ import annotations

import math

import pytest
import torch
from ties_backends import CPU_LEVELS, Backend, check_equal, make_backend
from ties_cases import DISTRIBUTIONS, DTYPES, family

import pymerge
from pymerge.backends import native, registry
from pymerge.reference.ties import philox
from pymerge.rules.ties import random_key, resolve_options

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Every other backend lacks it.
RUNS = [f"cpu-{level}-2" for level in CPU_LEVELS]
RUNS += [f"cpu-{level}-{threads}" for level in CPU_LEVELS[-1:] for threads in (1, 3)]


@pytest.fixture(params=RUNS)
def fast(request, monkeypatch):
    backend, undo = make_backend(request.param, monkeypatch, request)
    yield backend
    undo()


def check(fast, models, base=None, **options):
    """Against the reference: bits and counts, by the rule for the tensor's shape."""
    shape = models[0].shape
    name = options.pop("name", "")
    resolved = resolve_options(len(models), trim="magprune", **options)
    rule = resolved.rule(shape.numel(), name, shape)
    check_equal(fast, models, base, rule=rule)


def shaped(tensors, shape):
    return [tensor[: math.prod(shape)].reshape(shape) for tensor in tensors]


@pytest.mark.parametrize("distribution", list(DISTRIBUTIONS))
def test_bits(fast, distribution):
    models, base = family(40_000, 3, distribution, DTYPES)
    *models, base = shaped([*models, base], (64, 625))
    options = {"density": [0.3, 0.6, 0.8], "epsilon": [0.1, 0.4, 0.2], "seed": 5, "name": "w"}
    check(fast, models, base, rescale="l1", **options)
    check(fast, models, base, elect="none", merge="sum", rescale="density", **options)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (0,),
        (1,),
        (1000,),
        (7, 1),
        (1, 700),
        (5, 600),
        (3, 40, 11),
        (2, 5, 3, 3),
        (0, 4),
        (4, 0),
    ],
)
@pytest.mark.parametrize("rescale", ["none", "l1", "l2", "linf"])
def test_shapes(fast, shape, rescale):
    models, base = family(max(1, math.prod(shape)), 2, "gaussian", DTYPES)
    *models, base = shaped([*models, base], shape)
    check(fast, models, base, density=[0.5, 0.9], epsilon=0.1, rescale=rescale)
    check(fast, models, None, density=[1.0, 0.0], epsilon=0.5, rescale=rescale)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(300, 300), (90_001,)])
def test_dtypes_and_long_rows(fast, dtype, shape):
    models, base = family(90_001, 2, "few_values", DTYPES)
    *models, base = shaped([*models, base], shape)
    models = [model.to(dtype) for model in models]
    check(fast, models, base, density=0.4, epsilon=0.3, rescale="l1", zero_sign="majority")


@pytest.mark.slow
def test_stretches_of_a_large_tensor():
    """The bits of more elements than fit half of the scratch are drawn a stretch at a time."""
    rows, row = 242_000, 1_000
    x = torch.randn(2_000, row, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.repeat(rows // 2_000, 1)
    options = resolve_options(
        1, trim="magprune", density=0.4, epsilon=0.3, elect="none", merge="sum", rescale="l1"
    )
    rule = options.rule(x.numel(), "w", x.shape)
    where = (x.data_ptr(), "bfloat16")
    factors = native.precomputed([where], None, "bfloat16", x.numel(), rule).factors
    out = pymerge.ties(
        [x], trim="magprune", density=0.4, epsilon=0.3, elect="none", merge="sum", rescale="l1",
        name="w",
    )  # fmt: skip
    before = after = 0.0
    for some, made in zip(x.split(2_000), out.split(2_000), strict=True):
        sizes = some.double().abs()
        before += float(sizes.sum())
        after += float(sizes[made != 0].sum())
    assert factors[0] == torch.tensor(before / after, dtype=torch.float32).item()
    stretch = 234_881_024 // row  # 28 MB of bits
    for first in (0, stretch - 2, rows - 4):
        part = slice(first, first + 4)
        own = rule.with_precomputed(first=first * row, factors=factors)
        assert torch.equal(Backend("reference").run([x[part]], rule=own)[0], out[part])


@pytest.mark.parametrize("non_finite", [math.nan, math.inf])
def test_values_that_are_not_finite(fast, non_finite):
    models, base = family(6_000, 2, "gaussian", DTYPES[:1])
    models[0][[3, 777, 5999]] = non_finite
    *models, base = shaped([*models, base], (60, 100))
    check(fast, models, base, density=0.4, epsilon=0.3, rescale="none")


def test_parts_of_a_tensor_have_its_factors():
    models, base = family(6_000, 2, "gaussian", DTYPES[:1])
    options = resolve_options(2, trim="magprune", density=0.4, rescale="l1")
    rule = options.rule(6_000, "w", (60, 100))
    pointers = [(m.data_ptr(), "float32") for m in models]
    found = native.precomputed(pointers, (base.data_ptr(), "float32"), "float32", 6_000, rule)
    assert all(factor > 1.5 for factor in found.factors)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_options(data):
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 40), min_size=0, max_size=3))
    count = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(list(DISTRIBUTIONS)))
    models, base = family(math.prod(shape), count, kind, DTYPES, draw(st.integers(0, 9)))
    *models, base = shaped([*models, base], shape)
    density = draw(st.floats(0.01, 0.99))
    check(
        Backend(RUNS[0]),
        models,
        draw(st.sampled_from([None, base])),
        density=density,
        epsilon=draw(st.floats(0, min(density, 1 - density) * 0.999)),
        elect=draw(st.sampled_from(["sum", "count", "none"])),
        merge=draw(st.sampled_from(["weighted_mean", "mean", "sum", "max"])),
        rescale=draw(st.sampled_from(["none", "density", "l1", "l2", "linf"])),
        zero_sign=draw(st.sampled_from(["positive", "majority"])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


# What the rule says, on the reference


def kept(x, density, epsilon, **options):
    return pymerge.ties(
        [x], trim="magprune", density=density, epsilon=epsilon, elect="none", merge="sum", **options
    ).ne(0)


def test_larger_magnitudes_are_kept_more_often():
    """The share of a rank is its probability, within six standard deviations."""
    rows, length = 20_000, 11
    x = torch.arange(1.0, length + 1).repeat(rows, 1)
    shares = kept(x, 0.5, 0.3)
    for rank, share in enumerate(shares.double().mean(0).tolist()):
        p = 0.2 + 0.6 * rank / (length - 1)
        assert abs(share - p) < 6 * (p * (1 - p) / rows) ** 0.5


def test_equal_magnitudes_share_their_mean_rank():
    """A row of one magnitude is kept with probability d, as random trim keeps it."""
    x = torch.full((40, 50), 0.25)
    words = philox(2000, 0, random_key(7, ""), x.device).reshape(40, 50)
    assert torch.equal(kept(x, 0.4, 0.2, seed=7), words < int(0.4 * 2**32))
    assert torch.equal(
        kept(x.reshape(2000, 1), 0.4, 0.2, seed=7).reshape(40, 50), words < int(0.4 * 2**32)
    )


def test_without_a_window_it_is_random_trim():
    x = torch.randn(30, 70)
    plain = {"density": 0.3, "elect": "none", "merge": "sum", "seed": 3}
    one = pymerge.ties([x], trim="magprune", epsilon=0, **plain)
    assert torch.equal(one, pymerge.ties([x], trim="random", **plain))


def test_rows_are_along_the_second_index():
    x = torch.randn(4, 6, 5)
    own = kept(x, 0.5, 0.5, seed=1)
    words = philox(120, 0, random_key(1, ""), x.device).reshape(4, 6, 5)
    rank = x.abs().argsort(1).argsort(1)
    assert torch.equal(own, words < (rank.double() / 5 * 2.0**32).long())


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15)])
def test_a_window_that_leaves_the_unit_interval_is_refused(density, epsilon):
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"epsilon\[0\]=0.15 with density\[0\]=.* at most 0.1"):
        pymerge.ties([x], trim="magprune", density=density, epsilon=epsilon)
    pymerge.ties([x], trim="magnitude", density=density, epsilon=epsilon)  # it has no effect there


def test_backends_that_lack_it_say_so(monkeypatch):
    monkeypatch.setattr(registry, "why_not", lambda backend: None)
    monkeypatch.setitem(registry.ORDER, "cpu", ("cuda", "triton", "cpu", "reference"))
    x = torch.ones(3, 4)
    for backend in ("cuda", "triton"):
        message = f"backend '{backend}' has no kernels for trim 'magprune'; 'reference' and 'cpu'"
        with pytest.raises(RuntimeError, match=message):
            pymerge.ties([x], trim="magprune", density=0.5, backend=backend)
    assert pymerge.ties([x], trim="magprune", density=0.5).shape == x.shape  # by the reference
