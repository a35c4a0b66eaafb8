"""slerp, nuslerp, multislerp, karcher and model_stock in Python: against the methods as their
authors write them, and what is mended (docs/spec/gram.md, G6 to G10).
"""

from __future__ import annotations

import math
import warnings

import geometric_oracle as oracle
import pytest
import torch
from gram_cases import backend, draw  # noqa: F401

import pymerge
from pymerge.errors import NonFiniteError

SHAPES = [(7,), (5, 3), (17, 33), (2, 3, 4)]


def close(got, want, allowed=1e-6):
    assert got.shape == want.shape and got.isfinite().all()
    off = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert off <= allowed, float(off)


CASES = {
    "slerp": (2, [{"t": t} for t in (0, 0.35, 1, -0.5)]),
    "nuslerp": (2, [{"weights": [0.6, 0.4]}, {"weights": [1, 3]}, {"weights": [1, -1]}]),
    "multislerp": (3, [{"weights": [0.5, 0.3, 0.7]}, {"weights": [1, 1, 1]}]),
    "karcher": (3, [{}, {"max_iter": 0}, {"max_iter": 2, "tol": 1e-3}]),
    "model_stock": (3, [{}, {"filter_wise": True}]),
}
WITHOUT_BASE = ("slerp", "nuslerp", "multislerp", "karcher")
WITH_BASE = ("nuslerp", "multislerp", "model_stock")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", CASES)
def test_methods_are_those_of_their_authors(backend, method, shape):  # noqa: F811
    count, cases = CASES[method]
    models, base = draw(shape, count, spread=0.3)
    for parameters in cases:
        for start in (None, base):
            if method not in (WITHOUT_BASE if start is None else WITH_BASE):
                continue
            arguments = (models,) if start is None else (models, start)
            got = getattr(pymerge, method)(*arguments, backend=backend, **parameters)
            close(got, getattr(oracle, method)(models, start, **parameters))


