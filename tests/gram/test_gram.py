"""`gram` and `combine` on every backend (docs/spec/gram.md, G1 to G5)."""

from __future__ import annotations

import math
import os

import pytest
import torch
from gram_cases import backend, draw  # noqa: F401
from ties_cases import same_bits

import pymerge
from pymerge.backends import native
from pymerge.errors import NonFiniteError
from pymerge.reference import gram as reference
from pymerge.rules.gram import matrix_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
PER = ["tensor", "row", "column"]


def wanted(models, base, per):
    """Every product by itself, in float64."""
    shape = matrix_of(tuple(models[0].shape), per)
    wide = any(x.dtype == torch.float64 for x in (*models, *([] if base is None else [base])))
    work = torch.float64 if wide else torch.float32
    deltas = [x.to(work) if base is None else x.to(work) - base.to(work) for x in models]
    rows = [d.double().reshape(shape) for d in deltas]
    groups = [x.T if per == "column" else x for x in rows]
    made = torch.stack([torch.stack([(x * y).sum(1) for y in groups]) for x in groups])
    result = made.permute(2, 0, 1)
    return result[0] if per == "tensor" else result


def close(got, want):
    """G4."""
    assert got.dtype == torch.float64 and got.shape == want.shape
    sizes = want.diagonal(dim1=-2, dim2=-1).sqrt()
    allowed = 2.0**-40 * sizes[..., :, None] * sizes[..., None, :]
    assert ((got - want).abs() <= allowed).all()
    assert torch.equal(got, got.transpose(-1, -2))


SHAPES = [(), (1,), (7,), (5, 3), (17, 33), (2, 3, 4), (3, 5000), (4100, 2), (40_000,), (2, 16385)]


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_every_shape(backend, shape, per):  # noqa: F811
    if backend in ("cuda", "triton") and math.prod(shape) > 5000 and per == "row":
        shape = (min(shape[0], 40), *shape[1:])  # emulated and interpreted a row at a time
    if backend == "triton" and per == "column" and shape:
        shape = (min(shape[0], 1100), *shape[1:])  # interpreted a row at a time
    for count in (1, 2, 3) if backend != "triton" else (3,):
        models, base = draw(shape, count)
        for start in (None, base):
            got = pymerge.gram(models, start, per=per, backend=backend)
            close(got, wanted(models, start, per))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 11])
def test_products_of_any_number_of_models(backend, count):  # noqa: F811
    models, base = draw((9, 50), count, seed=count)
    for per in PER:
        close(pymerge.gram(models, base, per=per, backend=backend), wanted(models, base, per))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_every_dtype(backend, dtype):  # noqa: F811
    models, base = draw((6, 37), 3, dtype)
    mixed = [models[0].float(), models[1].bfloat16(), models[2].to(torch.float16)]
    for per in PER:
        close(pymerge.gram(models, per=per, backend=backend), wanted(models, None, per))
        close(pymerge.gram(mixed, base, per=per, backend=backend), wanted(mixed, base, per))


def test_strided_and_repeated_inputs(backend):  # noqa: F811
    models, base = draw((30, 40), 2)
    turned = [models[0].T, models[0].T, models[1].T[:, :]]
    close(pymerge.gram(turned, base.T, backend=backend), wanted(turned, base.T, "tensor"))
    odd = [x.reshape(-1)[1:1191] for x in models]  # not on a boundary of 16 bytes
    close(pymerge.gram(odd, backend=backend), wanted(odd, None, "tensor"))


def test_empty_tensors(backend):  # noqa: F811
    empty = [torch.empty(0, 5), torch.empty(0, 5)]
    assert torch.equal(pymerge.gram(empty, backend=backend), torch.zeros(2, 2).double())
    assert pymerge.gram(empty, per="row", backend=backend).shape == (0, 2, 2)
    columns = pymerge.gram(empty, per="column", backend=backend)
    assert torch.equal(columns, torch.zeros(5, 2, 2).double())
    assert pymerge.combine(empty, [1, 2], backend=backend).shape == (0, 5)
    made = pymerge.combine(empty, torch.ones(5, 2), per="column", backend=backend)
    assert made.shape == (0, 5)


def coefficients_for(shape, per, count, seed=3):
    rows, columns = matrix_of(tuple(shape), per)
    generator = torch.Generator().manual_seed(seed)
    size = (count,) if per == "tensor" else (columns if per == "column" else rows, count)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (17, 33), (2, 3, 4), (3, 1500), (300, 2)])
def test_combinations_have_the_references_bits(backend, shape, per):  # noqa: F811
    for count, dtype in ((1, torch.float32), (2, torch.bfloat16), (3, torch.float32)):
        models, base = draw(shape, count, dtype)
        factors = coefficients_for(shape, per, count)
        for start in (None, base):
            got = pymerge.combine(models, factors, start, per=per, backend=backend)
            want = torch.full_like(got, math.nan)
            groups = factors.reshape(-1, count)
            matrix = matrix_of(tuple(shape), per)
            reference.combine(models, start, matrix, per == "column", groups, want)
            assert same_bits(got, want)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combinations_of_every_dtype(backend, dtype, out):  # noqa: F811
    models, base = draw((6, 37), 3, dtype)
    models[1] = models[1].bfloat16()
    for per in PER:
        factors = coefficients_for((6, 37), per, 3)
        got = torch.full((6, 37), math.nan, dtype=out)
        pymerge.combine(models, factors, base, per=per, backend=backend, out=got)
        want = torch.full_like(got, math.nan)
        groups, matrix = factors.reshape(-1, 3), matrix_of((6, 37), per)
        reference.combine(models, base, matrix, per == "column", groups, want)
        assert same_bits(got, want)


