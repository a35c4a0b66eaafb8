"""Recognises a weight by a hash of a few of its elements (rule S14)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pymerge.dtypes import INTEGERS, MERGEABLE, torch_dtype

# Dtypes that have tags: torch can read their values, which take whole bytes.
_TAGGED = (*MERGEABLE, *INTEGERS, "float8_e4m3fn", "float8_e5m2")

# Consecutive elements from the middle of the tensor, so that one read of the file gets them.
SAMPLE = 256


def sample_of(count: int) -> tuple[int, int]:
    """First element and length of the sample that identifies a tensor of `count` elements."""
    size = min(count, SAMPLE)
    return (count - size) // 2, size


def tag_of(tensor: torch.Tensor) -> str:
    """ "<dtype>:<hash>" of a whole tensor."""
    begin, size = sample_of(tensor.numel())
    return tag_of_sample(tensor.detach().reshape(-1)[begin : begin + size], tensor.dtype)


def tag_of_sample(values: torch.Tensor, dtype: torch.dtype) -> str:
    """The tag of a tensor of this dtype whose sample has these values."""
    held = values.to("cpu", dtype).contiguous()
    state = hashlib.blake2b(held.view(torch.uint8).numpy().tobytes(), digest_size=8)
    return f"{str(dtype).removeprefix('torch.')}:{state.hexdigest()}"


def foreign_weights(
    content: Mapping[str, Any], sample: Callable[[str], torch.Tensor | None]
) -> tuple[str, ...]:
    """Names of a model's tensors that have other values than when its statistics were collected.

    content: the header of the statistics. sample: the values of `sample_of` of a floating-point
        tensor of the model; None where it has none of that name, or no elements.
    """
    # A layer's own tensor, where the weight has another name first (tied ones) that the model does
    # not hold.
    layers = {
        layer["weight"]: f"{name}.weight"
        for name, layer in content.get("layers", {}).items()
        if "weight" in layer
    }
    found = []
    for name, tag in content.get("weights", {}).items():
        kind = tag.partition(":")[0]
        if kind not in _TAGGED:
            continue
        values = sample(name)
        if values is None and name in layers:
            values = sample(layers[name])
        if values is not None and tag_of_sample(values, torch_dtype(kind)) != tag:
            found.append(name)
    return tuple(found)
