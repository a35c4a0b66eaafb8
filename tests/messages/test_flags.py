"""Flags of public functions are True or False: `"no"` would count as true."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folder_cases import family, recipe

import pymerge
import pymerge.statistics
from pymerge.compat import mergekit
from pymerge.engine import method_functions
from pymerge.statistics import Prediction, Statistics

NOT_FLAGS = ["no", "False", "", 0, 1, [], np.True_, torch.tensor(True)]


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions that are not drop-ins, whose flags are what they are elsewhere, and not
    methods, whose parameters are read as in a recipe, where "no" is false.
    """
    for module in (pymerge, pymerge.statistics):
        for name in module.__all__:
            each = getattr(module, name)
            if inspect.isfunction(each) and each.__module__ != method_functions.__name__:
                yield f"{module.__name__}.{name}", each
    yield "pymerge.compat.mergekit.merge_state_dicts", mergekit.merge_state_dicts
    for name in ("input_gram", "output_grad_gram", "block_fisher", "diagonal_fisher"):
        yield f"Statistics.{name}", getattr(Statistics, name)


def _flags() -> list[tuple[str, str]]:
    return [
        (name, parameter.name)
        for name, function in _functions()
        for parameter in inspect.signature(function).parameters.values()
        if str(parameter.annotation).startswith("bool")
    ]


def _call(name: str, folder: Path, flags: Mapping[str, Any]) -> Any:
    """With other arguments that no check of flags looks at."""
    states = family(dtype=torch.float32)
    model = torch.nn.Linear(2, 2)
    batches = [torch.ones(3, 2)]
    if name in ("pymerge.merge_checkpoints", "pymerge.plan_checkpoints"):
        config = recipe("linear", [folder / name for name in ("base", "m1", "m2")])
        to = [folder / "out"] if name == "pymerge.merge_checkpoints" else []
        return getattr(pymerge, name.removeprefix("pymerge."))(config, *to, **flags)
    if name == "pymerge.sweep":
        return pymerge.sweep(states[1:], states[0], {"density": [0.5]}, **flags)
    if name == "pymerge.sweep_checkpoints":
        config = recipe("linear", [folder / name for name in ("base", "m1", "m2")])
        return pymerge.sweep_checkpoints(config, {"weight": [0.5]}, folder / "out", **flags)
    if "with_statistics" in name:
        made = getattr(pymerge, name.removeprefix("pymerge."))(
            states[1:], states[0], ["a.safetensors", "b.safetensors"], **flags
        )
        return list(made)
    if name == "pymerge.statistics.collect":
        return pymerge.statistics.collect(model, batches, kinds=["input_gram"], **flags)
    if name == "pymerge.statistics.merge_files":
        return pymerge.statistics.merge_files([folder / "a"], folder / "b", **flags)
    if name.startswith("Statistics."):
        found = pymerge.statistics.collect(model, batches, kinds=["input_gram"])
        return getattr(found, name.removeprefix("Statistics."))("", **flags)
    return mergekit.merge_state_dicts(states[1:], "linear", **flags)


@pytest.mark.parametrize(("name", "flag"), _flags())
def test_flags(tmp_path: Path, name: str, flag: str) -> None:
    for value in NOT_FLAGS:
        with pytest.raises(TypeError, match=f"^{flag}=.* pass True or False$"):
            _call(name, tmp_path, {flag: value})
    assert not (tmp_path / "out").exists()


def test_there_are_flags() -> None:
    assert len(_flags()) > 20
    assert (
        importlib.import_module("pymerge.engine.merge").merge_checkpoints
        in dict(_functions()).values()
    )


def test_a_prediction() -> None:
    def loss(model: Any, batch: Any) -> Prediction:
        return Prediction(model(batch), gaussian="no")  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"^gaussian='no' is a str; pass True or False$"):
        pymerge.statistics.collect(
            torch.nn.Linear(2, 2), [torch.ones(3, 2)], kinds=["diagonal_fisher"], loss=loss
        )
