"""Mixtures of experts that one model lists and another has fused are merged as if both had one kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import State, assert_same, read_result, recipe, write_model

from pymerge.engine.merge import merge_checkpoints, plan_checkpoints

COUNT, INNER, WIDTH = 3, 4, 8
MLP = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


def listed(seed: int, names: tuple[str, str, str] = MLP, block: str = "mlp") -> State:
    generator = torch.Generator().manual_seed(seed)
    found = {"model.embed_tokens.weight": torch.randn(20, WIDTH, generator=generator)}
    for layer in range(2):
        for expert in range(COUNT):
            for name, shape in zip(names, ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)), strict=True):  # fmt: skip
                key = f"model.layers.{layer}.{block}.experts.{expert}.{name}.weight"
                found[key] = torch.randn(shape, generator=generator)
        router = f"model.layers.{layer}.{block}.gate.weight"
        found[router] = torch.randn(COUNT, WIDTH, generator=generator)
    return found


def fused(state: State, names: tuple[str, str, str] = MLP, block: str = "mlp") -> State:
    """As modules of transformers 5 have them."""
    found = {name.replace(block, "mlp"): t for name, t in state.items() if ".experts." not in name}
    for layer in range(2):
        stack = f"model.layers.{layer}.{block}.experts"
        gate, up, down = (
            [state[f"{stack}.{e}.{name}.weight"] for e in range(COUNT)] for name in names
        )
        both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        new = stack.replace(block, "mlp")
        found[f"{new}.gate_up_proj"] = torch.stack(both)
        found[f"{new}.down_proj"] = torch.stack(down)
    return found


@pytest.mark.parametrize(("names", "block"), [(MLP, "mlp"), (MIXTRAL, "block_sparse_moe")])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
@pytest.mark.parametrize("io", ["mmap", "read"])
def test_either_kind_is_read_as_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str, str], block: str, prefix: str, method: str, io: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("PYMERGE_IO", io)
    states = [listed(seed, names, block) for seed in range(3)]
    other = [fused(state, names, block) for state in states]
    parameters: dict[str, Any] = {} if method == "linear" else {"density": 0.5}

    def made(name: str, models: list[State]) -> State:
        folders = [write_model(tmp_path / f"{name}{k}", m) for k, m in enumerate(models)]
        config = recipe(method, folders, **parameters)
        if method == "linear":
            config["models"].insert(0, {"model": str(folders[0]), "parameters": {"weight": 1.0}})
        assert not plan_checkpoints(config).problems
        merge_checkpoints(config, tmp_path / f"{name}-out")
        return read_result(tmp_path / f"{name}-out")

    def wrapped(state: State) -> State:
        return {prefix + name: tensor for name, tensor in state.items()}

    assert_same(made("l", [states[0], wrapped(other[1]), states[2]]), made("ll", states))
    assert_same(made("f", [other[0], wrapped(states[1]), other[2]]), made("ff", other))


def test_the_note_says_how_experts_were_read(tmp_path: Path) -> None:
    states = [listed(seed) for seed in range(2)]
    folders = [
        write_model(tmp_path / "base", states[0]), write_model(tmp_path / "ft", fused(states[1]))
    ]  # fmt: skip
    (note,) = plan_checkpoints(recipe("ties", folders, density=0.5)).notes
    assert "ft has the experts of its layers all in one tensor, and not one by one as" in note
    (note,) = plan_checkpoints(recipe("ties", folders[::-1], density=0.5)).notes
    assert "base has the experts of its layers one by one, and not all in one tensor as" in note


@pytest.mark.parametrize("what", ["an expert is missing", "dtypes differ", "transposed"])
def test_what_does_not_fit_is_an_error(tmp_path: Path, what: str) -> None:
    base, state = fused(listed(0)), listed(1)
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    if what == "an expert is missing":
        del state[name]
    elif what == "dtypes differ":
        state[name] = state[name].bfloat16()
    else:
        state[name] = state[name].T.contiguous()
    folders = [write_model(tmp_path / "base", base), write_model(tmp_path / "ft", state)]
    problems = plan_checkpoints(recipe("ties", folders, density=0.5)).problems
    assert any("model.layers.1.mlp.experts.gate_up_proj" in problem for problem in problems)


def test_a_module_of_transformers_and_its_own_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Qwen3MoeConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, moe_intermediate_size=4, head_dim=4,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=3,
        num_experts_per_tok=1,
    )  # fmt: skip
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = transformers.Qwen3MoeForCausalLM(config)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folders.append(write_model(tmp_path / "2", state, config.to_dict()))
    both = [recipe("ties", [folders[0], other], density=0.5) for other in folders[1:]]
    for k, each in enumerate(both):
        merge_checkpoints(each, tmp_path / f"out{k}")
    assert_same(read_result(tmp_path / "out0"), read_result(tmp_path / "out1"))
