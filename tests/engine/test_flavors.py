"""The flavor of a TIES recipe: whose rules count, over a tensor or over the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import assert_same, family, read_result, recipe, write_model
from safetensors.torch import load_file

import pymerge
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import ConfigError
from pymerge.recipe.resolve import read_recipe

GOLDEN = Path(__file__).parent.parent / "golden"


def flavored(folders: list[Path], flavor: str, **parameters: Any) -> dict[str, Any]:
    config = recipe("ties", folders, flavor=flavor, **parameters)
    for entry in config["models"]:
        entry["parameters"] = {"weight": 1.0}
    return config


@pytest.mark.parametrize("flavor", ["mergekit", "peft", "paper"])
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_a_recipe_has_the_rules_of_its_flavor(tmp_path: Path, flavor: Any, scaling: float) -> None:
    states = family()
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(states)]
    config = flavored(folders, flavor, density=0.3, **{"lambda": scaling})
    assert not plan_checkpoints(config).notes
    merge_checkpoints(config, tmp_path / "out")
    wanted = pymerge.ties(states[1:], states[0], density=0.3, flavor=flavor, scaling=scaling)
    assert_same(read_result(tmp_path / "out"), wanted)


def test_paper_is_the_official_code_over_all_tensors(tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "ties_official_cont.safetensors")
    vectors = golden["task_vectors"]
    cuts = {"a": slice(0, 1000), "b": slice(1000, 1007), "c": slice(1007, None)}
    states = [{n: vector[cut].clone() for n, cut in cuts.items()} for vector in vectors]
    base = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}
    folders = [write_model(tmp_path / str(k), s) for k, s in enumerate([base, *states])]
    config = flavored(folders, "paper", density=0.2)
    merge_checkpoints(config, tmp_path / "out")
    result = read_result(tmp_path / "out")
    merged = torch.cat([result[name] for name in cuts])
    torch.testing.assert_close(merged, golden["topk20|mass|dis-mean"], rtol=1e-6, atol=1e-7)


def test_one_threshold_needs_one_set_of_parameters(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(family())]
    config = flavored(folders, "paper", density=[0.2, 0.8])
    (problem,) = plan_checkpoints(config).problems
    assert 'flavor "paper"' in problem and 'flavor "mergekit"' in problem


def small(**parameters: Any) -> dict[str, Any]:
    entry = {"model": "a", "parameters": {"weight": 1.0}}
    return {"merge_method": "ties", "base_model": "b", "models": [entry], "parameters": parameters}


def test_what_a_flavor_leaves_without_effect_is_said() -> None:
    with pytest.warns(UserWarning, match="normalize has no effect with flavor paper"):
        read_recipe(small(flavor="paper", normalize=True))
    with pytest.raises(ConfigError, match="'papers' is not one of mergekit, peft, paper; did you"):
        read_recipe(small(flavor="papers"))
    with pytest.warns(UserWarning, match="flavor has no effect with merge_method dare_ties"):
        read_recipe({**small(flavor="paper"), "merge_method": "dare_ties"})
