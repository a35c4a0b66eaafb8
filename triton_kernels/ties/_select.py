"""Exact order statistics of task vectors, found on the device (T3, N1).

A magnitude's bits, read as an integer, order as the magnitude does. A small tensor is searched bit
by bit in registers. A large one is read once a digit of 10 or 11 bits: each pass counts the
elements whose higher digits are those found so far, and every program of the next pass walks down
the histograms again, so nothing is launched between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.triton_kernels._load import load
from pymerge.triton_kernels.ties._descriptors import (
    BASE,
    HEADER,
    LOWER,
    PER_MODEL,
    RANK,
    SIZE,
)
from pymerge.triton_kernels.ties._rule import task_vector

BINS = tl.constexpr(2048)  # of one digit


@triton.jit
def chunk_of(chunks, TABLE: tl.constexpr):
    """(job, chunk) of this program: from the chunk table, or chunk pid of the only job."""
    pid = tl.program_id(0).to(tl.int64)
    if TABLE:
        entry = tl.load(chunks + pid)
        return entry >> 40, entry & 0xFFFFFFFFFF
    else:
        return pid * 0, pid


@triton.jit
def keys_of(delta, WORK: tl.constexpr):
    """N1: the magnitude's bits as an integer, 0 for NaN."""
    if WORK == 64:
        key = delta.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(delta != delta, 0, key)


