"""Adapters for tests, in peft's layout, and what a merge with one is, in fp64 and by plain torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from folder_cases import State
from safetensors.torch import save_file

Q = "model.layers.{}.self_attn.q_proj"
UP = "model.layers.{}.mlp.up_proj"
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def factors(
    modules: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0, prefix: str = ""
) -> State:
    """Of peft's names. modules: name -> (d_out, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for module, (outputs, inputs) in modules.items():
        state[f"{prefix}{module}.lora_A.weight"] = 0.1 * torch.randn(
            rank, inputs, generator=generator
        )
        state[f"{prefix}{module}.lora_B.weight"] = 0.1 * torch.randn(
            outputs, rank, generator=generator
        )
    return state


MODULES = {
    Q.format(0): (16, 16),
    UP.format(0): (24, 16),
    Q.format(1): (16, 16),
    UP.format(1): (24, 16),
}


def adapter(seed: int = 0, rank: int = 4, prefix: str = "base_model.model.") -> State:
    """One for `folder_cases.family`."""
    return factors(MODULES, rank, seed, prefix)


def write_adapter(folder: Path, state: State, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder


def with_update(base: State, state: State, scale: float = 2.0) -> State:
    """The base in fp32 with the updates of an adapter of plain linear layers."""
    found = {name: tensor.float() for name, tensor in base.items()}
    for name, a in state.items():
        if ".lora_A." in name:
            b = state[name.replace(".lora_A.", ".lora_B.")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            update = scale * (b.double() @ a.double())
            found[weight] = (found[weight].double() + update).float()
    return found
