"""The compiled kernels by themselves, held to the reference: for the tests of how they find thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ties_cases import same_bits

from pymerge.backends import native
from pymerge.reference import ties as reference

NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}
LEVELS = [level for level, usable in native.cpu_levels().items() if usable]
# From here on the thresholds are found while merging, and from here on where the output has 16 bits.
ONE_PASS, ONE_PASS_16_BIT = 1 << 18, 1 << 16


def buffer(tensor):
    return tensor.data_ptr(), NAMES[tensor.dtype]


def run(models, base, rule, *, threads=1, out=None, out_dtype=None):
    """(out, stats) of the kernels; out NaN-filled before."""
    like = models[0] if base is None else base
    if out is None:
        out = torch.full((like.numel(),), math.nan, dtype=out_dtype or like.dtype)
    stats = native.ties(
        [buffer(m) for m in models],
        None if base is None else buffer(base),
        buffer(out),
        out.numel(),
        rule,
        threads,
    )
    return out, stats


def expected(models, base, rule, out_dtype=None):
    like = models[0] if base is None else base
    out = torch.full((like.numel(),), math.nan, dtype=out_dtype or like.dtype)
    return out, reference.ties(models, base, rule, out)


def check(models, base, rule, *, threads=1, out_dtype=None):
    got, stats = run(models, base, rule, threads=threads, out_dtype=out_dtype)
    want, wanted = expected(models, base, rule, out_dtype)
    assert same_bits(got, want), f"{int((got != want).sum())} of {got.numel()} elements differ"
    assert repr(stats) == repr(wanted)  # NaN thresholds are equal in a repr
    return stats


def path(models, base, rule, threads=2):
    out = torch.empty_like(models[0] if base is None else base)
    return native.ties_path(
        [buffer(m) for m in models],
        None if base is None else buffer(base),
        buffer(out),
        out.numel(),
        rule,
        threads,
    )


# For what costs seconds and hardly asks about a level's own code: how thresholds are found.
best_level_first = pytest.mark.parametrize(
    "level",
    [LEVELS[-1], *(pytest.param(one, marks=pytest.mark.slow) for one in LEVELS[:-1])],
    indirect=True,
)


def sorted_threshold(model, base, rank):
    sizes = np.abs(model.float().numpy() - base.float().numpy())
    return float(np.partition(sizes, len(sizes) - rank)[len(sizes) - rank])


def atoms(n, shares, seed=0):
    """n magnitudes of which shares[j] are j + 1, shuffled, with random signs."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.repeat_interleave(torch.arange(1.0, len(shares) + 1), torch.tensor(shares))
    sizes = torch.cat([sizes, torch.zeros(n - len(sizes))])[torch.randperm(n, generator=g)]
    return sizes * torch.randint(0, 2, (n,), generator=g).mul(2).sub(1)
