"""By what a weight is known again: a hash of a few of its elements (rule S14)."""

from __future__ import annotations

import hashlib

import torch

# Elements from the middle of the tensor, one after the other, so that a file gives them with one
# read.
SAMPLE = 256


def sample_of(count: int) -> tuple[int, int]:
    """First element and number of elements that the tag of a tensor of `count` elements is made
    of.
    """
    size = min(count, SAMPLE)
    return (count - size) // 2, size


def tag_of(tensor: torch.Tensor) -> str:
    """ "<dtype>:<hash>" of a whole tensor."""
    begin, size = sample_of(tensor.numel())
    return tag_of_sample(tensor.detach().reshape(-1)[begin : begin + size], tensor.dtype)


def tag_of_sample(values: torch.Tensor, dtype: torch.dtype) -> str:
    """The tag of the tensor in `dtype` whose sample has these values."""
    held = values.to("cpu", dtype).contiguous()
    state = hashlib.blake2b(held.view(torch.uint8).numpy().tobytes(), digest_size=8)
    return f"{str(dtype).removeprefix('torch.')}:{state.hexdigest()}"
