"""Threshold and merge in one pass: bracket each threshold from a sample, merge with the estimate
while recording the elements within the brackets, then find the exact thresholds among them and fix
up the few outputs that were wrong.

The counts prove the brackets. A bracket that missed, a full record buffer or a NaN sets the job's
MISSED word, and the passes that follow in the stream (count_digits, merge_chunks), which otherwise
return at once, do the merge afresh. The host never waits to know. The order in which programs
append records shows in no result.

For binary32 work, trim by magnitude and K <= 8. A record is 32 bits: element within its chunk of up
to 8192 (13 bits), model (3), level (11), and whether several models have the element in their
brackets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.triton_kernels._load import load, store
from pymerge.triton_kernels.ties._descriptors import (
    BASE,
    FOUND,
    HEADER,
    LEAST,
    LEVEL,
    LISTED,
    LOW,
    LOWER,
    MIDDLE,
    MISSED,
    MOST,
    OUT,
    PER_BRACKET,
    PER_MODEL,
    RANK,
    REST,
    SHIFT,
    SIZE,
    TOP,
    UPPER_RANK,
)
from pymerge.triton_kernels.ties._merge import EXTRA, add_counts
from pymerge.triton_kernels.ties._rule import in_bracket, merge_block, task_vector
from pymerge.triton_kernels.ties._select import BINS, load_keys, walk_down

LANES = tl.constexpr(128)  # records worked on at once
FINALISTS = tl.constexpr(4096)  # keys of the threshold's level that are searched in registers


# Integers are not specialised: else each size of tensor would be compiled anew.
@triton.jit(do_not_specialize=["units", "unit_stride"])
def sample_digits(
    sample_row, hist, units, unit_stride,
    K: tl.constexpr, XD: tl.constexpr, BD: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """count_digits over a sample: units of 32 elements, one at a hashed place in each stretch of
    unit_stride of them.

    sample_row: a row like the job's whose RANK and UPPER_RANK are those, within the sample, of the
        bracket's low and high end.
    hist: (K, 2, 3, BINS) int32, zeroed.
    """
    k = tl.program_id(1)
    ranks = sample_row + HEADER + PER_MODEL * k
    low_rank = tl.load(ranks + RANK)
    top_rank = tl.load(ranks + UPPER_RANK)
    if low_rank + top_rank == 0:
        return
    low_hist = hist + k * (2 * 3 * BINS)
    top_hist = low_hist + 3 * BINS
    low, _ = walk_down(low_hist, low_rank, LEVEL, 32)
    top, _ = walk_down(top_hist, top_rank, LEVEL, 32)
    bins = tl.arange(0, BINS)
    shift: tl.constexpr = 20 - 10 * LEVEL
    low_count = tl.zeros([BINS], tl.int32)
    top_count = tl.zeros([BINS], tl.int32)
    lanes = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * STEPS
    for step in range(STEPS):
        unit = (first + step) * (BLOCK // 32) + lanes // 32
        mask = unit < units
        hashed = unit.to(tl.int32) * -1640531535
        hashed = (hashed ^ (hashed >> 15)) & 0x7FFFFFFF
        place = (unit * unit_stride + hashed % unit_stride) * 32 + lanes % 32
        key = load_keys(sample_row, k, low_rank * 0, place, mask, XD, BD, 32, False, True)
        if LEVEL == 0:
            low_count += tl.histogram(tl.where(mask, key >> shift, 0), BINS, mask)
        else:
            digit = (key >> shift) & 1023
            above = key >> (shift + 10)
            low_count += tl.histogram(digit, BINS, mask & (above == low))
            top_count += tl.histogram(digit, BINS, mask & (above == top))
    if LEVEL == 0:
        top_count = low_count
    tl.atomic_add(low_hist + LEVEL * BINS + bins, low_count, mask=low_count > 0, sem="relaxed")
    tl.atomic_add(top_hist + LEVEL * BINS + bins, top_count, mask=top_count > 0, sem="relaxed")


@triton.jit
def take_bracket(job, sample_row, brackets, hist, K: tl.constexpr):
    """One program per model: its bracket, and the bracket's middle as the estimated threshold."""
    k = tl.program_id(0)
    model = job + HEADER + PER_MODEL * k
    bracket = brackets + PER_BRACKET * k
    tl.store(bracket + LOW, 1)
    tl.store(bracket + TOP, 0)
    tl.store(bracket + LISTED, 0)
    tl.store(bracket + REST, 0)
    tl.store(bracket + LEAST, 0x7FFFFFFF)
    tl.store(bracket + MOST, 0)
    if tl.load(model + RANK) == 0:
        return
    low_rank = tl.load(sample_row + HEADER + PER_MODEL * k + RANK)
    top_rank = tl.load(sample_row + HEADER + PER_MODEL * k + UPPER_RANK)
    hist += k * (2 * 3 * BINS)
    low = tl.zeros([], tl.int32)
    if low_rank > 0:
        key, _ = walk_down(hist, low_rank, 3, 32)
        low = key.to(tl.int32)
    top = low * 0 + 0x7F800000
    if top_rank > 0:
        key, _ = walk_down(hist + 3 * BINS, top_rank, 3, 32)
        top = key.to(tl.int32)
    shift = low * 0
    for _ in range(20):
        shift += (((top - low) >> shift) >= BINS).to(tl.int32)
    middle = ((top - low) >> shift) // 2
    estimate = low + (middle << shift)
    tl.store(bracket + LOW, low)
    tl.store(bracket + TOP, top)
    tl.store(bracket + SHIFT, shift)
    tl.store(bracket + MIDDLE, middle)
    tl.store(bracket + LISTED, (top > low).to(tl.int32))
    tl.store(model + LOWER, estimate.to(tl.int64))
    tl.store(sample_row + HEADER + PER_MODEL * k + LOWER, estimate.to(tl.int64))


