"""`masked` (docs/spec/masked.md): the compiled loops against the reference, bit for bit, and the
reference against the rules.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ties_backends import CPU_LEVELS
from ties_cases import DISTRIBUTIONS, DTYPES, family, same_bits

from pymerge.backends import registry
from pymerge.reference import masked as reference
from pymerge.rules.masked import METHODS, PAIRS, resolve_masked

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RUNS = [(level, 2) for level in CPU_LEVELS] + [(CPU_LEVELS[-1], threads) for threads in (1, 3)]


def run(backend, models, base, method, *, out_dtype=None, **options):
    """(out, stats) by a backend's own function; the output is NaN-filled before the call."""
    resolved = resolve_masked(method, len(models), non_finite="allow", **options)
    out = torch.full(base.shape, math.nan, dtype=out_dtype or base.dtype)
    stats = registry.load("masked", backend)(models, base, resolved, out)
    return out, stats


def check_equal(monkeypatch, models, base, method, **options):
    want, wanted = run("reference", models, base, method, **options)
    before = torch.get_num_threads()
    try:
        for level, threads in RUNS:
            monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
            torch.set_num_threads(threads)
            got, stats = run("cpu", models, base, method, **options)
            assert same_bits(got, want), (
                level,
                threads,
                f"{int((got != want).sum())} of {got.numel()} elements differ",
            )
            assert stats == wanted
    finally:
        torch.set_num_threads(before)
    return want, wanted


def shaped(tensors, shape):
    return [tensor[: math.prod(shape)].reshape(shape) for tensor in tensors]


OPTIONS = [
    ("nearswap", {"t": 0.01}),
    ("nearswap", {"t": 0.0}),
    ("nearswap", {"t": -1.0}),
    ("ram", {"epsilon": 0.01}),
    ("ram", {"epsilon": 0.0}),
    ("ramplus_tl", {"epsilon": 0.01, "r": 0.3, "alpha": 0.7}),
    ("ramplus_tl", {"epsilon": 0.0}),
    ("sce", {"flavor": "mergekit"}),
    ("sce", {"flavor": "paper"}),
    ("sce", {"flavor": "paper", "select_topk": 0.3}),
    ("sce", {"flavor": "mergekit", "select_topk": 0.9}),
    ("sce", {"select_topk": 0.0}),
    ("arcee_fusion", {"flavor": "mergekit"}),
    ("arcee_fusion", {"flavor": "paper"}),
]


def beside(quick, everything):
    """(method, options, value): of everything, what is not quick is slow where the options are not
    the first ones of their method.
    """
    firsts = dict(reversed(OPTIONS))
    for (method, options), value in itertools.product(OPTIONS, everything):
        needed = options is firsts[method] or value in quick
        yield pytest.param(method, options, value, marks=() if needed else pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "options", "distribution"),
    beside(["gaussian", "few_values"], list(DISTRIBUTIONS)),
)
def test_bits(method, options, distribution, monkeypatch):
    count = 1 if method in PAIRS else 3
    models, base = family(60_000, count, distribution, DTYPES[:1])
    check_equal(monkeypatch, shaped(models, (250, 240)), base.reshape(250, 240), method, **options)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 1), (1, 5), (7, 13, 2), (0, 4)])
@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_shapes(method, options, shape, monkeypatch):
    count = 1 if method in PAIRS else 2
    models, base = family(max(1, math.prod(shape)), count, "gaussian", DTYPES)
    *models, base = shaped([*models, base], shape)
    got, _ = check_equal(monkeypatch, models, base, method, **options)
    assert not got.isnan().any()


@pytest.mark.parametrize("count", [1, 2, 9, 33])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in PAIRS])
def test_numbers_of_models(method, count, monkeypatch):
    models, base = family(20_001, count, "few_values", DTYPES)
    options = {"select_topk": 0.4} if method == "sce" else {"epsilon": 0.1}
    check_equal(monkeypatch, models, base, method, **options)


ALL_DTYPES = [*DTYPES, torch.float64]


