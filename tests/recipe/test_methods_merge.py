"""`pymerge.merge` over state dicts."""

from __future__ import annotations

import pytest
import torch

import pymerge
from pymerge.methods import METHODS


def family(count=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def model(spread):
        return {
            "b.weight": torch.randn(5, 7, generator=generator).mul(spread).to(dtype),
            "a.bias": torch.randn(11, generator=generator).mul(spread).to(dtype),
        }

    base = model(1)
    models = [
        {name: base[name] + delta for name, delta in model(0.1).items()} for _ in range(count)
    ]
    return models, base


def equal(left, right):
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)


def test_methods_are_options_of_ties():
    models, base = family()
    weights = [0.5, 0.3, 0.7]
    cases = {
        "ties": {"density": 0.4},
        "task_arithmetic": {"density": 1.0, "trim": "none", "elect": "none", "merge": "sum"},
        "dare_linear": {
            "density": 0.4,
            "trim": "random",
            "elect": "none",
            "merge": "sum",
            "rescale": "l1",
        },
        "dare_ties": {"density": 0.4, "trim": "random", "merge": "sum", "rescale": "l1"},
        "breadcrumbs": {"density": 0.4, "trim": "outliers", "elect": "none", "merge": "sum"},
        "breadcrumbs_ties": {"density": 0.4, "trim": "outliers", "merge": "sum"},
        "della": {"density": 0.4, "trim": "magprune", "rescale": "l1"},
        "della_linear": {
            "density": 0.4,
            "trim": "magprune",
            "elect": "none",
            "merge": "sum",
            "rescale": "l1",
        },
    }
    task_vectors = {n for n, m in METHODS.items() if m.takes_base and m.op == "ties"}
    assert set(cases) == task_vectors
    for method, options in cases.items():
        density = {} if options.get("trim") == "none" else {"density": 0.4}
        merged = pymerge.merge(
            models, base, method=method, weights=weights, scaling=0.9, seed=3, **density
        )
        assert equal(
            merged, pymerge.ties(models, base, weights=weights, scaling=0.9, seed=3, **options)
        ), method


def test_linear_is_the_weighted_mean():
    models, _ = family()
    merged = pymerge.merge(models, method="linear", weights=[1, 2, 1])
    for name in models[0]:
        mean = (models[0][name] + 2 * models[1][name] + models[2][name]) / 4
        torch.testing.assert_close(merged[name], mean)
    total = pymerge.merge(models, method="linear", normalize=False)
    torch.testing.assert_close(total["a.bias"], sum(m["a.bias"] for m in models))


def test_linear_refuses_weights_that_sum_to_zero():
    models, base = family(2)
    for weights in ([1, -1], 0, torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="sum to zero"):
            pymerge.merge(models, method="linear", weights=weights)
    pymerge.merge(models, method="linear", weights=[1, -1], normalize=False)
    with pytest.raises(ValueError, match="linear takes no base"):
        pymerge.merge(models, base, method="linear")


def test_passthrough():
    (model, *_), _ = family(1)
    model["a.bias"][0] = -0.0
    model["tied"] = model["a.bias"]
    copied = pymerge.merge([model], method="passthrough")
    assert equal(copied, model) and torch.signbit(copied["a.bias"][0])
    assert copied["tied"] is copied["a.bias"] and copied["a.bias"] is not model["a.bias"]
    doubled = pymerge.merge([model], method="passthrough", scale=2)
    assert torch.equal(doubled["b.weight"], 2 * model["b.weight"])
    with pytest.raises(ValueError, match="models has 2 entries; passthrough takes 1"):
        pymerge.merge([model, model], method="passthrough")


def test_order_dtype_and_integers():
    models, base = family(2)
    base = {"n": torch.tensor([1, 2]), **{name: t.bfloat16() for name, t in base.items()}}
    models = [{**m, "n": torch.tensor([1, 3])} for m in models]
    with pytest.warns(UserWarning, match="'n' is torch.int64 and differs"):
        merged = pymerge.merge(models, base, density=0.5)
    assert list(merged) == list(base)
    assert [t.dtype for t in merged.values()] == [t.dtype for t in base.values()]
    assert torch.equal(merged["n"], base["n"]) and merged["n"] is not base["n"]