@triton.jit
def _append(mine, listed, near, wanted, lanes, LISTS: tl.constexpr):
    """Append the lanes in the bracket of a wanted model to the program's list. Returns its new
    length.
    """
    hit = ((near & wanted) != 0).to(tl.int32)
    place = listed + tl.cumsum(hit) - hit
    tl.store(mine + place, lanes.to(tl.int16), mask=(hit != 0) & (place < LISTS))
    return listed + tl.sum(hit)


@triton.jit(do_not_specialize=["room"])
def merge_sampled(
    job, brackets, counts, nears, runs, records, room, used, levels, lists,
    SLOTS: tl.constexpr, K: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, OD: tl.constexpr, ALIGNED: tl.constexpr, RESCALE: tl.constexpr,
    ELECT: tl.constexpr, MERGE: tl.constexpr, MAJORITY: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """The pass over the inputs: merges with the estimated thresholds, counts, and records what lies
    in the brackets.

    nears: (SLOTS, K) int64, elements in each bracket. runs: per chunk, its first record << 16 |
        number of records.
    records: room words; used: how many are taken, one atomic addition a chunk. levels: (K, BINS)
    int32, keys in each level of the bracket. lists: LISTS 16-bit words per program, as many
    elements in brackets as a chunk may have.
    """
    size = tl.load(job + SIZE)
    out = tl.load(job + OUT)
    mine = lists + tl.program_id(0) * LISTS
    lanes = tl.arange(0, BLOCK)
    AT: tl.constexpr = 16 if K <= 4 else 0
    wanted = 0
    for k in tl.static_range(K):
        wanted += tl.load(brackets + PER_BRACKET * k + LISTED) << (4 * k + AT)
    chunks = tl.cdiv(size, BLOCK * STEPS)
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        first = chunk * (BLOCK * STEPS)
        last = tl.minimum(first + BLOCK * STEPS, size)
        packed = tl.zeros([BLOCK], tl.int32)
        events = tl.zeros([BLOCK], tl.int32)
        inside = tl.zeros([BLOCK], tl.int32)
        listed = 0
        whole = first + (last - first) // BLOCK * BLOCK
        for start in range(first, whole, BLOCK):
            result, kept, event, near, poison = merge_block(
                job, brackets, counts, counts, start, lanes, None, K, XD, BD, 32, ALIGNED, 1, RESCALE, ELECT,
                MERGE, MAJORITY, UNIT, False, False, False, True, BLOCK,
            )  # fmt: skip
            store(out, start, lanes, result, None, OD, 32, ALIGNED, False)
            listed = _append(
                mine, listed, near, wanted, lanes + (start - first).to(tl.int32), LISTS
            )
            packed += kept
            events = (events + event) | (poison << 30)
            if K > 4:
                inside += near
        for start in range(whole, last, BLOCK):
            mask = lanes < (last - start).to(tl.int32)
            result, kept, event, near, poison = merge_block(
                job, brackets, counts, counts, start, lanes, mask, K, XD, BD, 32, ALIGNED, 1, RESCALE, ELECT,
                MERGE, MAJORITY, UNIT, True, False, False, True, BLOCK,
            )  # fmt: skip
            store(out, start, lanes, result, mask, OD, 32, ALIGNED, True)
            listed = _append(
                mine, listed, near, wanted, lanes + (start - first).to(tl.int32), LISTS
            )
            packed += kept
            events = (events + event) | (poison << 30)
            if K > 4:
                inside += near
        slot = chunk % SLOTS
        if K <= 4:
            inside = packed >> 16
        add_counts(counts + slot * (2 * K + EXTRA), packed, events, K)
        for k in tl.static_range(K):
            tl.atomic_add(
                nears + slot * K + k, tl.sum((inside >> (4 * k)) & 15).to(tl.int64), sem="relaxed"
            )
        begin = 0
        if (listed > 0) & (listed <= LISTS):
            begin = tl.atomic_add(used, listed, sem="relaxed")
        if (tl.max(events) >= (1 << 30)) | (listed > LISTS) | (begin > room - listed):
            tl.store(job + MISSED, (size * 0) + 1)
            listed = 0
        tl.store(runs + chunk, (begin.to(tl.int64) << 16) | listed)
        # The list is read by other threads of this program than wrote it. A barrier orders their
        # reads and writes of global memory: on NVIDIA bar.sync does by its definition (PTX ISA); on
        # AMD the wavefronts of a work-group share one vector cache, which serves them in order.
        tl.debug_barrier()
        for done in range(0, listed, LANES):
            _record(
                job,
                brackets,
                mine + done,
                records + begin + done,
                levels,
                first,
                listed - done,
                K,
                XD,
                BD,
                ALIGNED,
            )
        tl.debug_barrier()  # before the next chunk's list overwrites this one


@triton.jit
def _record(
    job, brackets, mine, records, levels, first, count,
    K: tl.constexpr, XD: tl.constexpr, BD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Turn up to LANES list entries into records. Their elements were just read and are read again
    from cache.
    """
    rows = tl.arange(0, LANES)
    mask = rows < count
    lanes = tl.load(mine + rows, mask=mask, other=0).to(tl.int32)
    base = tl.zeros([LANES], tl.float32)
    if BD >= 0:
        base = load(tl.load(job + BASE), 0, first, lanes, mask, BD, 32, ALIGNED, True)
    record = lanes
    hits = tl.zeros([LANES], tl.int32)
    for k in range(K):
        bracket = brackets + PER_BRACKET * k
        delta = task_vector(job, k, base, first, lanes, mask, XD, BD, 32, ALIGNED, True)
        hit = mask & in_bracket(brackets, k, delta) & (lanes * 0 + tl.load(bracket + LISTED) != 0)
        key = delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        level = (key - tl.load(bracket + LOW)) >> tl.load(bracket + SHIFT)
        tl.atomic_add(levels + k * BINS + level, hit.to(tl.int32), mask=hit, sem="relaxed")
        record = tl.where(hit, lanes | (k << 13) | (level << 16), record)
        hits += hit.to(tl.int32)
    tl.store(records + rows, record | (tl.where(hits > 1, 1, 0) << 27), mask=mask)


@triton.jit
def prove_brackets(job, brackets, counts, nears, levels, SLOTS: tl.constexpr, K: tl.constexpr):
    """One program per model: whether the bracket holds the threshold, and in which level; the
    threshold itself where the bracket is a single key.
    """
    k = tl.program_id(0)
    model = job + HEADER + PER_MODEL * k
    bracket = brackets + PER_BRACKET * k
    rank = tl.load(model + RANK)
    tl.store(bracket + LEVEL, -1)
    if rank == 0:
        return
    slots = tl.arange(0, SLOTS)
    kept = tl.sum(tl.load(counts + slots * (2 * K + EXTRA) + k))
    inside = tl.sum(tl.load(nears + slots * K + k))
    low = tl.load(bracket + LOW)
    if (
        tl.load(bracket + LISTED) == 0
    ):  # one key, kept: the elements above it must be fewer than the rank
        if (kept - inside >= rank) | (kept < rank):
            tl.store(job + MISSED, rank * 0 + 1)
        return
    bins = tl.arange(0, BINS)
    count = tl.load(levels + k * BINS + bins).to(tl.int64)
    taken = tl.sum(tl.where(bins >= tl.load(bracket + MIDDLE), count, 0))
    rest = rank - (kept - taken)  # the threshold's rank within the bracket
    if (rest < 1) | (rest > inside):
        tl.store(job + MISSED, rank * 0 + 1)
        return
    level, rest = walk_down(levels + k * BINS, rest, 1, 32)
    tl.store(bracket + LEVEL, level.to(tl.int32))
    if tl.load(bracket + SHIFT) == 0:
        tl.store(model + LOWER, low.to(tl.int64) + level)
    else:
        tl.store(bracket + REST, rest.to(tl.int32))


@triton.jit
def gather_finalists(
    job, brackets, runs, records, finalists,
    K: tl.constexpr, XD: tl.constexpr, BD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per chunk: up to FINALISTS keys per model from the threshold's level, and the
    least and largest of them.
    """
    if tl.load(job + MISSED) != 0:
        return
    chunk = tl.program_id(0).to(tl.int64)
    run = tl.load(runs + chunk)
    begin = run >> 16
    count = (run & 0xFFFF).to(tl.int32)
    rows = tl.arange(0, LANES)
    for done in range(0, count, LANES):
        there = rows < count - done
        record = tl.load(records + begin + done + rows, mask=there, other=0)
        lanes = record & 0x1FFF
        for k in range(K):
            bracket = brackets + PER_BRACKET * k
            level = tl.load(bracket + LEVEL)
            low = tl.load(bracket + LOW)
            sole = (((record >> 13) & 7) == k) & (((record >> 16) & 0x7FF) == level)
            mask = (
                there & (sole | ((record >> 27) != 0)) & (lanes * 0 + tl.load(bracket + REST) != 0)
            )
            key = load_keys(job, k, chunk * CHUNK, lanes, mask, XD, BD, 32, ALIGNED, True)
            mask = mask & (key >= low) & (((key - low) >> tl.load(bracket + SHIFT)) == level)
            mine = mask.to(tl.int32)
            found = tl.sum(mine)
            if found > 0:
                place = (
                    tl.atomic_add(bracket + FOUND, found, sem="relaxed") + tl.cumsum(mine) - mine
                )
                tl.store(finalists + k * FINALISTS + place, key, mask=mask & (place < FINALISTS))
                tl.atomic_min(
                    bracket + LEAST, tl.min(tl.where(mask, key, 0x7FFFFFFF)), sem="relaxed"
                )
                tl.atomic_max(bracket + MOST, tl.max(tl.where(mask, key, 0)), sem="relaxed")


@triton.jit
def take_finalist(job, brackets, finalists):
    """One program per model: the exact threshold, bit by bit, among the keys of its level."""
    k = tl.program_id(0)
    bracket = brackets + PER_BRACKET * k
    rest = tl.load(bracket + REST)
    if rest == 0:
        return
    found = tl.load(bracket + FOUND)
    least = tl.load(bracket + LEAST)
    key = least
    if least != tl.load(bracket + MOST):
        if found > FINALISTS:
            tl.store(job + MISSED, tl.load(job + MISSED) * 0 + 1)
            return
        rows = tl.arange(0, FINALISTS)
        keys = tl.load(finalists + k * FINALISTS + rows, mask=rows < found, other=-1)
        key = least * 0
        for i in range(31):
            tried = key | (1 << (30 - i))
            enough = tl.sum((keys >= tried).to(tl.int32)) >= rest
            key = tl.where(enough, tried, key)
    tl.store(job + HEADER + PER_MODEL * k + LOWER, key.to(tl.int64))


@triton.jit
def fix_up(
    job, sample_row, brackets, counts, runs, records,
    SLOTS: tl.constexpr, K: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, OD: tl.constexpr, ALIGNED: tl.constexpr, RESCALE: tl.constexpr,
    ELECT: tl.constexpr, MERGE: tl.constexpr, MAJORITY: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per chunk: merge again, with the exact thresholds, the recorded elements that the
    estimate may have got wrong.

    Where a bracket missed, clears the counts instead, for the passes that follow.
    """
    chunk = tl.program_id(0).to(tl.int64)
    if tl.load(job + MISSED) != 0:
        fields = tl.arange(0, 32)
        for slot in range(tl.program_id(0), SLOTS, tl.num_programs(0)):
            row = counts + slot * (2 * K + EXTRA)
            tl.store(row + fields, tl.zeros([32], tl.int64), mask=fields < 2 * K + EXTRA)
        return
    run = tl.load(runs + chunk)
    begin = run >> 16
    count = (run & 0xFFFF).to(tl.int32)
    first = chunk * CHUNK
    rows = tl.arange(0, LANES)
    row = counts + (chunk % SLOTS) * (2 * K + EXTRA)
    out = tl.load(job + OUT)
    for done in range(0, count, LANES):
        there = rows < count - done
        record = tl.load(records + begin + done + rows, mask=there, other=0)
        k = (record >> 13) & 7
        level = (record >> 16) & 0x7FF
        middle = tl.load(brackets + PER_BRACKET * k + MIDDLE, mask=there, other=0)
        exact = tl.load(brackets + PER_BRACKET * k + LEVEL, mask=there, other=0)
        between = (level >= tl.minimum(middle, exact)) & (level <= tl.maximum(middle, exact))
        mask = there & (between | ((record >> 27) != 0))
        if tl.max(mask.to(tl.int32)) > 0:
            lanes = record & 0x1FFF
            _, kept, event, _, _ = merge_block(
                sample_row, brackets, counts, counts, first, lanes, mask, K, XD, BD, 32, ALIGNED, 1, RESCALE, ELECT,
                MERGE, MAJORITY, UNIT, True, False, False, False, LANES,
            )  # fmt: skip
            result, new_kept, new_event, _, _ = merge_block(
                job, brackets, counts, counts, first, lanes, mask, K, XD, BD, 32, ALIGNED, 1, RESCALE, ELECT,
                MERGE, MAJORITY, UNIT, True, False, False, False, LANES,
            )  # fmt: skip
            store(out, first, lanes, result, mask, OD, 32, ALIGNED, True)
            for model in tl.static_range(K):
                gained = tl.sum(((new_kept >> (4 * model)) & 1) - ((kept >> (4 * model)) & 1))
                tl.atomic_add(row + model, gained.to(tl.int64), sem="relaxed")
            for field in tl.static_range(3):
                gained = tl.sum(((new_event >> (10 * field)) & 1) - ((event >> (10 * field)) & 1))
                tl.atomic_add(row + 2 * K + field, gained.to(tl.int64), sem="relaxed")
