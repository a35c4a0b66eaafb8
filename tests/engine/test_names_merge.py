"""Folders whose models name tensors differently, or do not have the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folder_cases import State, assert_same, family, read_result, recipe, write_model

from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import MismatchError


def write(root: Path, states: list[State]) -> list[Path]:
    return [write_model(root / str(k), state) for k, state in enumerate(states)]


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_ties"])
def test_the_result_is_that_of_models_whose_names_and_parts_agree(
    tmp_path: Path, method: str
) -> None:
    base, one, two = family()
    parameters = {} if method == "task_arithmetic" else {"density": 0.5}
    folders = write(tmp_path / "plain", [base, one, two])
    merge_checkpoints(recipe(method, folders, **parameters), tmp_path / "wanted")
    extra = {"mtp.fc.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in one.items()}
    head = {"v_head.summary.weight": torch.ones(1, 16, dtype=torch.bfloat16)}
    folders = write(tmp_path / "other", [base | extra, wrapped, two | head])
    config = recipe(method, folders, **parameters)
    summary = merge_checkpoints(config, tmp_path / "out")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted") | extra)
    assert len(summary.notes) == 3
    with pytest.raises(MismatchError, match="strict=True asks for the same tensors"):
        merge_checkpoints(config, tmp_path / "strict", strict=True)


def test_variances_stay_positive(tmp_path: Path) -> None:
    one, two = 0.01, 0.03
    folders = [
        write_model(tmp_path / str(k), {"bn.running_var": torch.full((3,), value)})
        for k, value in enumerate((1.0, one, two))
    ]
    merge_checkpoints(recipe("task_arithmetic", folders), tmp_path / "out")
    found = read_result(tmp_path / "out")["bn.running_var"]
    assert torch.equal(found, (torch.full((3,), one) + torch.full((3,), two)) / 2)
