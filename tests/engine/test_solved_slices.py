"""Tensors of more than two dimensions are solved matrix by matrix: experts in one parameter,
convolutions (M16).
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import pymerge
from pymerge import merge_checkpoints
from pymerge.statistics import Prediction, collect


class _Model(nn.Module):
    """Experts stored (d_out, d_in) and (d_in, d_out), the last of them unused; a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 3)
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(x).mean(2)
        return sum(functional.linear(hidden, self.up[k]) @ self.down[k] for k in range(2))


@pytest.fixture
def made(tmp_path):
    models, held = [], []
    for k in range(2):
        torch.manual_seed(k)
        models.append(_Model())
        batches = [torch.randn(16, 2, 7) for _ in range(3)]
        held.append(collect(models[k], batches, loss=lambda m, b: Prediction(m(b))))
        held[k].save(tmp_path / f"s{k}")
        save_file(models[k].state_dict(), tmp_path / f"m{k}.safetensors")
    return models, held


def _expected(models, held, name, layer, transposed, place=None):
    """By `pymerge.mats` on the matrix alone."""

    def matrix(model):
        whole = model.state_dict()[name]
        whole = whole.flatten(1) if place is None else whole[place]
        return (whole.T if transposed else whole).contiguous()

    merged, _ = pymerge.mats(
        [matrix(model) for model in models],
        [each.input_gram(layer) for each in held],
        [each.output_grad_gram(layer) for each in held],
    )
    return merged.T if transposed else merged


@pytest.mark.parametrize("door", ["folders", "dicts"])
def test_every_matrix_is_a_layer_of_its_own(door, made, tmp_path):
    models, held = made
    if door == "dicts":
        reports = []
        states = [model.state_dict() for model in models]
        out = pymerge.merge(states, method="mats", statistics=held, reports=reports)
        rows = {each.name: each.as_dict() for each in reports}
    else:
        parts = [
            {"model": str(tmp_path / f"m{k}.safetensors"), "statistics": str(tmp_path / f"s{k}")}
            for k in range(2)
        ]
        merge_checkpoints({"merge_method": "mats", "models": parts}, tmp_path / "out")
        out = load_file(tmp_path / "out/model.safetensors")
        listed = json.loads((tmp_path / "out/merge_report.json").read_text())["layers"]
        rows = {row["name"]: row for row in listed}
    for place in range(2):
        for name, turned in (("up", False), ("down", True)):
            wanted = _expected(models, held, name, f"{name}.{place}", turned, place)
            torch.testing.assert_close(out[name][place], wanted, rtol=1e-4, atol=1e-5)
    pooled = _expected(models, held, "up", "up.pooled", False, 2)  # S16: no tokens of its own
    torch.testing.assert_close(out["up"][2], pooled, rtol=1e-4, atol=1e-5)
    wanted = _expected(models, held, "conv.weight", "conv", False)
    torch.testing.assert_close(out["conv.weight"].flatten(1), wanted, rtol=1e-4, atol=1e-5)
    assert rows["up"]["status"] == "iterations"
    assert "3 matrices: 3 iterations; few tokens in" in rows["up"]["message"]
    assert rows["conv.weight"]["step"] > 0


def test_regmean_solves_slices_too(made):
    models, held = made
    states = [model.state_dict() for model in models]
    out = pymerge.merge(states, method="regmean", statistics=held)
    for name, turned in (("up", False), ("down", True)):
        given = [state[name][1].T if turned else state[name][1] for state in states]
        wanted, _ = pymerge.regmean(given, [each.input_gram(f"{name}.1") for each in held])
        own = out[name][1].T if turned else out[name][1]
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


def test_slices_without_statistics_are_the_average(made):
    """M4, where the initialisation is zero too."""
    models, held = made
    states = [model.state_dict() for model in models]
    bare = [_without_pool(each) for each in held]
    reports = []
    out = pymerge.merge(states, method="mats", init="zero", statistics=bare, reports=reports)
    average = (states[0]["up"][2] + states[1]["up"][2]) / 2
    torch.testing.assert_close(out["up"][2], average)
    (report,) = (each for each in reports if each.name == "up")
    assert "2 iterations, 1 no_statistics" in report.message
    bare = [_without_pool(each, gone=("up.0", "down.0", "conv")) for each in held]
    with pytest.raises(ValueError, match="only 33 % of the elements of linear layers"):
        pymerge.merge(states, method="mats", statistics=bare)


def _without_pool(held, gone=()):
    from pymerge.statistics import Statistics

    header = json.loads(json.dumps(held.header))
    for table in ("tensors", "aliases"):
        header[table] = {
            key: v
            for key, v in header[table].items()
            if not key.endswith(tuple(f"/{g}" for g in gone)) and ".pooled" not in key
        }
    for layer in header["layers"].values():
        layer.pop("pool", None)
    return Statistics(header, held._read)


def test_slices_of_another_model_are_refused(made):
    """S14."""
    models, held = made
    states = [model.state_dict() for model in models]
    with pytest.raises(ValueError, match=r"up\.0"):
        pymerge.merge(states, method="mats", statistics=held[::-1])


def test_slices_are_found_by_what_they_hold(made):
    """S15."""
    models, held = made
    states = [model.state_dict() for model in models]
    out = pymerge.merge(states, method="mats", statistics=held)
    renamed = [{f"x.{name}.kernel": each for name, each in state.items()} for state in states]
    with pytest.warns(UserWarning, match="by their values"):
        moved = pymerge.merge(renamed, method="mats", statistics=held)
    for name, tensor in out.items():
        assert torch.equal(moved[f"x.{name}.kernel"], tensor), name
