"""Statistics files for the models of folder_cases, without running any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pymerge.checkpoint.weight_tags import tag_of
from pymerge.statistics._file import pack, write

LAYERS = ("q_proj", "up_proj")
TOKENS, DRAWS = 50, 20


def write_statistics(
    path: Path,
    state: Mapping[str, torch.Tensor],
    seed: int,
    *,
    layers: Sequence[str] = LAYERS,
    kinds: Sequence[str] = ("input_gram", "output_grad_gram"),
    change: Mapping[str, Any] | None = None,
) -> Path:
    """Random sums for the layers whose name ends so; up_proj reads q_proj's input. change: fields
    of the header.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [
        name.removesuffix(".weight")
        for name, t in state.items()
        if t.dim() == 2 and name.removesuffix(".weight").endswith(tuple(layers))
    ]
    header: dict[str, Any] = {
        "software": "test",
        "normalisation": "sum",
        "model": {"name": "", "class": "", "fingerprint": str(seed)},
        "data": [{"digest": str(seed), "batches": 1, "examples": DRAWS, "tokens": TOKENS}],
        "settings": {"loss": "", "labels": "", "samples": 1},
        "layers": {},
        "parameters": {},
        "weights": {},
        "tensors": {},
        "aliases": {},
        "skipped": {},
    }
    sums: dict[str, torch.Tensor] = {}

    def gram(size: int, count: int) -> torch.Tensor:
        rows = torch.randn(3 * size, size, generator=generator)
        return rows.T @ rows * (count / (3 * size))

    for name in names:
        d_out, d_in = state[f"{name}.weight"].shape
        header["weights"][f"{name}.weight"] = tag_of(state[f"{name}.weight"])
        header["layers"][name] = {
            "d_in": d_in,
            "d_out": d_out,
            "transposed": False,
            "weight": f"{name}.weight",
        }
        leader = name.replace("mlp.up_proj", "self_attn.q_proj")
        if "input_gram" in kinds:
            if leader != name and leader in names:
                header["aliases"][f"input_gram/{name}"] = f"input_gram/{leader}"
            else:
                sums[f"input_gram/{name}"] = pack(gram(d_in, TOKENS))
        if "output_grad_gram" in kinds:
            sums[f"output_grad_gram/{name}"] = pack(gram(d_out, DRAWS))
    if "diagonal_fisher" in kinds:
        for name, tensor in state.items():
            header["parameters"][name] = list(tensor.shape)
            header["weights"][name] = tag_of(tensor)
            sums[f"diagonal_fisher/{name}"] = torch.rand(tensor.shape, generator=generator) * DRAWS
    for key in sums:
        draws = 0 if key.startswith("input_gram") else DRAWS
        header["tensors"][key] = {"tokens": TOKENS, "examples": DRAWS, "draws": draws}
    header.update(change or {})
    write(path, header, sums.items(), overwrite=True)
    return path


def recipe(
    method: str,
    folders: Sequence[Path],
    files: Sequence[Path],
    base: Path | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """A configuration that merges the folders by these files."""
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(folder), "statistics": str(file)}
            for folder, file in zip(folders, files, strict=True)
        ],
    }
    if base is not None:
        config["base_model"] = str(base)
    if parameters:
        config["parameters"] = parameters
    return config
