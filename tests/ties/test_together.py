"""Merges that share one read of their inputs are, bit for bit, the merges one by one."""

from __future__ import annotations

import pytest
import torch

from pymerge.backends import native
from pymerge.errors import NonFiniteError
from pymerge.ops.ties.api import merge_many
from pymerge.ops.ties.together import Together
from pymerge.rules.ties import resolve_options

SHAPES = {"a": (37, 41), "b": (5,), "c": (60, 500), "d": (), "e": (0, 3)}
OPTIONS = [
    {"density": 0.1},
    {"density": 0.1, "scaling": 0.5},
    {"density": [0.5, 0.0, 1.0]},
    {"density": 0.3, "weights": [1.0, -0.5, 2.0], "elect": "count"},
    {"density": 0.3, "merge": "max"},
    {"density": 0.4, "merge": "sum", "rescale": "l1"},
    {"density": 0.4, "rescale": "l2", "scaling": -1.5},
    {"density": 0.4, "rescale": "density", "flavor": "peft"},
    {"density": 0.2, "flavor": "paper"},
    {"density": 0.7, "flavor": "paper", "scaling": 0.3},
    {"density": 0.2, "flavor": "paper", "scope": "tensor"},
    {"density": 0.9, "scope": "model", "rescale": "linf"},
    {"density": 0.9, "rescale": "linf"},
    {"trim": "outliers", "density": 0.6, "gamma": 0.1},
    {"trim": "outliers", "density": 0.6, "gamma": 0.1, "scope": "model", "elect": "none"},
    {"trim": "outliers", "density": 0.3, "gamma": 0.05, "rescale": "l1", "zero_sign": "majority"},
    {"trim": "random", "density": 0.3, "rescale": "l1", "seed": 3},
    {"trim": "random", "density": 0.3, "rescale": "l1", "seed": 4},
    {"trim": "random", "density": 0.3, "elect": "none", "merge": "sum", "rescale": "density"},
    {"trim": "none", "elect": "none"},
    {"trim": "none", "elect": "none", "merge": "sum", "weights": [0.3, 0.3, 0.3]},
    {"trim": "none", "zero_sign": "majority", "merge": "mean"},
    {"trim": "magprune", "density": 0.5, "epsilon": 0.2},
]


def inputs(dtype: torch.dtype, *, equal: bool = False, seed: int = 0):
    """Three models and a base of each shape. equal: magnitudes of which many are equal."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape):
        if equal:
            return torch.randint(-3, 4, shape, generator=generator) * 0.125
        return torch.randn(shape, generator=generator) * 0.02

    for name, shape in SHAPES.items():
        base = drawn(shape)
        yield name, [(base + drawn(shape)).to(dtype) for _ in range(3)], base.to(dtype)


def calls_of(tensors, out_dtype=None):
    return [
        (
            name,
            models,
            base,
            torch.full(models[0].shape, torch.nan, dtype=out_dtype or models[0].dtype),
        )
        for name, models, base in tensors
    ]


def bits(calls):
    return [
        call[3].contiguous().view(torch.uint8 if call[3].dim() else call[3].dtype) for call in calls
    ]


def assert_same(settings, tensors, out_dtype=None):
    groups = [(options, calls_of(tensors, out_dtype)) for options in settings]
    Together(settings).merge(groups, stacklevel=1)
    for options, calls in groups:
        alone = calls_of(tensors, out_dtype)
        merge_many(alone, options, "auto", stacklevel=1)
        for (name, *_), one, other in zip(calls, bits(calls), bits(alone), strict=True):
            assert torch.equal(one, other), (name, options)


@pytest.fixture(params=[1, 2])
def threads(request):
    """One thread and two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_options_at_once(dtype, equal, threads):
    settings = [resolve_options(3, **options) for options in OPTIONS]
    assert_same(settings, [*inputs(dtype, equal=equal)])


def test_later_settings_take_the_thresholds_of_earlier_ones(threads, monkeypatch):
    """One call finds thresholds for each density, whatever the number of scalings."""
    tensors = [each for each in inputs(torch.float32) if each[0] == "c"]
    open_rules = []
    call = native.ties
    monkeypatch.setattr(
        native,
        "ties",
        lambda *a: open_rules.extend([1] * (a[4].thresholds is None)) or call(*a),
    )
    settings = [
        resolve_options(3, density=d, scaling=s) for d in (0.1, 0.4) for s in (0.5, 1.0, 2.0)
    ]
    merger = Together(settings)
    for options in settings:  # in several calls too
        merger.merge([(options, calls_of(tensors))], stacklevel=1)
    assert len(open_rules) == 2


@pytest.mark.parametrize("where", ["first", "last"])
def test_what_is_not_finite_is_refused(where, threads):
    [(name, models, base)] = [each for each in inputs(torch.float32) if each[0] == "c"]
    models[1].view(-1)[0 if where == "first" else -1] = torch.inf
    settings = [resolve_options(3, density=d, scaling=s) for d in (0.1, 1.0) for s in (1.0, 2.0)]
    for chosen in (settings, settings[2:]):
        groups = [(options, calls_of([(name, models, base)])) for options in chosen]
        with pytest.raises(NonFiniteError, match=r"tensor 'c' \(models\[1\]: 1, of 30000\)"):
            Together(chosen).merge(groups, stacklevel=1)
    allowed = [resolve_options(3, scaling=s, non_finite="allow") for s in (1.0, 0.0, -2.0)]
    assert_same(allowed, [(name, models, base)])


def test_what_overflows_is_refused_or_told(threads):
    x = torch.full((5000,), 60000.0, dtype=torch.float16)
    settings = [resolve_options(1, trim="none", scaling=s) for s in (0.5, 2.0)]
    groups = [(options, [("x", [x], None, x.clone())]) for options in settings]
    with pytest.raises(NonFiniteError, match="5,000 values of 1 tensor"):
        Together(settings).merge(groups, stacklevel=1)


def test_models_that_are_views_and_have_dtypes_of_their_own(threads):
    [(name, models, base)] = [each for each in inputs(torch.float32) if each[0] == "c"]
    mixed = [models[0].bfloat16(), models[1].T.contiguous().T, models[2].double()[:, ::1]]
    settings = [resolve_options(3, density=d, scaling=s) for d in (0.1, 0.4) for s in (1.0, 2.0)]
    assert_same(settings, [(name, mixed, base)], torch.bfloat16)
    assert_same(settings, [(name, mixed[:1] * 3, None)])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_named_backend_merges(backend, threads):
    settings = [resolve_options(3, density=0.3, scaling=s) for s in (1.0, 2.0)]
    tensors = [*inputs(torch.bfloat16)]
    groups = [(options, calls_of(tensors)) for options in settings]
    Together(settings, backend).merge(groups, stacklevel=1)
    for options, calls in groups:
        alone = calls_of(tensors)
        merge_many(alone, options, "auto", stacklevel=1)
        assert all(map(torch.equal, bits(calls), bits(alone)))