@triton.jit
def load_keys(
    job, k, start, lanes, mask,
    XD: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Magnitude keys of model k."""
    if BD >= 0:
        base = load(tl.load(job + BASE), 0, start, lanes, mask, BD, WORK, ALIGNED, MASKED)
        delta = task_vector(job, k, base, start, lanes, mask, XD, BD, WORK, ALIGNED, MASKED)
    else:
        delta = task_vector(job, k, 0, start, lanes, mask, XD, BD, WORK, ALIGNED, MASKED)
    return keys_of(delta, WORK)


@triton.jit
def store_threshold(job, k, target, key, WORK: tl.constexpr):
    """Write a key as the lower (target 0) or upper (1) threshold; its bits are the number's."""
    tl.store(job + HEADER + PER_MODEL * k + LOWER + target, key.to(tl.int64))


@triton.jit
def select_small(
    jobs, K: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, ALIGNED: tl.constexpr, TARGETS: tl.constexpr,
    LENGTH: tl.constexpr,
):  # fmt: skip
    """One program per (job, model, target) of at most LENGTH elements: the threshold, bit by
    bit.
    """
    k = tl.program_id(1) // TARGETS
    target = tl.program_id(1) % TARGETS
    job = jobs + tl.program_id(0).to(tl.int64) * (HEADER + PER_MODEL * K)
    rank = tl.load(job + HEADER + PER_MODEL * k + RANK + target)
    if rank == 0:
        return
    lanes = tl.arange(0, LENGTH)
    size = tl.load(job + SIZE)
    mask = lanes < size.to(tl.int32)
    key = load_keys(job, k, size * 0, lanes, mask, XD, BD, WORK, ALIGNED, True)
    key = tl.where(mask, key, -1)
    found = tl.max(key) * 0
    for i in range(WORK - 1):
        tried = found | ((found * 0 + 1) << (WORK - 2 - i))
        enough = tl.sum((key >= tried).to(tl.int32)) >= rank
        found = tl.where(enough, tried, found)
    store_threshold(job, k, target, found, WORK)


@triton.jit
def walk_down(hist, rank, LEVELS: tl.constexpr, WORK: tl.constexpr):
    """(the first LEVELS digits of the rank-th largest key as a number, its rank among the keys with
    these digits).
    """
    bins = tl.arange(0, BINS)
    prefix = rank * 0
    for level in tl.static_range(LEVELS):
        count = tl.load(hist + level * BINS + bins)
        at_least = tl.sum(count) - tl.cumsum(count) + count
        digit = tl.max(tl.where(at_least >= rank, bins, 0))
        rank -= tl.sum(tl.where(bins > digit, count, 0))
        # Digits of 11, 10 and 10 bits of 31, or three of 11 and three of 10 of 63.
        if WORK == 64 and level <= 2:
            prefix = (prefix << 11) | digit
        else:
            prefix = (prefix << 10) | digit
    return prefix, rank


@triton.jit
def _count_block(
    job, k, prefix, start, lanes, mask,
    XD: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, ALIGNED: tl.constexpr, LEVEL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys of a block that share the prefix to the histogram of digit LEVEL. mask: all true
    without MASKED.
    """
    if WORK == 64:
        shift: tl.constexpr = 52 - 11 * LEVEL if LEVEL <= 2 else 50 - 10 * LEVEL
        width: tl.constexpr = 11 if LEVEL <= 2 else 10
    else:
        shift: tl.constexpr = 20 - 10 * LEVEL
        width: tl.constexpr = 10
    key = load_keys(job, k, start, lanes, mask, XD, BD, WORK, ALIGNED, MASKED)
    if LEVEL == 0:
        digit = (key >> shift).to(tl.int32)
    else:
        mask = mask & ((key >> (shift + width)) == prefix)
        digit = ((key >> shift) & ((1 << width) - 1)).to(tl.int32)
    return tl.histogram(tl.where(mask, digit, 0), BINS, mask)


@triton.jit
def count_digits(
    jobs, chunks, hist,
    LEVELS: tl.constexpr, TABLE: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, ALIGNED: tl.constexpr, TARGETS: tl.constexpr,
    LEVEL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One pass of the radix selection: adds a chunk's histogram of digit LEVEL to that of its (job,
    model, target).

    hist: (jobs, K * TARGETS, LEVELS, BINS) int32, or int64 where there may be 2^31 elements;
    zeroed. SHARED: all jobs are segments of one vector, one histogram. GATE: as in merge_chunks.
    Bytes read: the model and the base once.
    """
    index, chunk = chunk_of(chunks, TABLE)
    column = tl.program_id(1)
    k = column // TARGETS
    job = jobs + index * (HEADER + PER_MODEL * K)
    rank = tl.load(job + HEADER + PER_MODEL * k + RANK + column % TARGETS)
    if rank == 0:
        return
    if GATE >= 0:
        if tl.load(job + GATE) == 0:
            return
    if SHARED:
        index = index * 0
    hist += (index * (K * TARGETS) + column) * (LEVELS * BINS)
    prefix, _ = walk_down(hist, rank, LEVEL, WORK)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, tl.load(job + SIZE))
    bins = tl.arange(0, BINS)
    lanes = tl.arange(0, BLOCK)
    counted = tl.zeros([BINS], tl.int32)
    # Whole blocks without a mask, which would split their loads into single elements.
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        counted += _count_block(
            job, k, prefix, start, lanes, lanes >= 0, XD, BD, WORK, ALIGNED, LEVEL, False
        )
    for start in range(whole, last, BLOCK):
        mask = lanes < (last - start).to(tl.int32)
        counted += _count_block(
            job, k, prefix, start, lanes, mask, XD, BD, WORK, ALIGNED, LEVEL, True
        )
    counted = counted.to(hist.dtype.element_ty)
    tl.atomic_add(hist + LEVEL * BINS + bins, counted, mask=counted > 0, sem="relaxed")


@triton.jit
def take_threshold(
    jobs, hist,
    LEVELS: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, WORK: tl.constexpr, TARGETS: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """One program per (model and target, job), after the last pass: writes the threshold to the
    job's row.
    """
    column = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    job = jobs + index * (HEADER + PER_MODEL * K)
    rank = tl.load(job + HEADER + PER_MODEL * (column // TARGETS) + RANK + column % TARGETS)
    if rank == 0:
        return
    if GATE >= 0:
        if tl.load(job + GATE) == 0:
            return
    if SHARED:
        index = index * 0
    hist += (index * (K * TARGETS) + column) * (LEVELS * BINS)
    key, _ = walk_down(hist, rank, LEVELS, WORK)
    store_threshold(job, column // TARGETS, column % TARGETS, key, WORK)
