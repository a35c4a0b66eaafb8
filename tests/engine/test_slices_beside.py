"""Numbered modules that are no layers, beside the layers that slices are cut from."""

from __future__ import annotations

from pathlib import Path

import torch
from folder_cases import CONFIG, assert_same, read_result, write_model

from pymerge.engine.merge import merge_checkpoints


def test_lists_of_other_modules_are_taken_whole(tmp_path: Path) -> None:
    """As Gemma 3n's `altup_projections`, of which there are three whatever its depth."""
    names = ["embed_tokens.weight", *(f"layers.{k}.w" for k in range(2)), "norm.weight"]
    names += [f"altup_projections.{k}.weight" for k in range(3)]
    state = {f"model.{name}": torch.full((2, 2), float(k)) for k, name in enumerate(names)}
    folder = write_model(tmp_path / "a", state, CONFIG)
    cuts = [{"sources": [{"model": str(folder), "layer_range": r}]} for r in ([0, 2], [1, 2])]
    merge_checkpoints({"merge_method": "passthrough", "slices": cuts}, tmp_path / "out")
    wanted = state | {"model.layers.2.w": state["model.layers.1.w"]}
    assert_same(read_result(tmp_path / "out"), wanted)
