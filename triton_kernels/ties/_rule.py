"""T1 to T6 and N2 of docs/spec/ties.md for a block of elements, in one pass over the models that
keeps none of them.

T5 sums over the models that agree with the elected sign. Both candidates are summed, and the
election chooses between them at the end: the same additions in the same order, hence the same bits,
and a number of registers that does not grow with K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.triton_kernels._load import load, number
from pymerge.triton_kernels.ties._descriptors import (
    ADDRESS,
    BASE,
    CODE,
    CUTOFF,
    DENSITY,
    DIVISOR,
    ELECT_WEIGHT,
    FACTOR,
    FIRST,
    HEADER,
    KEY,
    LOW,
    LOWER,
    PER_BRACKET,
    PER_MODEL,
    SCALING,
    TOP,
    UPPER,
    WEIGHT,
    ZERO_SIGN,
)


@triton.jit
def random_words(job, k, start, BLOCK: tl.constexpr):
    """T8: the words of elements start .. start + BLOCK of model k (from 0). start: a multiple of
    4.
    """
    group = (tl.load(job + FIRST) + start) // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    model = zero + k.to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(job + KEY), low, high, model, zero)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def task_vector(
    job,
    k,
    base,
    start,
    lanes,
    mask,
    XD: tl.constexpr,
    BD: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """T1."""
    model = job + HEADER + PER_MODEL * k
    code = 0
    if XD == 4:
        code = tl.load(model + CODE)
    x = load(tl.load(model + ADDRESS), code, start, lanes, mask, XD, WORK, ALIGNED, MASKED)
    if BD >= 0:
        return x - base
    else:
        return x


@triton.jit
def keeps(
    job,
    k,
    delta,
    start,
    TRIM: tl.constexpr,
    WORK: tl.constexpr,
    SLOW_PATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """T3 and N1: which elements are kept. Without SLOW_PATH a NaN gives an unspecified answer."""
    model = job + HEADER + PER_MODEL * k
    if TRIM == 0:
        return tl.full([BLOCK], 1, tl.int1)
    elif TRIM == 3:
        words = random_words(job, k, start, BLOCK)
        return words.to(tl.int64) < tl.load(model + CUTOFF)
    else:
        size = tl.abs(delta)
        if SLOW_PATH:
            size = tl.where(delta != delta, 0.0, size)
        kept = size >= number(model, LOWER, WORK)
        if TRIM == 2:
            kept = kept & (size <= number(model, UPPER, WORK))
        return kept


@triton.jit
def in_bracket(brackets, k, delta):
    """Whether a binary32 magnitude is in model k's bracket; magnitudes compare as their bits do."""
    key = delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bracket = brackets + PER_BRACKET * k
    return (key >= tl.load(bracket + LOW)) & (key <= tl.load(bracket + TOP))


