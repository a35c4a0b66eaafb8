"""One output in several dtypes: as the inputs have them, or as a recipe asks for by filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import family, read_result, recipe, write_model

from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import ConfigError
from pymerge.recipe.resolve import read_recipe


def test_norms_stay_in_fp32_beside_bf16(tmp_path: Path) -> None:
    states = [
        {name: t.float() if "norm" in name else t for name, t in state.items()}
        for state in family()
    ]
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(states)]
    summary = merge_checkpoints(recipe("ties", folders, density=0.5), tmp_path / "out")
    for name, tensor in read_result(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
    (note,) = summary.notes
    assert note.startswith("3 tensors of the result are float32, most bfloat16: model.layers")
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_filters_say_which_tensors_get_which_dtype(tmp_path: Path, dtype: str | None) -> None:
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(family())]
    filters = [
        {"filter": "layers.0.input_layernorm", "value": "float64"},
        {"filter": "norm", "value": "float32"},
    ]
    config = {**recipe("ties", folders, density=0.5), "dtype": dtype, "out_dtype": filters}
    merge_checkpoints(config, tmp_path / "out")
    one = {**recipe("ties", folders, density=0.5), "out_dtype": "float32"}
    merge_checkpoints(one, tmp_path / "one")
    wide = read_result(tmp_path / "one")
    for name, tensor in read_result(tmp_path / "out").items():
        wanted = torch.float16 if dtype else torch.bfloat16
        if "norm" in name:
            wanted = torch.float64 if "layers.0." in name else torch.float32
        assert tensor.dtype == wanted
        assert torch.equal(tensor, wide[name].to(wanted))


def test_a_list_for_all_is_as_one_dtype(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(family())]
    for value in ({"value": "float16"}, [{"filter": "*", "value": "float16"}]):
        plan = plan_checkpoints({**recipe("linear", folders), "out_dtype": value})
        assert {tensor.dtype for tensor in plan.tensors} == {"float16"} and not plan.notes


def test_a_filter_that_fits_nothing_is_told(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(family())]
    filters = [{"filter": "nrom", "value": "float32"}, {"value": "bfloat16"}]
    (note,) = plan_checkpoints({**recipe("linear", folders), "out_dtype": filters}).notes
    assert note == "out_dtype: no tensor has 'nrom' in its name, so this filter does nothing"


def test_a_parameters_filter_that_fits_nothing_is_told(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(family())]
    made = recipe("linear", folders)
    made["models"][0]["parameters"]["weight"] = [{"filter": "nrom", "value": 2}, {"value": 1}]
    made["models"][1]["parameters"]["weight"] = [{"filter": "norm", "value": 2}, {"value": 1}]
    (note,) = plan_checkpoints(made).notes
    assert note == "weight: no tensor has 'nrom' in its name, so this filter does nothing"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"filter": "norm", "value": "fp32"}], "'fp32' is not one of .*did you mean 'float32'"),
        (["float32", "bfloat16"], "'float32' is not {filter: part of a tensor name, value: dtype}"),
        ([{"filter": "norm"}], "is not {filter"),
        ([{"filter": 3, "value": "float32"}], "needs a part of a tensor name"),
        ([{"filters": "norm", "value": "float32"}], "is not {filter"),
        ([{"value": None}], "needs a part of a tensor name"),
    ],
)
def test_what_is_no_filter_is_told(value: Any, said: str) -> None:
    entry = {"model": "a", "parameters": {"weight": 1.0}}
    with pytest.raises(ConfigError, match=said):
        read_recipe({"merge_method": "linear", "models": [entry], "out_dtype": value})