@pytest.mark.parametrize(
    ("method", "options", "dtypes"),
    beside([(x, x) for x in ALL_DTYPES], list(itertools.product(ALL_DTYPES, repeat=2))),
)
def test_dtypes(method, options, dtypes, monkeypatch):
    dtype, out_dtype = dtypes
    count = 1 if method in PAIRS else 3
    models, base = family(3_000, count, "heavy_tailed", [dtype])
    *models, base = shaped([*models, base.to(dtype)], (30, 100))
    check_equal(monkeypatch, models, base, method, out_dtype=out_dtype, **options)


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_large(method, options, monkeypatch):
    """Thresholds from a sample and one counting pass; several tasks a thread."""
    count = 1 if method in PAIRS else 3
    models, base = family(400_000, count, "blocks", DTYPES)
    *models, base = shaped([*models, base], (1000, 400))
    check_equal(monkeypatch, models, base, method, **options)


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_void_elements(method, options, monkeypatch):
    """P1: they are NaN, are counted, and change no other element's masks."""
    count = 1 if method in PAIRS else 3
    models, base = family(6_000, count, "gaussian", DTYPES[:1])
    models[0][[5, 700, 701]] = torch.tensor([math.nan, math.inf, -math.inf])
    models[-1][[5, 4000]] = math.inf
    *models, base = shaped([*models, base], (60, 100))
    got, stats = check_equal(monkeypatch, models, base, method, **options)
    void = [5, 700, 701, 4000]
    assert got.flatten().isnan().nonzero().flatten().tolist() == void
    assert sum(stats.non_finite) == (4 if count == 1 else 5)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_options(data, monkeypatch):
    draw = data.draw
    method = draw(st.sampled_from(METHODS))
    count = 1 if method in PAIRS else draw(st.integers(1, 9))
    rows, row = draw(st.integers(0, 40)), draw(st.integers(1, 70))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    models, base = family(
        rows * row,
        count,
        draw(st.sampled_from(list(DISTRIBUTIONS))),
        dtypes,
        draw(st.integers(0, 9)),
    )
    *models, base = shaped([*models, base], (rows, row))
    small = st.floats(0, 0.1)
    options = {
        "flavor": draw(st.sampled_from(["mergekit", "paper"])),
        "t": draw(st.floats(-1, 1)),
        "epsilon": draw(small),
        "r": draw(st.floats(-2, 2)),
        "alpha": draw(st.floats(0, 3)),
        "select_topk": draw(st.floats(0, 1)),
    }
    check_equal(monkeypatch, models, base, method, **options)


# What the rules say, on the reference (to which everything else is equal)


def small(count, seed=0, size=(20, 30), scale=0.01):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=g)
    return [base + scale * torch.randn(size, generator=g) for _ in range(count)], base


def test_nearswap_ends():
    """P4: within t the model's elements as they are, 0 and less the base's."""
    models, base = small(1)
    assert torch.equal(run("reference", models, base, "nearswap", t=1.0)[0], models[0])
    for t in (0.0, -3.0):
        assert torch.equal(run("reference", models, base, "nearswap", t=t)[0], base)
    out, stats = run("reference", models, base, "nearswap", t=0.005)
    near = (models[0] - base).abs() <= 0.005
    assert torch.equal(out[near], models[0][near])
    torch.testing.assert_close(
        (out - base)[~near].abs(), torch.full_like(base, 0.005)[~near], atol=3e-7, rtol=0
    )
    assert stats.kept == (base.numel(),)


def test_ram_averages_overlaps():
    """P5: one contributor in full, several by their mean."""
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 2.0, 0.0, 1e-6]), torch.tensor([0.0, 4.0, 3.0, 0.0])]
    out, stats = run("reference", models, base, "ram")
    assert out.tolist() == [1.0, 3.0, 3.0, 0.0]
    assert stats.kept == (2, 2)


def test_ramplus_reinforces_what_is_alone():
    """P5: lambda_k = 1 + r min(shared / alone, alpha)."""
    base = torch.zeros(6)
    models = [torch.tensor([1.0, 2, 2, 0, 0, 0]), torch.tensor([0.0, 4, 4, 1, 1, 1])]
    out, _ = run("reference", models, base, "ramplus_tl", r=0.5, alpha=1.0)
    first, second = 1 + 0.5 * min(2 / 1, 1.0), 1 + 0.5 * min(2 / 3, 1.0)
    assert out.tolist() == pytest.approx([first, 3, 3, second, second, second], rel=1e-7)


def test_ramplus_of_a_model_that_is_alone_nowhere():
    """P5: lambda_k is 1, where epsilon 0 would divide 0 by 0."""
    models, base = small(1)
    models = [models[0], models[0].clone()]
    out, _ = run("reference", models, base, "ramplus_tl", epsilon=0.0)
    torch.testing.assert_close(out, models[0])


def test_sce_selects_by_variance():
    """P6: the share is one of the elements where the models differ."""
    base = torch.zeros(8)
    models = [torch.tensor([1.0, 1, 1, 1, 2, 3, 4, 5]), torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1])]
    out, stats = run("reference", models, base, "sce", select_topk=0.5, flavor="paper")
    assert out.nonzero().flatten().tolist() == [6, 7]
    energies = (16 + 25, 2)
    weights = [energy / sum(energies) for energy in energies]
    assert out[6].item() == pytest.approx(weights[0] * 4 + weights[1], rel=1e-6)
    assert stats.kept == (2, 2)


