"""What the tests of `gram` and of the methods on it share."""

from __future__ import annotations

import pytest
import torch

from pymerge.backends import registry


@pytest.fixture(params=["reference", "cpu", "triton", "emulated"])
def backend(request: pytest.FixtureRequest) -> str:
    """Where there is no GPU, "cuda" is emulated on the host, and "triton" interpreted."""
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
        return "cuda"
    reason = registry.why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    if not registry.serves(request.param, "cpu"):
        pytest.skip(f"{request.param} takes no tensors on the CPU; TRITON_INTERPRET=1 lets it")
    return request.param


def draw(shape, count, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count + 1)]
    base = made[0]
    return [(base + spread * x).to(dtype) for x in made[1:]], base.to(dtype)