@triton.jit
def merge_block(
    job,
    brackets,
    kept_counts,
    bad_counts,
    start,
    lanes,
    mask,
    K: tl.constexpr,
    XD: tl.constexpr,
    BD: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRIM: tl.constexpr,
    RESCALE: tl.constexpr,
    ELECT: tl.constexpr,
    MERGE: tl.constexpr,
    MAJORITY: tl.constexpr,
    UNIT: tl.constexpr,
    MASKED: tl.constexpr,
    SLOW_PATH: tl.constexpr,
    COUNT: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the elements start + lanes of a job; without MASKED all are there.

    SLOW_PATH applies N1 and N2 and adds to bad_counts; without it the outcome holds only where
    `bad` is 0. UNIT: all weights and election weights are 1.

    Returns (result, packed, events, near, bad): packed has four bits per model, 1 where it keeps
    the element (for K > 8 the counts go to kept_counts at once); events has bit 0 for a conflict,
    with MAJORITY 10 for S > 0 and 20 for S < 0; with SAMPLED, near has four bits per model, 1 where
    its magnitude lies within the model's bracket; for K <= 4 near and packed are one word, with
    near's bits in its upper half (registers).
    """
    if WORK == 64:
        zero = tl.zeros([BLOCK], tl.float64)
    else:
        zero = tl.zeros([BLOCK], tl.float32)
    base = zero
    if BD >= 0:
        base = load(tl.load(job + BASE), 0, start, lanes, mask, BD, WORK, ALIGNED, MASKED)
    total = zero  # S of T4
    plus = zero  # the sums of T5 over v > 0 (without an election: over all that are kept), and over v < 0
    minus = zero
    plus_weights = zero
    minus_weights = zero
    # Number of v > 0; 2^12 times the number of v < 0; bit 24: without SLOW_PATH, not finite.
    signs = tl.zeros([BLOCK], tl.int32)
    taking = tl.zeros([BLOCK], tl.int32)  # without an election: models with a kept nonzero element
    packed = tl.zeros([BLOCK], tl.int32)
    near = tl.zeros([BLOCK], tl.int32)
    poison = tl.zeros(
        [BLOCK], tl.int32
    )  # with SLOW_PATH: 1 NaN, 2 kept +infinity, 4 kept -infinity
    # Four models at a time, so that their loads are under way at once; what is rare is small
    # instead.
    if SLOW_PATH or MASKED:
        for k in range(K):
            total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison = _add_model(
                job, k, brackets, kept_counts, bad_counts, start, base, lanes, mask,
                total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison,
                K, XD, BD, WORK, ALIGNED, TRIM, RESCALE, ELECT, MERGE, UNIT, MASKED, SLOW_PATH, COUNT, SAMPLED, BLOCK,
            )  # fmt: skip
    else:
        if K >= 8:
            for group in range(K // 4):
                for member in tl.static_range(4):
                    total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison = _add_model(
                        job, 4 * group + member, brackets, kept_counts, bad_counts, start, base, lanes, mask,
                        total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison,
                        K, XD, BD, WORK, ALIGNED, TRIM, RESCALE, ELECT, MERGE, UNIT, MASKED, SLOW_PATH, COUNT, SAMPLED, BLOCK,
                    )  # fmt: skip
        elif K >= 4:
            for member in tl.static_range(4):
                total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison = _add_model(
                    job, member, brackets, kept_counts, bad_counts, start, base, lanes, mask,
                    total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison,
                    K, XD, BD, WORK, ALIGNED, TRIM, RESCALE, ELECT, MERGE, UNIT, MASKED, SLOW_PATH, COUNT, SAMPLED, BLOCK,
                )  # fmt: skip
        for member in tl.static_range(K % 4):
            total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison = _add_model(
                job, K // 4 * 4 + member, brackets, kept_counts, bad_counts, start, base, lanes, mask,
                total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison,
                K, XD, BD, WORK, ALIGNED, TRIM, RESCALE, ELECT, MERGE, UNIT, MASKED, SLOW_PATH, COUNT, SAMPLED, BLOCK,
            )  # fmt: skip

    if SAMPLED and K <= 4:
        near = packed
    positives = signs & 0xFFF
    negatives = (signs >> 12) & 0xFFF
    events = ((positives > 0) & (negatives > 0)).to(tl.int32)
    if ELECT == 0:
        numerator = plus
        agreeing = taking
    else:
        if ELECT == 2:
            difference = positives - negatives
            up = difference > 0
            down = difference < 0
        else:
            up = total > 0
            down = total < 0
        if MAJORITY:
            events += (up.to(tl.int32) << 10) + (down.to(tl.int32) << 20)
            up = up | ((signs * 0 + tl.load(job + ZERO_SIGN) > 0) & ~down)
        else:
            up = ~down
        numerator = tl.where(up, plus, minus)
        agreeing = tl.where(up, positives, negatives)
    one = zero + 1.0
    if MERGE == 0:
        if ELECT == 0:
            divisor = zero + number(job, DIVISOR, WORK)
        else:
            if UNIT:
                divisor = agreeing.to(one.dtype)
            else:
                divisor = tl.where(up, plus_weights, minus_weights)
            divisor = tl.where(divisor == 0, one, divisor)
        merged = _divide(numerator, divisor, WORK)
    elif MERGE == 1:
        merged = _divide(numerator, tl.maximum(agreeing, 1).to(one.dtype), WORK)
    else:
        merged = numerator
    result = merged * number(job, SCALING, WORK)
    if BD >= 0:
        result = base + result
    if SLOW_PATH:
        both = ((poison & 2) != 0) & ((poison & 4) != 0)
        result = tl.where(((poison & 1) != 0) | both, float("nan"), result)
    return result, packed, events, near, signs >> 24


@triton.jit
def _divide(a, b, WORK: tl.constexpr):
    if WORK == 64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _add_model(
    job, k, brackets, kept_counts, bad_counts, start, base, lanes, mask,
    total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison,
    K: tl.constexpr,
    XD: tl.constexpr,
    BD: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRIM: tl.constexpr,
    RESCALE: tl.constexpr,
    ELECT: tl.constexpr,
    MERGE: tl.constexpr,
    UNIT: tl.constexpr,
    MASKED: tl.constexpr,
    SLOW_PATH: tl.constexpr,
    COUNT: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one model's share of a block to every running sum of merge_block."""
    k = k + tl.zeros([], tl.int32)
    model = job + HEADER + PER_MODEL * k
    delta = task_vector(job, k, base, start, lanes, mask, XD, BD, WORK, ALIGNED, MASKED)
    kept = keeps(job, k, delta, start, TRIM, WORK, SLOW_PATH, BLOCK)
    if MASKED:
        kept = kept & mask
    if SAMPLED:
        inside = in_bracket(brackets, k, delta)
        if MASKED:
            inside = inside & mask
        if K <= 4:
            packed += inside.to(tl.int32) << (4 * k + 16)
        else:
            near += inside.to(tl.int32) << (4 * k)
    trimmed = delta  # T3r
    if RESCALE == 1:
        trimmed = _divide(delta, tl.zeros_like(delta) + number(model, DENSITY, WORK), WORK)
    elif RESCALE == 2:
        trimmed = delta * number(model, FACTOR, WORK)
    if UNIT:
        value = tl.where(kept, trimmed, 0.0)
        product = value
        above = value > 0
        below = value < 0
    else:
        value = trimmed * number(model, ELECT_WEIGHT, WORK)
        product = trimmed * number(model, WEIGHT, WORK)
        above = kept & (value > 0)
        below = kept & (value < 0)
    signs += tl.where(above, 1, tl.where(below, 4096, 0))
    if ELECT == 1:
        total += tl.where(kept, value, 0.0)
    first = above
    if ELECT == 0:
        first = kept
        if MERGE == 1:
            taking += (kept & (trimmed != 0)).to(tl.int32)
    if MERGE == 3:
        plus = tl.where(first & (tl.abs(product) > tl.abs(plus)), product, plus)
        if ELECT != 0:
            minus = tl.where(below & (tl.abs(product) > tl.abs(minus)), product, minus)
    else:
        plus += tl.where(first, product, 0.0)
        if ELECT != 0:
            minus += tl.where(below, product, 0.0)
            if MERGE == 0 and not UNIT:
                weight = number(model, WEIGHT, WORK)
                plus_weights += tl.where(above, weight, 0.0)
                minus_weights += tl.where(below, weight, 0.0)
    if K <= 8:
        packed += kept.to(tl.int32) << (4 * k)
    elif COUNT:
        more = tl.sum(kept.to(tl.int32)).to(tl.int64)
        if COUNT == -1:
            more = -more
        tl.atomic_add(kept_counts + k, more, sem="relaxed")
    if SLOW_PATH:
        infinite = tl.abs(trimmed) == float("inf")
        poison |= (delta != delta).to(tl.int32)
        poison |= tl.where(kept & infinite, tl.where(trimmed > 0, 2, 4), 0)
        if COUNT:
            bad = tl.sum((~(tl.abs(delta) < float("inf"))).to(tl.int32))
            if bad > 0:
                tl.atomic_add(bad_counts + k, bad.to(tl.int64), sem="relaxed")
    else:
        # Rescaling leaves no NaN or infinity finite, and may overflow: both need care (N2).
        signs |= tl.where(tl.abs(trimmed) < float("inf"), 0, 1 << 24)
    return total, plus, minus, plus_weights, minus_weights, signs, taking, packed, near, poison