@pytest.mark.parametrize("flavor", ["mergekit", "paper"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_sce_of_equal_models(flavor, count):
    """P2: equal task vectors have variance 0 exactly, so that no part of them is selected."""
    models, base = small(1)
    out, stats = run("reference", models * count, base, "sce", select_topk=0.999, flavor=flavor)
    assert torch.equal(out, base)
    assert sum(stats.kept) == 0


def test_sce_weighs_small_differences_in_flavor_paper_alone():
    """P6: mean squares below 1e-6."""
    base = torch.zeros(100)
    models = [torch.full((100,), 3e-4), torch.full((100,), 1e-4)]
    even, _ = run("reference", models, base, "sce", flavor="mergekit")
    weighed, _ = run("reference", models, base, "sce", flavor="paper")
    torch.testing.assert_close(even, torch.full((100,), 2e-4))
    torch.testing.assert_close(weighed, torch.full((100,), 0.9 * 3e-4 + 0.1 * 1e-4))


def test_scale_does_not_matter_to_sce_in_flavor_paper():
    models, base = small(3)
    tiny = [(m - base) * 2.0**-60 for m in models]
    large = [m - base for m in models]
    zero = torch.zeros_like(base)
    for topk in (0.3, 1.0):
        one, _ = run("reference", large, zero, "sce", select_topk=topk, flavor="paper")
        other, _ = run("reference", tiny, zero, "sce", select_topk=topk, flavor="paper")
        torch.testing.assert_close(other * 2.0**60, one, atol=0, rtol=1e-6)


def test_arcee_threshold_is_of_the_quartiles():
    """P7, with the keys by numpy in float64."""
    np = pytest.importorskip("numpy")
    models, base = small(1, size=(40, 25))
    out, stats = run("reference", models, base, "arcee_fusion", flavor="paper")
    x, b = models[0].double().numpy(), base.double().numpy()
    p, q = (np.exp(y) / np.exp(y).sum(-1, keepdims=True) + 1e-8 for y in (x, b))
    importance = np.abs(x - b) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    low, middle, high = (ordered[j * 999 // 4] for j in (1, 2, 3))
    kept = importance >= middle + 1.5 * (high - low)
    assert np.array_equal((out != base).numpy(), kept)
    assert stats.kept == (int(kept.sum()),)


def test_arcee_with_negative_divergences(monkeypatch):
    """P7: noise makes divergences negative where models hardly differ; quartiles may be too."""
    models, base = small(1, size=(64, 48), scale=1e-6)
    found = reference.divergences(models[0].flatten(), base.flatten(), 48, torch.float32, False)
    assert (found < 0).sum() > 16
    _, stats = check_equal(monkeypatch, models, base, "arcee_fusion", flavor="mergekit")
    assert 0 < stats.kept[0] < base.numel()


def test_arcee_of_equal_models():
    _, base = small(1)
    out, _ = run("reference", [base.clone()], base, "arcee_fusion")
    assert torch.equal(out, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_divergences_of_blocks_of_rows(dtype, exact):
    """P2: computed a few rows at a time, as if at once."""
    models, base = small(1, size=(70, 3000), scale=0.1)
    x, b = models[0].to(dtype).double(), base.to(dtype).double()
    p, q = torch.softmax(x, -1) + 1e-8, torch.softmax(b, -1) + 1e-8
    want = (p * (p / q).log()).sum(-1)
    got = reference.divergences(
        models[0].to(dtype).flatten(), base.to(dtype).flatten(), 3000, dtype, exact
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-6 if exact else 1e-3, atol=0)


# Errors


@pytest.mark.parametrize(
    ("method", "count", "options", "message"),
    [
        ("sce", 2, {"select_topk": 30}, "select_topk=30 is outside [0, 1]; for 30% pass 0.3"),
        ("ram", 2, {"epsilon": -1e-3}, "epsilon=-0.001 is outside [0, infinity)"),
        ("ramplus_tl", 2, {"alpha": -1}, "alpha=-1 is outside [0, infinity)"),
        ("nearswap", 2, {}, "models has 2 models, and nearswap merges one model into its base"),
        ("sce", 2, {"flavor": "mergkit"}, "did you mean 'mergekit'?"),
        ("sce", 0, {}, "models is empty"),
        ("ram", 2, {"r": math.nan}, "r=nan is not finite"),
    ],
)
def test_refused(method, count, options, message):
    with pytest.raises(ValueError) as error:
        resolve_masked(method, count, **options)
    assert message in str(error.value)


def test_even_weights_are_told():
    """P6 in flavor mergekit, where another flavor has other numbers."""
    models, base = small(2, scale=1e-4)
    told, silent = "weighs the models alike", ""
    for flavor, scale, words in (
        ("mergekit", 1, told),
        ("paper", 1, silent),
        ("mergekit", 100, silent),
    ):
        moved = [base + scale * (m - base) for m in models]
        _, stats = run("reference", moved, base, "sce", flavor=flavor)
        assert words in stats.remark and bool(words) == bool(stats.remark)