@pytest.mark.parametrize("per", ["row", "column"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nuslerp_by_rows_and_columns(backend, shape, per):  # noqa: F811
    models, base = draw(shape, 2, spread=0.3)
    options = {"nuslerp_flatten": False, "nuslerp_row_wise": per == "column"}
    for start in (None, base):
        got = pymerge.nuslerp(models, start, weights=[0.7, 0.3], backend=backend, **options)
        close(got, oracle.nuslerp(models, start, [0.7, 0.3], per))


@pytest.mark.parametrize("count", [2, 5, 9])
def test_any_number_of_models(count):
    models, base = draw((40, 30), count, seed=count, spread=0.5)
    weights = [1 + k / 3 for k in range(count)]
    close(
        pymerge.multislerp(models, base, weights=weights), oracle.multislerp(models, base, weights)
    )
    close(pymerge.karcher(models), oracle.karcher(models, None))
    close(pymerge.model_stock(models, base), oracle.model_stock(models, base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    models, base = draw((30, 20), 3, dtype, spread=0.3)
    for method, (count, cases) in CASES.items():
        start = None if method in WITHOUT_BASE else base
        got = getattr(pymerge, method)(
            *((models[:count],) if start is None else (models[:count], start)), **cases[0]
        )
        assert got.dtype == dtype
        allowed = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}[dtype]
        close(got, getattr(oracle, method)(models[:count], start, **cases[0]), allowed)


def test_colinear_opposite_and_zero_inputs():
    """What divides by zero, by sin(pi) or by the length of nothing elsewhere."""
    x = draw((20, 30), 1)[0][0]
    zero = torch.zeros_like(x)
    for a, b in ((x, x), (x, 2 * x), (x, -x), (x, -0.3 * x), (zero, x), (x, zero), (zero, zero)):
        for t in (0.0, 0.25, 1.0):
            want = (1 - t) * a.double() + t * b.double()
            close(pymerge.slerp([a, b], t=t), want)
            made = pymerge.nuslerp([a, b], weights=[1 - t, t])
            close(made, want)
            close(pymerge.nuslerp([x + a, x + b], x, weights=[1 - t, t]), x + want, 1e-5)
    close(pymerge.karcher([x, x, x]), x)
    close(pymerge.karcher([x, 3 * x]), 2 * x)
    close(pymerge.karcher([x, -x]), x)  # opposite: no mean is better than another
    close(pymerge.karcher([x, zero]), x / 2)
    assert torch.equal(pymerge.karcher([zero, zero]), zero)
    close(pymerge.multislerp([x, x, x]), x)
    for few in ([zero, zero], [zero, zero, zero], [x, -x], [x, -x, zero]):
        want = sum(each.double() for each in few) / len(few)
        close(pymerge.multislerp(few), want)
    base = draw((20, 30), 1, seed=5)[0][0]
    close(pymerge.multislerp([base, base, base], base), base)  # a tensor that nobody trained
    assert torch.equal(pymerge.model_stock([base, base], base), base)
    close(pymerge.model_stock([base + x, base + x], base), base + x)
    assert torch.equal(pymerge.model_stock([base + x, base - x], base), base)
    close(pymerge.model_stock([base + x, base], base), base)


def test_one_row_of_zeros_among_others():
    models, base = draw((6, 9), 2, spread=0.3)
    models[0][2] = base[2]
    options = {"nuslerp_flatten": False, "weights": [0.6, 0.4]}
    close(pymerge.nuslerp(models, base, **options), oracle.nuslerp(models, base, [0.6, 0.4], "row"))
    models[1][2] = base[2]
    made = pymerge.model_stock(models, base, filter_wise=True)
    assert torch.equal(made[2], base[2])
    close(made, oracle.model_stock(models, base, filter_wise=True))


def test_mergekits_numbers_by_name():
    """Where it decides otherwise, `flavor="mergekit"` follows it, with a warning that says so."""
    x = draw((20, 30), 1)[0][0]
    zero = torch.zeros_like(x)
    with pytest.warns(UserWarning, match="between zero and another tensor, slerp scales by sin"):
        made = pymerge.slerp([zero, x], t=0.5, flavor="mergekit")
    close(made, math.sin(math.pi / 4) * x)
    with pytest.warns(UserWarning, match="nuslerp has mergekit's numbers"):
        made = pymerge.nuslerp([x, zero], flavor="mergekit")
    close(made, math.sin(math.pi / 4) * x)
    base = draw((20, 30), 1, seed=5)[0][0]
    small = [base + 1e-5 * d for d in draw((20, 30), 3, seed=6, spread=0.2)[0]]
    with pytest.warns(UserWarning, match="model_stock has mergekit's ratio t"):
        kept = pymerge.model_stock(small, base, flavor="mergekit")
    moved = pymerge.model_stock(small, base)
    close(moved, oracle.model_stock(small, base))
    assert (kept - base).norm() < 0.2 * (moved - base).norm()
    a, b = (d - x.mean() for d in draw((20, 30), 2, seed=8)[0])
    opposing = [base + a, base - a + 0.9 * b, base - 0.5 * b]
    with pytest.warns(UserWarning, match="t in .0, 1."):
        beyond = pymerge.model_stock(opposing, base, flavor="mergekit")
    assert not torch.equal(beyond, base)
    assert torch.equal(pymerge.model_stock(opposing, base), base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pymerge.slerp([x, base], t=0.5, flavor="mergekit")


def test_state_dicts_and_their_base():
    a = {"w": torch.ones(2, 3), "n": torch.arange(3)}
    b = {"w": torch.eye(2, 3), "n": torch.arange(3)}
    made = pymerge.slerp([a, b], t=0.25)
    assert torch.equal(made["n"], a["n"])
    close(made["w"], oracle.slerp([a["w"], b["w"]], None, 0.25))
    assert torch.equal(pymerge.slerp([b], a, t=0.25)["w"], made["w"])  # the base is the first
    assert torch.equal(pymerge.slerp([b["w"]], a["w"], t=0.25), made["w"])
    out = {"w": torch.empty(2, 3), "n": torch.empty(3, dtype=torch.int64)}
    assert pymerge.slerp([a, b], t=0.25, out=out)["w"] is out["w"]
    assert torch.equal(out["w"], made["w"])


def test_what_does_not_fit_is_told():
    x = torch.ones(3)
    for call, kind, message in (
        (lambda: pymerge.slerp([x], t=0.5), ValueError, "models has 1 entries; slerp takes 2 mod"),
        (
            lambda: pymerge.slerp([x, x], x, t=0.5),
            ValueError,
            "models has 2 entries beside base; slerp takes 2 models",
        ),
        (lambda: pymerge.slerp([x, x], t="a"), TypeError, "t: 'a' is not a number"),
        (lambda: pymerge.slerp([x, x], t=math.inf), ValueError, "t: inf is not finite"),
        (lambda: pymerge.nuslerp([x, x, x]), ValueError, "nuslerp takes 2 models"),
        (lambda: pymerge.nuslerp([x, x], weights=[1]), ValueError, "weights has 1 value for 2"),
        (
            lambda: pymerge.multislerp([x, x], weights=[1, -1]),
            ValueError,
            "the weights of multislerp sum to 0",
        ),
        (lambda: pymerge.karcher([x, x], max_iter=1.5), ValueError, "max_iter: 1.5 is not a whole"),
        (lambda: pymerge.karcher([x, x], tol=-1), ValueError, r"tol: -1 is outside \[0, inf"),
        (lambda: pymerge.model_stock([x], x), ValueError, "model_stock takes 2 models or more"),
        (lambda: pymerge.model_stock([x, x], None), ValueError, "base is missing"),
        (
            lambda: pymerge.slerp([x, x], t=0, flavor="papers"),
            ValueError,
            "flavor: 'papers' is not one of mergekit, paper",
        ),
        (
            lambda: pymerge.merge([{"x": x}] * 2, method="slerp", t=0.5, density=0.2),
            TypeError,
            "slerp has no parameter 'density'; it has t, flavor, non_finite, backend, out, seed",
        ),
        (lambda: pymerge.merge([{"x": x}] * 2, method="slerp"), TypeError, "needs parameter 't'"),
        (
            lambda: pymerge.merge([{"x": x}] * 2, {"x": x}, method="karcher"),
            ValueError,
            "karcher takes no base",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_nan_is_refused_or_spreads():
    models, base = draw((4, 6), 2)
    models[1][2, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"models\[1\]: 1, of 24"):
        pymerge.slerp(models, t=0.5)
    assert pymerge.slerp(models, t=0.5, non_finite="allow").isnan().all()
    made = pymerge.model_stock(models, base, filter_wise=True, non_finite="allow")
    assert made.isnan().any(dim=1).tolist() == [False, False, True, False]
    for method in ("nuslerp", "multislerp", "karcher"):
        assert getattr(pymerge, method)(models, non_finite="allow").isnan().all()
