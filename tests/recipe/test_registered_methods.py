"""Methods that another installed package registers in the entry point group `pymerge.methods`."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from folder_cases import family, read_result, write_model

import pymerge
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import ConfigError, MergeError, NonFiniteError
from pymerge.methods import find_method

MODULE = """
import torch
from pymerge.methods import REQUIRED, Method, Parameter, tensor_method

def median(models, base, *, pull, weight):
    assert len(weight) == len(models)
    deltas = torch.stack([w * (x.float() - base.float()) for w, x in zip(weight, models)])
    return base.float() + pull * deltas.median(dim=0).values

def wrong_shape(models, base, **_):
    return models[0][:1]

def largest(models, base):
    return torch.stack([x.float() for x in models]).amax(dim=0)

PARAMETERS = (
    Parameter("pull", "number", "shared", "pull", 1.0, 0, 1),
    Parameter("weight", "number", "non_base", "weights", REQUIRED),
)

def method():
    return tensor_method("median", median, PARAMETERS, min_models=2, title="Median")

cut = tensor_method("cut", wrong_shape)
largest_of = tensor_method("largest", largest, takes_base=False)
other_name = tensor_method("another", largest)
half = Method("half", "Half", "", {"trim": "none", "elect": "none", "density": 1.0, "scaling": 0.5}, ())
number = 3
"""
ENTRIES = """
[pymerge.methods]
median = their_methods:method
cut = their_methods:cut
largest = their_methods:largest_of
half = their_methods:half
broken = their_methods:nope
number = their_methods:number
misnamed = their_methods:other_name
ties = their_methods:largest_of
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package as an installer leaves it."""
    site = tmp_path / "site"
    info = site / "their_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "their_methods.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(__import__("sys").modules, "their_methods", raising=False)


def expected(states, pull, weights):
    base, *models = states
    result = {}
    for name, start in base.items():
        deltas = [
            w * (m[name].float() - start.float()) for w, m in zip(weights, models, strict=True)
        ]
        median = torch.stack(deltas).median(dim=0).values
        result[name] = (start.float() + pull * median).to(start.dtype)
    return result


def recipe(folders, method, parameters, weights=()):
    models = [{"model": str(folder)} for folder in folders[1:]]
    for model, weight in zip(models, weights, strict=False):
        model["parameters"] = {"weight": weight}
    return {
        "merge_method": method,
        "models": models,
        "base_model": str(folders[0]),
        "parameters": parameters,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_doors_call_the_function(tmp_path, dtype):
    states, weights = family(3, dtype), [1.0, 2.0, 0.5]
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    summary = merge_checkpoints(
        recipe(folders, "median", {"pull": 0.5}, weights), tmp_path / "out", threads=1
    )
    wanted = expected(states, 0.5, weights)
    assert summary.methods["median"].tensors == len(wanted)
    made = pymerge.merge(states[1:], states[0], method="median", weights=weights, pull=0.5)
    for result in (read_result(tmp_path / "out"), made):
        assert set(result) == set(wanted)
        for name, tensor in wanted.items():
            assert result[name].dtype == dtype
            assert torch.equal(result[name], tensor), name


def test_recipes_give_it_gradients_and_filters(tmp_path):
    states = family(2, torch.float32)
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    pull = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]
    merge_checkpoints(recipe(folders, "median", {"pull": pull, "weight": 1}), tmp_path / "out")
    result = read_result(tmp_path / "out")
    for name, part in (
        ("layers.0.mlp.up_proj", 0.0),
        ("layers.1.mlp.up_proj", 1.0),
        ("norm", 0.25),
    ):
        name = f"model.{name}.weight"
        assert torch.equal(result[name], expected(states, part, [1, 1])[name]), name


def test_it_may_stand_for_options_of_ties():
    base, *models = family(2, torch.float32)
    made = pymerge.merge(models, base, method="half")
    plain = pymerge.ties(models, base, trim="none", elect="none", density=1.0, scaling=0.5)
    assert all(torch.equal(made[name], plain[name]) for name in plain)


def test_what_it_is_not_given_is_told(tmp_path):
    base, *models = family(2, torch.float32)
    with pytest.raises(ValueError, match="base is missing; median merges"):
        pymerge.merge(models, method="median")
    with pytest.raises(ValueError, match="models has 1 entries; median takes 2 models or more"):
        pymerge.merge(models[:1], base, method="median")
    with pytest.raises(TypeError, match="median has no parameter 'pul'; did you mean 'pull'"):
        pymerge.merge(models, base, method="median", pul=1)
    with pytest.raises(ValueError, match=r"pull: 2 is outside \[0, 1\]"):
        pymerge.merge(models, base, method="median", pull=2)
    with pytest.raises(ValueError, match="weights has 3 values for 2 models"):
        pymerge.merge(models, base, method="median", weights=[1, 2, 3])
    with pytest.raises(ValueError, match=r"wrong_shape returned shape .1, 16. for 'model.embed"):
        pymerge.merge(models, base, method="cut")
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate([base, *models])]
    for parameters, message in (
        ({"weight": 1, "pull": 3}, "pull: 3 is outside"),
        ({}, "weight is missing"),
        ({"weight": 1, "push": 3}, "unknown parameter 'push'; median has pull, weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge_checkpoints(recipe(folders, "median", parameters), tmp_path / "out")
    with pytest.raises(ConfigError, match="merge_method median takes 2 models or more, not 1"):
        merge_checkpoints(recipe(folders[:2], "median", {"weight": 1}), tmp_path / "out")


def test_nan_is_refused_and_let_through_by_name(tmp_path):
    base, *models = family(2, torch.float32)
    models[1]["model.norm.weight"][3] = math.nan
    with pytest.raises(NonFiniteError, match=r"'model.norm.weight' \(models\[1\]: 1, of 16\)"):
        pymerge.merge(models, base, method="median")
    made = pymerge.merge(models, method="largest", non_finite="allow")
    assert torch.isnan(made["model.norm.weight"]).sum() == 1
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate([base, *models])]
    config = recipe(folders, "median", {"weight": 1})
    with pytest.raises(MergeError, match=r"model.norm.weight holds NaN .* 1 in .*m2"):
        merge_checkpoints(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "'broken' is their_methods:nope, which an installed package registers: Attrib"),
        ("number", "it gives 3; it has to give a pymerge.methods.Method of that name"),
        ("misnamed", "it gives method 'another'"),
        ("meadian", "is not one of linear, .*, median.*; did you mean 'median'"),
    ],
)
def test_what_is_wrong_with_a_registered_method_is_told(name, message):
    with pytest.raises(ConfigError, match=message):
        find_method(name)


def test_the_packages_own_methods_come_first():
    assert find_method("ties").title == "TIES"


def test_it_gets_tensors_that_tie_and_are_not_contiguous():
    base, *models = family(2, torch.float32)
    for state in (base, *models):
        state["turned"] = state["model.embed_tokens.weight"].T
        state["tied"] = state["model.norm.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = pymerge.merge(models, base, method="median")
    assert made["tied"] is made["model.norm.weight"]
    assert torch.equal(made["turned"], expected([base, *models], 1, [1, 1])["turned"])