def test_tied_tensors_stay_tied_where_all_models_tie_them():
    models, base = family(2)
    for state in (base, *models):
        state["tied"] = state["b.weight"]
    merged = pymerge.merge(models, base)
    assert merged["tied"].data_ptr() == merged["b.weight"].data_ptr()
    models[0]["tied"] = models[0]["b.weight"] + 1
    merged = pymerge.merge(models, base, density=1.0)
    assert merged["tied"].data_ptr() != merged["b.weight"].data_ptr()
    assert not torch.equal(merged["tied"], merged["b.weight"])


def test_scope_model_and_flavors():
    models, base = family()
    merged = pymerge.merge(models, base, density=[0.1, 0.2, 0.3], scope="model")
    assert equal(merged, pymerge.ties(models, base, density=[0.1, 0.2, 0.3], scope="model"))
    assert not equal(merged, pymerge.merge(models, base, density=[0.1, 0.2, 0.3]))
    assert equal(
        pymerge.merge(models, base, flavor="paper"),
        pymerge.ties(models, base, flavor="paper", density=0.2),
    )


def test_all_differences_of_names_and_shapes_are_listed():
    models, base = family(2)
    models[0]["extra"] = torch.zeros(1)
    models[1]["a.bias"] = torch.zeros(3)
    del models[1]["b.weight"]
    with pytest.raises(ValueError) as caught:
        pymerge.merge(models, base)
    for words in (
        "models[0] has extra",
        "models[1] lacks b.weight",
        "a.bias has shape (3,) in models[1]",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "for 20% pass 0.2", {"density": 20}),
        (ValueError, "weights has 3 values for 2 models", {"weights": [1, 2, 3]}),
        (ValueError, "did you mean 'ties'", {"method": "tie"}),
        (
            ValueError,
            "arcee_fusion, wudi, tsv, iso_c, mats, regmean, fisher; did you mean 'slerp'?",
            {"method": "slurp"},
        ),
        (TypeError, "ties has no parameter 'densty'; did you mean 'density'", {"densty": 0.2}),
        (
            TypeError,
            "task_arithmetic has no parameter 'density'; it has weight, normalize, scaling, merge,"
            " flavor, non_finite, backend, out",
            {"method": "task_arithmetic", "density": 0.5},
        ),
        (
            TypeError,
            "dare_linear has no parameter 'gamma'; it has weight, density, normalize, rescale,"
            " scaling, seed, merge, flavor, non_finite, backend, out",
            {"method": "dare_linear", "gamma": 0.5},
        ),
        (
            TypeError,
            "breadcrumbs has no parameter 'elect'",
            {"method": "breadcrumbs", "elect": "sum"},
        ),
        (TypeError, "say the same", {"weight": 1, "weights": 1}),
        (TypeError, "say the same", {"normalize": True, "merge": "sum"}),
        (TypeError, "pass True or False", {"normalize": "yes"}),
    ],
)
def test_bad_arguments(error, words, arguments):
    models, base = family(2)
    with pytest.raises(error) as caught:
        pymerge.merge(models, base, **arguments)
    assert words in str(caught.value)


def test_base_is_needed_and_nan_is_refused():
    models, base = family(2)
    with pytest.raises(ValueError, match="base is missing; ties merges task vectors"):
        pymerge.merge(models)
    models[1]["a.bias"][3] = torch.nan
    with pytest.raises(ValueError, match=r"a\.bias.*models\[1\]: 1"):
        pymerge.merge(models, base)
    assert pymerge.merge(models, base, non_finite="allow")["a.bias"].isnan().sum() == 1


def test_rescale_names():
    models, base = family(2)
    common = {"method": "dare_linear", "density": 0.5, "seed": 1}
    for given, option in ((True, "l1"), (False, "none"), ("density", "density")):
        expected = pymerge.ties(
            models,
            base,
            trim="random",
            elect="none",
            merge="sum",
            density=0.5,
            seed=1,
            rescale=option,
        )
        assert equal(pymerge.merge(models, base, rescale=given, **common), expected)
