"""Job descriptors: a table in device memory with a row of 64-bit words for each tensor to merge.

Kernels read addresses, options and thresholds from it, and write what they find (thresholds, norms'
factors, the majority sign) back into it, so that nothing of a merge passes through the host.
Numbers are stored as their bits in the working precision.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from pymerge.dtypes import KERNEL_CODES, torch_dtype
from pymerge.rules.ties import TiesRule, random_cutoff
from pymerge.triton_kernels._launch import launch

OUT = tl.constexpr(0)
BASE = tl.constexpr(1)
SIZE = tl.constexpr(2)
KEY = tl.constexpr(3)  # T8
SCALING = tl.constexpr(4)
DIVISOR = tl.constexpr(5)  # T5, weighted mean without an election
ZERO_SIGN = tl.constexpr(6)  # +1 or -1
AGAIN = tl.constexpr(7)  # 1: merge once more, the zero sign assumed was wrong
MISSED = tl.constexpr(8)  # 1: a bracket missed, select by counting and merge again
FIRST = tl.constexpr(9)  # T8: index in the tensor of the first element, where this is a part
HEADER = tl.constexpr(10)
# Per model, after the header:
ADDRESS = tl.constexpr(0)
CODE = tl.constexpr(1)  # dtype
WEIGHT = tl.constexpr(2)
ELECT_WEIGHT = tl.constexpr(3)
DENSITY = tl.constexpr(4)  # the divisor of rescale "density"; 1 where nothing is rescaled
CUTOFF = tl.constexpr(5)
RANK = tl.constexpr(6)  # of the lower threshold; 0 where LOWER is known
UPPER_RANK = tl.constexpr(7)  # of the upper one; 0 where UPPER is known
LOWER = tl.constexpr(8)
UPPER = tl.constexpr(9)
FACTOR = tl.constexpr(10)  # of rescale by a norm
FACTORED = tl.constexpr(11)  # 1 where FACTOR is to be found
PER_MODEL = tl.constexpr(12)

# A model's bracket, in a table of 32-bit words: magnitude keys between which its threshold should
# lie.
LOW = tl.constexpr(0)
TOP = tl.constexpr(1)  # inclusive; below LOW where there is nothing to find
SHIFT = tl.constexpr(2)  # a level is 2^SHIFT keys
MIDDLE = tl.constexpr(3)  # the level from which on elements were taken for kept
LISTED = tl.constexpr(4)  # 1: elements in the bracket are recorded; 0: the bracket is a single key
LEVEL = tl.constexpr(5)  # that of the threshold, once known
REST = tl.constexpr(6)  # the threshold's rank among the keys of its level; 0: known
FOUND = tl.constexpr(7)  # number of keys gathered from that level
LEAST = tl.constexpr(8)  # of those
MOST = tl.constexpr(9)
PER_BRACKET = tl.constexpr(10)

CODES = {torch_dtype(name): code for name, code in KERNEL_CODES.items()}
_POKED = 64  # words that one launch carries


@dataclass(frozen=True)
class Job:
    """One tensor to merge: contiguous, on one device, n > 0. `keep` holds copies that must outlive
    the launch.
    """

    models: tuple[torch.Tensor, ...]
    base: torch.Tensor | None
    out: torch.Tensor | None
    rule: TiesRule
    work: int


def bits(value: float, work: int) -> int:
    """A number's bits, rounded once to the working precision."""
    if work == 64:
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    return int(struct.unpack("<i", struct.pack("<f", single(value)))[0])


def single(value: float) -> float:
    """Rounded to binary32; too large a number becomes infinity (struct would raise)."""
    return float(ctypes.c_float(value).value)


def unbits(word: int, work: int) -> float:
    """The inverse of `bits`."""
    if work == 64:
        return float(struct.unpack("<d", struct.pack("<q", word))[0])
    return float(struct.unpack("<f", struct.pack("<i", word))[0])


def row(job: Job, total: int | None = None) -> list[int]:
    """A job's words. total: the number of elements that ranks refer to, if not the job's own."""
    rule, work = job.rule, job.work
    n = job.models[0].numel()
    total = n if total is None else total
    factors = rule.factors
    words = [
        0 if job.out is None else job.out.data_ptr(),
        0 if job.base is None else job.base.data_ptr(),
        n,
        rule.key - (1 << 64) if rule.key >> 63 else rule.key,
        bits(rule.scaling, work),
        bits(_divisor(rule.weights, work), work),
        -1 if rule.majority < 0 else 1,
        0,
        0,
        rule.first,
    ]
    for k, model in enumerate(job.models):
        density = rule.densities[k]
        rescaled = rule.rescale != "none" and 0 < density < 1
        lower_rank, lower = _threshold(rule, k, total)
        upper_rank, upper = _bound(rule, k)
        words += [
            model.data_ptr(),
            CODES[model.dtype],
            bits(rule.weights[k], work),
            bits(rule.elect_weights[k], work),
            bits(density if rescaled and rule.rescale == "density" else 1.0, work),
            random_cutoff(density),
            lower_rank,
            upper_rank,
            bits(lower, work),
            bits(upper, work),
            bits(1.0 if factors is None or not rescaled else factors[k], work),
            int(rescaled and rule.rescale != "density" and factors is None),
        ]
    return words


