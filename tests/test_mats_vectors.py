"""The vector updates of `mats` on every backend against plain torch (docs/spec/mats.md, M6)."""

from __future__ import annotations

import pytest
import torch
from mats_cases import case, relative

from pymerge import _dispatch
from pymerge.ops._cg import Vectors, vectors_for
from pymerge.ops.mats import MatsLayer, mats_many

BACKENDS = ["reference", "cpu", "triton"]


@pytest.fixture(params=BACKENDS)
def vectors(request: pytest.FixtureRequest) -> type[Vectors]:
    reason = _dispatch.why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    if not _dispatch.serves(request.param, "cpu"):
        pytest.skip(f"{request.param} takes no tensors on the CPU; TRITON_INTERPRET=1 lets it")
    return vectors_for("cpu", request.param)


SHAPES = [(1, 1, 1), (1, 3, 5), (3, 7, 11), (2, 130, 127), (1, 300, 257)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.double() * y.double()).flatten(1).sum(1)


def close(got: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Of a sum of n products: within n roundings of the sum of their magnitudes, taken in fp32 at worst."""
    allowed = (x.double() * y.double()).abs().flatten(1).sum(1) * 2.0**-20
    return bool(((got - product(x, y)).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_updates(vectors: type[Vectors], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    step, r, p, q = draw(shape, dtype, 4)
    assert vectors.dot(p, q).dtype == torch.float64
    assert close(vectors.dot(p, q), p, q)

    factor = torch.linspace(-0.7, 1.3, shape[0], dtype=torch.float64)
    scale = factor.to(dtype)[:, None, None]
    want_step, want_r = step + scale * p, r - scale * q
    rr, dd = vectors.advance(step, r, p, q, factor)
    eps = 4 * torch.finfo(dtype).eps
    assert torch.allclose(step, want_step, rtol=eps, atol=eps)
    assert torch.allclose(r, want_r, rtol=eps, atol=eps)
    assert close(rr, r, r) and close(dd, step, step)

    want_p = q + scale * p
    pp, dp = vectors.turn(p, q, factor, step)
    assert torch.allclose(p, want_p, rtol=eps, atol=eps)
    assert close(pp, p, p) and close(dp, step, p)


def test_stopped_layers_are_left_alone_whatever_is_in_the_others(vectors: type[Vectors]) -> None:
    step, r, p, q = draw((3, 40, 50), torch.float32, 4)
    before = [x.clone() for x in (step, r)]
    p[1], q[1] = torch.nan, torch.inf
    factor = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    rr, dd = vectors.advance(step, r, p, q, factor)
    assert torch.equal(step[1:], before[0][1:]) and torch.equal(r[1:], before[1][1:])
    assert not torch.equal(step[0], before[0][0])
    assert bool(rr.isfinite().all() and dd.isfinite().all())
    vectors.turn(p, r, factor, step)
    assert torch.equal(p[1:], r[1:])


def test_the_direction_may_be_the_residual(vectors: type[Vectors]) -> None:
    """Without a preconditioner z is r."""
    step, r, p = draw((2, 9, 8), torch.float32, 3)
    want = r + 0.25 * p
    vectors.turn(p, r, torch.tensor([0.25, 0.25], dtype=torch.float64), step)
    assert torch.allclose(p, want)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_levels_and_threads_give_the_same_bits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("pymerge._native")
    if native.why_not() or not native.cpu_levels().get(level):
        pytest.skip(f"this processor has no {level}")
    x, y, p, q = draw((2, 600, 301), torch.float32, 4)
    alpha = torch.tensor([0.3, -2.0], dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        step, r, turned = x.clone(), y.clone(), p.clone()
        vectors = vectors_for("cpu", "cpu")
        sums = [vectors.dot(x, y), *vectors.advance(step, r, p, q, alpha)]
        return [*sums, *vectors.turn(turned, r, alpha, step), step, r, turned]

    want = run()
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_whole_solve(vectors: type[Vectors]) -> None:
    name = next(b for b in BACKENDS if vectors_for("cpu", b) is vectors)
    cases = [case(3, 14, 10, seed=i, dtype=torch.float32) for i in range(3)]
    layers = [MatsLayer(c.weights, c.a, c.b) for c in cases]
    layers.append(
        MatsLayer(cases[0].weights, cases[0].a[:1] * 3, cases[0].b[:1] * 3)
    )  # stops at once
    for options in ({}, {"flavor": "paper", "iterations": 6}, {"step_limit": 0.3}):
        plain = mats_many(layers, backend="reference", **options)
        for got, want in zip(mats_many(layers, backend=name, **options), plain, strict=True):
            assert relative(got.weight, want.weight) < 2e-5
            assert got.report.status == want.report.status


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend='cpuu'"):
        vectors_for("cpu", "cpuu")
