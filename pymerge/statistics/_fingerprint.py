"""By what a model and its weights are known again (rules S10 and S14)."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from pymerge.checkpoint.weight_tags import tag_of
from pymerge.ops.memory import raw_bytes
from pymerge.statistics._targets import Targets

_FINGERPRINT_ELEMENTS = 1 << 14


def tags_of(targets: Targets) -> dict[str, str]:
    """S14: of the weights of all layers, and of all parameters."""
    own = (layer for layer in targets.layers.values() if layer.pool != layer.name)
    named = {layer.weight: layer.values for layer in own}
    return {name: tag_of(tensor) for name, tensor in {**named, **targets.parameters}.items()}


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and up to 16384 evenly spaced elements of every parameter
    and buffer.
    """
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _FINGERPRINT_ELEMENTS)]
        if flat.numel():
            state.update(raw_bytes(flat).numpy().data)
    return state.hexdigest()