def _threshold(rule: TiesRule, k: int, total: int) -> tuple[int, float]:
    """(rank to select or 0, threshold if none is to be selected) of T3."""
    if rule.trim not in ("magnitude", "outliers"):
        return 0, 0.0
    if rule.thresholds is not None:
        return 0, rule.thresholds[k]
    rank = rule.ranks[k]
    if rank <= 0 or total == 0:
        return 0, float("nan")
    return (0, 0.0) if rank >= total else (rank, 0.0)


def _bound(rule: TiesRule, k: int) -> tuple[int, float]:
    if rule.trim != "outliers" or rule.dropped[k] <= 0:
        return 0, float("inf")
    if rule.bounds is not None:
        return 0, rule.bounds[k]
    return rule.dropped[k] + 1, float("inf")


def _divisor(weights: Sequence[float], work: int) -> float:
    """T5: the sum of all weights in model order, rounded after each addition; 1 if it vanishes."""
    total = 0.0
    for weight in weights:
        total = total + weight if work == 64 else single(total + single(weight))
    tiny = 1e-8 if work == 64 else single(1e-8)
    return 1.0 if abs(total) < tiny else total


def upload(words: Sequence[int], device: torch.device) -> torch.Tensor:
    """The words on the device, without waiting for it.

    While a CUDA graph is being captured they travel as kernel arguments, which the graph keeps; a
    copy would read host memory again at every replay.
    """
    if device.type == "cpu":
        return torch.tensor(words, dtype=torch.int64)
    if not torch.cuda.is_current_stream_capturing():
        _load_poke(device)
        staged = torch.tensor(words, dtype=torch.int64, pin_memory=True)
        return staged.to(device, non_blocking=True)
    return poke(words, device)


@lru_cache
def _load_poke(device: torch.device) -> None:
    """Load the kernel of `poke`: that is impossible during the capture of a graph, which is when it
    is first used.
    """
    poke([0], device)


def poke(words: Sequence[int], device: torch.device) -> torch.Tensor:
    """`upload` by kernel arguments."""
    padded = [*words, *([0] * (-len(words) % _POKED))]
    table = torch.empty(len(padded), dtype=torch.int64, device=device)
    for first in range(0, len(padded), _POKED):
        launch(_poke, (1,), device, table, first, *padded[first : first + _POKED], num_warps=1)
    return table


@triton.jit
def _store_eight(here, a, b, c, d, e, f, g, h):
    tl.store(here + 0, a)
    tl.store(here + 1, b)
    tl.store(here + 2, c)
    tl.store(here + 3, d)
    tl.store(here + 4, e)
    tl.store(here + 5, f)
    tl.store(here + 6, g)
    tl.store(here + 7, h)


@triton.jit(do_not_specialize=["first", *(f"w{i}" for i in range(_POKED))])
def _poke(
    table, first,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64, w6: tl.int64, w7: tl.int64,
    w8: tl.int64, w9: tl.int64, w10: tl.int64, w11: tl.int64, w12: tl.int64, w13: tl.int64, w14: tl.int64, w15: tl.int64,
    w16: tl.int64, w17: tl.int64, w18: tl.int64, w19: tl.int64, w20: tl.int64, w21: tl.int64, w22: tl.int64, w23: tl.int64,
    w24: tl.int64, w25: tl.int64, w26: tl.int64, w27: tl.int64, w28: tl.int64, w29: tl.int64, w30: tl.int64, w31: tl.int64,
    w32: tl.int64, w33: tl.int64, w34: tl.int64, w35: tl.int64, w36: tl.int64, w37: tl.int64, w38: tl.int64, w39: tl.int64,
    w40: tl.int64, w41: tl.int64, w42: tl.int64, w43: tl.int64, w44: tl.int64, w45: tl.int64, w46: tl.int64, w47: tl.int64,
    w48: tl.int64, w49: tl.int64, w50: tl.int64, w51: tl.int64, w52: tl.int64, w53: tl.int64, w54: tl.int64, w55: tl.int64,
    w56: tl.int64, w57: tl.int64, w58: tl.int64, w59: tl.int64, w60: tl.int64, w61: tl.int64, w62: tl.int64, w63: tl.int64,
):  # fmt: skip
    """table[first : first + 64] = the words."""
    here = table + first
    _store_eight(here + 0, w0, w1, w2, w3, w4, w5, w6, w7)
    _store_eight(here + 8, w8, w9, w10, w11, w12, w13, w14, w15)
    _store_eight(here + 16, w16, w17, w18, w19, w20, w21, w22, w23)
    _store_eight(here + 24, w24, w25, w26, w27, w28, w29, w30, w31)
    _store_eight(here + 32, w32, w33, w34, w35, w36, w37, w38, w39)
    _store_eight(here + 40, w40, w41, w42, w43, w44, w45, w46, w47)
    _store_eight(here + 48, w48, w49, w50, w51, w52, w53, w54, w55)
    _store_eight(here + 56, w56, w57, w58, w59, w60, w61, w62, w63)
