"""Recipes of several modules: which tensors each has, and what merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import write_model
from safetensors.torch import load_file

from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import ConfigError
from pymerge.recipe.modules import module_of
from pymerge.recipe.schema import read_config

SEEING = ("text_decoder", "multi_modal_projector", "vision_tower")
HALVES = ("encoder", "decoder", "shared")


@pytest.mark.parametrize(
    ("name", "modules", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", SEEING, "text_decoder"),
        ("model.language_model.layers.0.mlp.up_proj.weight", SEEING, "text_decoder"),
        ("lm_head.weight", SEEING, "text_decoder"),
        ("model.multi_modal_projector.linear_1.weight", SEEING, "multi_modal_projector"),
        ("visual.merger.mlp.0.weight", SEEING, "multi_modal_projector"),
        ("model.visual.deepstack_merger_list.0.norm.weight", SEEING, "multi_modal_projector"),
        ("visual.blocks.0.attn.proj.weight", SEEING, "vision_tower"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", SEEING, "vision_tower"),
        ("vision_model.class_embedding", ("text_decoder", "vision_model"), "vision_model"),
        ("visual.merger.mlp.0.weight", ("text_decoder", "vision_tower"), None),
        ("visual.merger.mlp.0.weight", ("text_decoder", "visual"), "visual"),
        ("visual.merger.mlp.0.weight", ("visual", "visual.merger"), "visual.merger"),
        ("visualised.weight", ("text_decoder", "visual"), "text_decoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", HALVES, "encoder"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", HALVES, "decoder"),
        ("shared.weight", HALVES, "shared"),
        ("lm_head.weight", HALVES, "shared"),
        ("model.encoder.layers.0.fc1.weight", ("encoder", "decoder"), "encoder"),
        ("proj_out.weight", ("encoder", "decoder"), "decoder"),
        ("decoder.embed_tokens.weight", ("encoder", "shared"), None),
        ("lm_head.weight", ("encoder",), None),
    ],
)
def test_names(name: str, modules: tuple[str, ...], expected: str | None) -> None:
    assert module_of(name, modules) == expected


SHAPES = {
    "language_model.embed.weight": (6, 4),
    "language_model.layers.0.w": (4, 4),
    "language_model.layers.1.w": (4, 4),
    "vision_tower.blocks.0.w": (4, 4),
    "vision_tower.blocks.1.w": (4, 4),
    "vision_tower.blocks.2.w": (4, 4),
}


@pytest.fixture
def states(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = {
        name: {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        for name in ("a", "b", "c")
    }
    for name, state in made.items():
        write_model(tmp_path / name, state)
    return made


def recipe(root: Path, **modules: dict[str, Any]) -> dict[str, Any]:
    """Modules of models with their weights, merged as sums."""
    return {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "modules": {
            module: {
                "models": [
                    {"model": str(root / name), "parameters": {"weight": weight}}
                    for name, weight in models.items()
                ]
            }
            for module, models in modules.items()
        },
    }


def test_every_module_has_models_weights_and_gradients_of_its_own(
    states: Any, tmp_path: Path
) -> None:
    config = recipe(tmp_path, text_decoder={"a": 0.5, "b": [1, 3]}, vision_tower={"c": [0, 1, 4]})
    plan = plan_checkpoints(config)
    assert not plan.problems
    assert not [note for note in plan.notes if "left out" in note]
    merge_checkpoints(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    a, b, c = states.values()
    assert found.keys() == SHAPES.keys()
    for key, (of_b, of_c) in {
        "language_model.embed.weight": (1, None),
        "language_model.layers.0.w": (1, None),
        "language_model.layers.1.w": (3, None),
        "vision_tower.blocks.0.w": (None, 0),
        "vision_tower.blocks.1.w": (None, 1),
        "vision_tower.blocks.2.w": (None, 4),
    }.items():
        wanted = of_c * c[key] if of_b is None else 0.5 * a[key] + of_b * b[key]
        torch.testing.assert_close(found[key], wanted, rtol=1e-6, atol=1e-7)


def test_tensors_that_models_of_one_module_lack_are_missed(states: Any, tmp_path: Path) -> None:
    del states["b"]["language_model.layers.1.w"]
    write_model(tmp_path / "short", states["b"])
    config = recipe(tmp_path, text_decoder={"a": 1, "short": 1}, vision_tower={"c": 1})
    (problem,) = plan_checkpoints(config).problems
    assert "short lacks 1 tensor" in problem and "language_model.layers.1.w" in problem


def test_a_module_that_is_missing_or_has_no_tensor_is_an_error(states: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_checkpoints(recipe(tmp_path, vision_tower={"a": 1}, encoder={"b": 1}))
    text = str(caught.value)
    assert f"modules.encoder: no tensor of {tmp_path / 'b'} belongs to it" in text
    assert f"modules: 3 tensors of {tmp_path / 'a'} would be missing from the result" in text
    assert "language_model.embed.weight" in text and "add their module" in text


def test_slices_are_of_one_module() -> None:
    sources = [{"model": "a", "layer_range": [0, 1]}]
    modules = {
        "text_decoder": {"slices": [{"sources": sources}]},
        "vision_tower": {"models": [{"model": "a"}]},
    }
    config = {"merge_method": "passthrough", "modules": modules}
    with pytest.raises(ConfigError, match=r"modules.text_decoder: slices of one of several"):
        read_config(config)
    del modules["vision_tower"]
    read_config(config)
