"""The pass that reads every input once and writes the output: T1 to T6, with precomputed
thresholds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.triton_kernels._load import store
from pymerge.triton_kernels.ties._descriptors import AGAIN, HEADER, OUT, PER_MODEL, SIZE, ZERO_SIGN
from pymerge.triton_kernels.ties._rule import merge_block
from pymerge.triton_kernels.ties._select import chunk_of

# A slot of the counts: kept per model, non-finite per model, conflicts, S > 0, S < 0.
EXTRA = tl.constexpr(3)


@triton.jit
def merge_chunks(
    jobs, chunks, counts,
    TABLE: tl.constexpr, SLOTS: tl.constexpr, GATE: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, OD: tl.constexpr, WORK: tl.constexpr, ALIGNED: tl.constexpr,
    TRIM: tl.constexpr, RESCALE: tl.constexpr, ELECT: tl.constexpr, MERGE: tl.constexpr,
    MAJORITY: tl.constexpr, UNIT: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Merge one chunk of STEPS blocks of a job.

    FAST: whole blocks are first merged without masks and without a look at NaN; where a chunk turns
    out to hold one, it is merged again with care, as the unfinished last block is. GATE: the word
    of the job's row that must be set for anything to happen, or -1. counts: (jobs, SLOTS, 2 K + 3)
    int64, zeroed; slots spread the atomic additions. Bytes moved: K + 1 reads and one write.
    """
    index, chunk = chunk_of(chunks, TABLE)
    job = jobs + index * (HEADER + PER_MODEL * K)
    if GATE >= 0:
        if tl.load(job + GATE) == 0:
            return
    first = chunk * (BLOCK * STEPS)
    last = tl.minimum(first + BLOCK * STEPS, tl.load(job + SIZE))
    if last <= first:
        return
    out = tl.load(job + OUT)
    kept_counts = counts + (index * SLOTS + chunk % SLOTS) * (2 * K + EXTRA)
    bad_counts = kept_counts + K
    lanes = tl.arange(0, BLOCK)
    packed = tl.zeros([BLOCK], tl.int32)
    events = tl.zeros([BLOCK], tl.int32)
    slow_from = first
    if FAST:
        whole = first + (last - first) // BLOCK * BLOCK
        slow_from = whole
        for start in range(first, whole, BLOCK):
            result, kept, event, _, poison = merge_block(
                job, job, kept_counts, bad_counts, start, lanes, None, K, XD, BD, WORK, ALIGNED, TRIM, RESCALE, ELECT,
                MERGE, MAJORITY, UNIT, False, False, COUNT, False, BLOCK,
            )  # fmt: skip
            store(out, start, lanes, result, None, OD, WORK, ALIGNED, False)
            packed += kept
            events = (events + event) | (poison << 30)  # above the three counts
        if tl.max(events) >= (1 << 30):
            slow_from = first
            packed = packed * 0
            events = events * 0
            if COUNT and K > 8:  # of so many models the counts have gone to memory: take them back
                for start in range(first, whole, BLOCK):
                    merge_block(
                        job, job, kept_counts, bad_counts, start, lanes, None, K, XD, BD, WORK, ALIGNED, TRIM, RESCALE, ELECT,
                        MERGE, MAJORITY, UNIT, False, False, -1, False, BLOCK,
                    )  # fmt: skip
    for start in range(slow_from, last, BLOCK):
        mask = lanes < tl.minimum(last - start, BLOCK).to(tl.int32)
        result, kept, event, _, _ = merge_block(
            job, job, kept_counts, bad_counts, start, lanes, mask, K, XD, BD, WORK, ALIGNED, TRIM, RESCALE, ELECT,
            MERGE, MAJORITY, UNIT, True, True, COUNT, False, BLOCK,
        )  # fmt: skip
        store(
            out,
            start,
            lanes,
            result,
            lanes < tl.minimum(last - start, BLOCK).to(tl.int32),
            OD,
            WORK,
            ALIGNED,
            True,
        )
        packed += kept
        events += event
    if COUNT:
        add_counts(kept_counts, packed, events, K)


@triton.jit
def add_counts(row, packed, events, K: tl.constexpr):
    """Add the counts of merge_block, over up to 15 blocks, to a slot."""
    if K <= 8:
        for k in tl.static_range(K):
            kept = tl.sum((packed >> (4 * k)) & 15)
            tl.atomic_add(row + k, kept.to(tl.int64), sem="relaxed")
    for field in tl.static_range(3):
        seen = tl.sum((events >> (10 * field)) & 0x3FF)
        tl.atomic_add(row + 2 * K + field, seen.to(tl.int64), sem="relaxed")


@triton.jit
def decide_zero_sign(jobs, counts, SLOTS: tl.constexpr, K: tl.constexpr):
    """T4 `majority`: the pass assumed +. Where that is wrong, set the sign and request another
    pass.
    """
    index = tl.program_id(0).to(tl.int64)
    job = jobs + index * (HEADER + PER_MODEL * K)
    slots = tl.arange(0, SLOTS)
    row = counts + (index * SLOTS + slots) * (2 * K + EXTRA) + 2 * K
    positive = tl.sum(tl.load(row + 1))
    negative = tl.sum(tl.load(row + 2))
    if positive <= negative:
        minus = positive * 0 - 1
        tl.store(job + ZERO_SIGN, minus)
        tl.store(job + AGAIN, minus * minus)