def test_rows_and_columns_say_what_they_are(backend):  # noqa: F811
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    y = torch.ones(3, 2)
    rows = pymerge.gram([x, y], per="row", backend=backend)
    assert rows.tolist() == [[[5, 3], [3, 2]], [[25, 7], [7, 2]], [[61, 11], [11, 2]]]
    columns = pymerge.gram([x, y], per="column", backend=backend)
    assert columns.tolist() == [[[35, 9], [9, 3]], [[56, 12], [12, 3]]]
    factors = torch.tensor([[1.0, 0], [0, 1], [2, 10]])
    made = pymerge.combine([x, y], factors, per="row", backend=backend)
    assert made.tolist() == [[1, 2], [1, 1], [20, 22]]
    made = pymerge.combine([x, y], factors[1:], y, per="column", backend=backend)
    assert made.tolist() == [[1, 3], [1, 7], [1, 11]]


def test_nan_and_infinity(backend):  # noqa: F811
    models, base = draw((4, 6), 2)
    models[1][2, 3] = math.nan
    base[0, 0] = math.inf
    factors = torch.ones(4, 2)
    for call in (
        lambda **more: pymerge.gram(models, base, backend=backend, **more),
        lambda **more: pymerge.combine(models, factors, base, per="row", backend=backend, **more),
    ):
        with pytest.raises(NonFiniteError, match=r"models\[0\]: 1, models\[1\]: 2, of 24"):
            call()
        assert not call(non_finite="allow").isfinite().all()
    rows = pymerge.gram(models, per="row", non_finite="allow", backend=backend)
    assert rows[[0, 1, 3]].isfinite().all() and rows[2, 1].isnan().all() and rows[2, 0, 0] > 0
    made = pymerge.combine(models, factors, None, per="row", non_finite="allow", backend=backend)
    assert made.isnan().sum() == 1
    assert same_bits(made[2, 3], torch.tensor(math.nan))
    half = [torch.full((2, 2), 6e4, dtype=torch.float16)] * 2
    with pytest.raises(NonFiniteError, match="4 values of the result overflow float16"):
        pymerge.combine(half, torch.ones(2, 2), per="row", backend=backend)


def test_what_does_not_fit_is_told():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="per='rows' is not one of 'tensor', 'row', 'column'"):
        pymerge.gram([x], per="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"coefficients has shape \(2,\); with per='row' it needs"):
        pymerge.combine([x, x], [1, 2], per="row")
    with pytest.raises(ValueError, match=r"coefficients has shape \(3,\); with per='tensor'"):
        pymerge.combine([x, x], [1, 2, 3])
    with pytest.raises(ValueError, match="coefficients has NaN or infinity"):
        pymerge.combine([x, x], [1, math.nan])
    with pytest.raises(ValueError, match="coefficients has a number beyond float64; pass finite"):
        pymerge.combine([x, x], [1, 10**400])
    with pytest.raises(TypeError, match="coefficients is a list; pass one number per model"):
        pymerge.combine([x, x], [1, torch.ones(2)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="coefficients is a str; pass one number per model"):
        pymerge.combine([x, x], "ab")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int64"):
        pymerge.gram([x.long()])
    with pytest.raises(ValueError, match="shape"):
        pymerge.gram([x, x.T])
    with pytest.raises(ValueError, match="models is empty"):
        pymerge.gram([])


# On the CPU


@pytest.mark.skipif(INTERPRETED, reason="the compiled kernels are not Triton's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bits_depend_neither_on_threads_nor_on_the_level(monkeypatch, dtype):
    """G2, G3: also the order of additions."""
    models, base = draw((9, 70_001), 3, dtype, spread=0.01)
    found = {}
    for level in [name for name, usable in native.cpu_levels().items() if usable]:
        monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                for per in PER:
                    made = pymerge.gram(models, base, per=per, backend="cpu")
                    assert same_bits(made, found.setdefault(per, made)), (level, threads, per)
                    factors = coefficients_for((9, 70_001), per, 3)
                    out = pymerge.combine(models, factors, base, per=per, backend="cpu")
                    assert same_bits(out, found.setdefault(f"{per} out", out)), (level, per)
            finally:
                torch.set_num_threads(1)


@pytest.mark.skipif(INTERPRETED, reason="the compiled kernels are not Triton's")
def test_the_order_of_additions_is_the_specs():
    """G2 word for word, in Python, on numbers whose sums round."""
    n = 3 * 16384 + 777
    models, _ = draw((n,), 2)
    x, y = (m.double().tolist() for m in models)
    total = 0.0
    for begin in range(0, n, 16384):
        lanes = [0.0] * 16
        for place, e in enumerate(range(begin, min(n, begin + 16384))):
            lanes[place % 16] += x[e] * y[e]
        for width in (8, 4, 2, 1):
            for j in range(width):
                lanes[j] += lanes[j + width]
        total += lanes[0]
    assert pymerge.gram(models, backend="cpu")[0, 1].item() == total
