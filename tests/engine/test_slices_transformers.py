"""Sliced models load in transformers with every weight in its place, and every layer is what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import CONFIG, family, read_result, write_model

from pymerge.engine.merge import merge_checkpoints, plan_checkpoints

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "SmolLM3": lambda: transformers.SmolLM3Config(**SMALL),
    "Qwen3Moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, head_dim=4, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1,
        mlp_only_layers=[1],
    ),
    "DeepseekV3": lambda: transformers.DeepseekV3Config(
        **SMALL, moe_intermediate_size=8, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=2, q_lora_rank=4, kv_lora_rank=4,
        qk_rope_head_dim=2, qk_nope_head_dim=4, v_head_dim=4,
    ),
    "GPTNeo": lambda: transformers.GPTNeoConfig(
        vocab_size=20, hidden_size=8, num_layers=4, num_heads=2, max_position_embeddings=16,
        attention_types=[[["global", "local"], 2]], bos_token_id=1, eos_token_id=2,
    ),
    "Gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=4),
}  # fmt: skip


def sliced(folder: Path, *ranges: tuple[int, int]) -> dict[str, Any]:
    slices = [{"sources": [{"model": str(folder), "layer_range": list(r)}]} for r in ranges]
    return {"merge_method": "passthrough", "slices": slices}


@pytest.mark.parametrize("name", MODELS)
def test_a_sliced_model_loads_whole(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    kind(MODELS[name]()).save_pretrained(tmp_path / "m")
    ranges = [(0, 2), (1, 2), (2, 4)] if name == "DeepseekV3" else [(0, 3), (1, 4)]
    layers = [i for r in ranges for i in range(*r)]
    merge_checkpoints(sliced(tmp_path / "m", *ranges), tmp_path / "out")
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = kind.from_pretrained(tmp_path / "m")
    blocks, old = (m.transformer.h if name == "GPTNeo" else m.model.layers for m in (model, before))
    assert len(blocks) == len(layers)
    for block, layer in zip(blocks, layers, strict=True):
        assert str(block) == str(old[layer])
        for one, other in zip(block.parameters(), old[layer].parameters(), strict=True):
            assert torch.equal(one, other)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_what_cannot_be_carried_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    (state,) = family(0)
    folder = write_model(tmp_path / "m", state, CONFIG | {"first_k_dense_replace": 1})
    assert not plan_checkpoints(sliced(folder, (0, 1), (1, 2))).problems
    (problem,) = plan_checkpoints(sliced(folder, (1, 2), (0, 1))).problems
    assert str(folder) in problem and "first_k_dense_replace of its config gives layers" in problem


def test_an_empty_last_slice_gives_what_comes_after_the_layers(tmp_path: Path) -> None:
    one, two = family(1)
    for name, state in (("a", one), ("b", two)):
        write_model(tmp_path / name, state)
    both = [{"model": str(tmp_path / name), "layer_range": [0, 2]} for name in "ab"]
    slices = [
        {"sources": both},
        {"sources": [{"model": str(tmp_path / "b"), "layer_range": [2, 2]}]},
    ]
    config = {"merge_method": "linear", "parameters": {"weight": 1.0}, "slices": slices}
    merge_checkpoints(config, tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert result.keys() == one.keys()
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(result[name], two[name])
    mean = (one["model.embed_tokens.weight"].float() + two["model.embed_tokens.weight"]) / 2
    assert torch.equal(result["model.embed_tokens.weight"], mean.to(torch.bfloat16))
    plan = plan_checkpoints({**config, "slices": slices[1:]})
    assert "the slices have no layers" in plan.problems[0]
