"""Memory for results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge.ops.memory import new_result

SMAPS = Path("/proc/self/smaps")
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def is_asked_for_in_huge_pages(address: int) -> bool:
    """Whether the mapping around an address has the advice (`hg` of its flags)."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("there is no mapping at that address")


@pytest.mark.skipif(
    not (SMAPS.exists() and SWITCH.exists()), reason="no huge pages by request here"
)
def test_large_results_are_asked_for_in_huge_pages():
    models = [torch.ones(5, 1 << 20), torch.zeros(5, 1 << 20)]
    results = [
        pymerge.ties(models),
        pymerge.ties([{"x": x} for x in models])["x"],
        pymerge.merge([{"x": x} for x in models], method="linear")["x"],
        pymerge.slerp(models, t=0.5),
        pymerge.combine(models, [0.5, 0.5]),
        new_result((5, 1 << 20), torch.bfloat16, torch.device("cpu")),
    ]
    for place, made in enumerate(results):
        assert is_asked_for_in_huge_pages(made.data_ptr() + made.nbytes // 2), place


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1 << 20, 0), ((1 << 21) + 1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_have_the_shape_that_was_asked_for(shape, dtype):
    made = new_result(shape, dtype, torch.device("cpu")).fill_(1)
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    assert made.sum(dtype=torch.float64) == made.numel()


def test_results_without_memory_are_left_alone():
    assert new_result((1 << 24,), torch.float32, torch.device("meta")).is_meta
