"""Norms of task vectors and the factors of T3r, found on the device (T9).

Sums in binary64 settle a factor of binary32 but for one in some ten thousand. What is left, and all
of binary64, is summed in integers: a sum is a vector of limbs of 24 bits, in units of 2^lowest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.triton_kernels._load import bits_of, load
from pymerge.triton_kernels.ties._descriptors import (
    BASE,
    FACTOR,
    FACTORED,
    HEADER,
    PER_MODEL,
    SIZE,
)
from pymerge.triton_kernels.ties._rule import keeps, task_vector
from pymerge.triton_kernels.ties._select import chunk_of

CHUNK = 16384  # elements of a program of norm_chunks
_CHUNK = tl.constexpr(CHUNK)
_BLOCK = tl.constexpr(512)
_SUMS = tl.constexpr(256)  # chunks whose sums are added at a time
_LEAST_NORM = tl.constexpr(1e-7)
_OPEN = tl.constexpr(2)  # in FACTORED: not settled
_EXACT = tl.constexpr(32)  # elements at a time
_LIMB = tl.constexpr(24)
_MASK = tl.constexpr((1 << 24) - 1)


@triton.jit
def _deltas(
    job, k, start, last, lanes,
    XD: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, TRIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(task vector elements start + lanes, 0 from `last` on; which of them are kept)."""
    mask = lanes < tl.minimum(last - start, BLOCK).to(tl.int32)
    base = tl.zeros([BLOCK], tl.float32)
    if BD >= 0:
        base = load(tl.load(job + BASE), 0, start, lanes, mask, BD, WORK, False, True)
    delta = task_vector(job, k, base, start, lanes, mask, XD, BD, WORK, False, True)
    delta = tl.where(mask, delta, 0)
    return delta, keeps(job, k, delta, start, TRIM, WORK, True, BLOCK) & mask


@triton.jit
def norm_chunks(
    jobs, chunks, sums, starts,
    TABLE: tl.constexpr, K: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, TRIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The sums over one chunk of one model, before and after the trim.

    sums: (chunks, K, 2) float64; a job's chunks begin at row starts[job]. NORM: 1, 2, or 3 for
        linf.
    """
    index, chunk = chunk_of(chunks, TABLE)
    k = tl.program_id(1)
    job = jobs + index * (HEADER + PER_MODEL * K)
    here = sums + ((tl.load(starts + index) + chunk) * K + k) * 2
    first = chunk * _CHUNK
    last = tl.minimum(first + _CHUNK, tl.load(job + SIZE))
    lanes = tl.arange(0, _BLOCK)
    before = tl.zeros([_BLOCK], tl.float64)
    after = tl.zeros([_BLOCK], tl.float64)
    for start in range(first, last, _BLOCK):
        delta, kept = _deltas(job, k, start, last, lanes, XD, BD, WORK, TRIM, _BLOCK)
        term = tl.abs(delta).to(tl.float64)
        if NORM == 2:
            term = term * term
        if NORM == 3:
            # A NaN stays: T3r then leaves the model as it is (finish_norms).
            before = tl.where((term > before) | (term != term), term, before)
            after = tl.where(kept & ((term > after) | (term != term)), term, after)
        else:
            before += term
            after += tl.where(kept, term, 0.0)
    tl.store(here, _joined(before, NORM))
    tl.store(here + 1, _joined(after, NORM))


@triton.jit
def _joined(values, NORM: tl.constexpr):
    """The sum; or, for linf, the maximum, NaN if any element is."""
    if NORM == 3:
        nan = tl.max((values != values).to(tl.int32)) > 0
        return tl.where(nan, float("nan"), tl.max(tl.where(values != values, 0.0, values)))
    else:
        return tl.sum(values)


@triton.jit
def finish_norms(jobs, sums, starts, K: tl.constexpr, WORK: tl.constexpr, NORM: tl.constexpr):
    """T3r: one program per (job, model) joins the chunks and writes the factor before / after; or
    says that it is open.
    """
    k = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64)
    job = jobs + index * (HEADER + PER_MODEL * K)
    model = job + HEADER + PER_MODEL * k
    if tl.load(model + FACTORED) == 0:
        return
    begin = tl.load(starts + index)
    count = (tl.load(job + SIZE) + _CHUNK - 1) // _CHUNK
    lanes = tl.arange(0, _SUMS)
    befores = tl.zeros([_SUMS], tl.float64)
    afters = tl.zeros([_SUMS], tl.float64)
    for chunk in range(0, count, _SUMS):
        present = lanes < count - chunk
        here = sums + ((begin + chunk + lanes) * K + k) * 2
        b = tl.load(here, mask=present, other=0.0)
        a = tl.load(here + 1, mask=present, other=0.0)
        if NORM == 3:
            befores = tl.where((b > befores) | (b != b), b, befores)
            afters = tl.where((a > afters) | (a != a), a, afters)
        else:
            befores += b
            afters += a
    before = _joined(befores, NORM)
    after = _joined(afters, NORM)
    if NORM == 3:
        usable = (before >= _LEAST_NORM) & (after >= _LEAST_NORM)
        factor = tl.where(usable, before / after, 1.0)
        if WORK == 32:
            factor = factor.to(tl.float32)
        tl.store(model + FACTOR, bits_of(factor, WORK))
        return
    if NORM == 2:
        before = tl.sqrt(before)
        after = tl.sqrt(after)
    # As `settles` of csrc/common/exact_sum.h; a term goes through fewer additions than that.
    error = (count + _CHUNK // _BLOCK + 64).to(tl.float64) * 1.1102230246251565e-16
    nan = (before != before) | (after != after)
    none = nan | (before < (1 - error) * _LEAST_NORM) | (after < (1 - error) * _LEAST_NORM)
    near = (before < (1 + error) * _LEAST_NORM) | (after < (1 + error) * _LEAST_NORM)
    quotient = before / after
    low = (quotient * (1 - 4 * error)).to(tl.float32)
    high = (quotient * (1 + 4 * error)).to(tl.float32)
    settled = none | ((near == 0) & ((low == high) | (before == float("inf"))))
    factor = tl.where(none, 1.0, high)
    tl.store(model + FACTOR, bits_of(factor.to(tl.float32), 32))
    if settled == 0:
        tl.store(model + FACTORED, begin * 0 + _OPEN)


@triton.jit
def _spread(bits, place, LIMBS: tl.constexpr):
    """(LIMBS, elements): the limbs of bits * 2^place, for 0 <= bits < 2^63."""
    shift = place[None, :] - tl.arange(0, LIMBS)[:, None].to(tl.int64) * _LIMB
    up = bits[None, :] << tl.minimum(tl.maximum(shift, 0), _LIMB)
    down = bits[None, :] >> tl.minimum(tl.maximum(-shift, 0), 63)
    return tl.where(shift >= _LIMB, 0, tl.where(shift >= 0, up, down)) & _MASK


@triton.jit
def _limb(limbs, i, LIMBS: tl.constexpr):
    """Limb i; 0 where there is none."""
    return tl.sum(tl.where(tl.arange(0, LIMBS) == i, limbs, 0))


@triton.jit
def _ends(limbs, LIMBS: tl.constexpr):
    """The lowest and the highest limb that are not 0."""
    lanes = tl.arange(0, LIMBS)
    low = tl.min(tl.where(limbs != 0, lanes, LIMBS))
    return low.to(tl.int64), tl.max(tl.where(limbs != 0, lanes, 0)).to(tl.int64)


@triton.jit
def _carried(limbs, LIMBS: tl.constexpr):
    lanes = tl.arange(0, LIMBS)
    low, high = _ends(limbs, LIMBS)
    over = low * 0
    for i in range(low, tl.minimum(high + 4, LIMBS)):
        value = _limb(limbs, i, LIMBS) + over
        over = value >> _LIMB
        limbs = tl.where(lanes == i, value & _MASK, limbs)
    return limbs


@triton.jit
def _place(piece, over, shift):
    """(a limb of a number that is shifted up, what is over)."""
    low = ((piece & _MASK) << shift) + over
    return low & _MASK, (low >> _LIMB) + ((piece >> _LIMB) << shift)


@triton.jit
def _compare(a, b, m, e, LIMBS: tl.constexpr, ROOT: tl.constexpr):
    """The sign of a - y b, or of a - y^2 b (ROOT), for y = m * 2^e with m < 2^55; a and b are
    carried.
    """
    p0 = m & _MASK
    p1 = (m >> 24) & _MASK
    p2 = m >> 48
    if ROOT:
        q0, q1, q2, q3, q4 = p0 * p0, 2 * p0 * p1, 2 * p0 * p2 + p1 * p1, 2 * p1 * p2, p2 * p2
        e = 2 * e
    else:
        q0, q1, q2, q3, q4 = p0, p1, p2, m * 0, m * 0
    far: tl.constexpr = 400
    place = (e + 24 * far) // 24 - far  # not below 0, where // would cut off
    shift = e - place * 24
    f0, over = _place(q0, m * 0, shift)
    f1, over = _place(q1, over, shift)
    f2, over = _place(q2, over, shift)
    f3, over = _place(q3, over, shift)
    f4, f5 = _place(q4, over, shift)
    lanes = tl.arange(0, LIMBS).to(tl.int64)
    carried = m * 0
    rest = m * 0
    low_a, high_a = _ends(a, LIMBS)
    low_b, high_b = _ends(b, LIMBS)
    low = tl.minimum(low_a, low_b + place)
    high = tl.maximum(high_a, high_b + place + 5)
    for i in range(low, high + 1):
        j = i - place - lanes  # the piece that meets each limb of b
        piece = tl.where(j == 0, f0, 0) + tl.where(j == 1, f1, 0) + tl.where(j == 2, f2, 0)
        piece += tl.where(j == 3, f3, 0) + tl.where(j == 4, f4, 0) + tl.where(j == 5, f5, 0)
        difference = carried + _limb(a, i, LIMBS) - tl.sum(piece * b)
        rest = rest | (difference & _MASK)
        carried = difference >> _LIMB
    return tl.where(carried < 0, -1, tl.where((carried > 0) | (rest > 0), 1, 0))


@triton.jit
def _leading(limbs, LOWEST: tl.constexpr, LIMBS: tl.constexpr):
    """(number, exponent): a carried sum above 0, to the precision of binary64."""
    _, top = _ends(limbs, LIMBS)
    top = tl.maximum(top, 3)
    high = (_limb(limbs, top, LIMBS) << 24) | _limb(limbs, top - 1, LIMBS)
    low = (_limb(limbs, top - 2, LIMBS) << 24) | _limb(limbs, top - 3, LIMBS)
    number = high.to(tl.float64) * 281474976710656.0 + low.to(tl.float64)
    return number, (top - 3) * _LIMB + LOWEST


@triton.jit
def _rounded_quotient(
    a, b, LOWEST: tl.constexpr, LIMBS: tl.constexpr, WORK: tl.constexpr, ROOT: tl.constexpr
):
    """The bits of a / b, or of its root, rounded once to nearest, ties to even; a, b > 0. As
    `rounded_quotient` of csrc/common/exact_sum.h.
    """
    bits: tl.constexpr = 53 if WORK == 64 else 24
    least: tl.constexpr = -1074 if WORK == 64 else -149
    top: tl.constexpr = 9007199254740992.0 if WORK == 64 else 16777216.0
    infinite: tl.constexpr = 0x7FF if WORK == 64 else 0xFF
    over, over_exponent = _leading(a, LOWEST, LIMBS)
    under, under_exponent = _leading(b, LOWEST, LIMBS)
    y = over / under
    e = over_exponent - under_exponent
    if ROOT:
        odd = e & 1
        y = tl.sqrt(tl.where(odd == 1, 2 * y, y))
        e = (e - odd) >> 1
    while (y >= top) | (e < least):
        y = y * 0.5
        e += 1
    while (y < top / 2) & (e > least):
        y = y * 2
        e -= 1
    m = y.to(tl.int64)
    sign = _compare(a, b, m, e, LIMBS, ROOT)
    while (sign < 0) & (m > 0):
        m -= 1
        sign = _compare(a, b, m, e, LIMBS, ROOT)
    sign = _compare(a, b, m + 1, e, LIMBS, ROOT)
    while sign >= 0:
        m += 1
        sign = _compare(a, b, m + 1, e, LIMBS, ROOT)
    too_large = m >> bits
    m = m >> too_large
    e = e + too_large
    if ((m >> (bits - 1)) == 0) & (e > least):
        m = 2 * m
        e = e - 1
        if _compare(a, b, m + 1, e, LIMBS, ROOT) >= 0:
            m = m + 1
    half = _compare(a, b, 2 * m + 1, e - 1, LIMBS, ROOT)
    m += tl.where((half > 0) | ((half == 0) & ((m & 1) == 1)), 1, 0)
    too_large = m >> bits
    m = m >> too_large
    e = e + too_large
    field = tl.minimum(e - least + 1, infinite)
    fraction = tl.where(field == infinite, 0, m & ((1 << (bits - 1)) - 1))
    number = (field << (bits - 1)) | fraction
    return tl.where((m >> (bits - 1)) == 0, m, number)


@triton.jit
def exact_factors(
    jobs, K: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, TRIM: tl.constexpr, NORM: tl.constexpr,
    OPEN: tl.constexpr,
):  # fmt: skip
    """T3r: one program per (job, model) whose FACTORED is OPEN sums exactly and writes the
    factor.
    """
    k = tl.program_id(1)
    job = jobs + tl.program_id(0).to(tl.int64) * (HEADER + PER_MODEL * K)
    model = job + HEADER + PER_MODEL * k
    if tl.load(model + FACTORED) != OPEN:
        return
    # Below the lowest bit of every term: numbers of binary32 are those of binary64 here.
    lowest: tl.constexpr = -90 * 24 if WORK == 64 else -17 * 24
    limbs: tl.constexpr = 256 if WORK == 64 else 32
    root: tl.constexpr = NORM == 2
    size = tl.load(job + SIZE)
    lanes = tl.arange(0, _EXACT)
    before = tl.zeros([limbs], tl.int64)
    after = tl.zeros([limbs], tl.int64)
    nan = size.to(tl.int32) * 0
    infinite = nan
    infinite_kept = nan
    for start in range(size * 0, size, _EXACT):
        delta, kept = _deltas(job, k, start, size, lanes, XD, BD, WORK, TRIM, _EXACT)
        word = tl.abs(delta).to(tl.float64).to(tl.int64, bitcast=True)
        field = word >> 52
        special = field == 0x7FF
        nan += tl.sum((delta != delta).to(tl.int32))
        infinite += tl.sum((special & (delta == delta)).to(tl.int32))
        infinite_kept += tl.sum((special & (delta == delta) & kept).to(tl.int32))
        fraction = word & 0xFFFFFFFFFFFFF
        m = tl.where(field == 0, fraction, fraction | (1 << 52))
        m = tl.where(special, 0, m)
        place = tl.maximum(field, 1) - 1075
        if root:
            p0 = m & _MASK
            p1 = (m >> 24) & _MASK
            p2 = m >> 48
            place = 2 * place - lowest
            terms = _spread(p0 * p0, place, limbs)
            terms += _spread(2 * p0 * p1, place + 24, limbs)
            terms += _spread(2 * p0 * p2 + p1 * p1, place + 48, limbs)
            terms += _spread(2 * p1 * p2, place + 72, limbs)
            terms += _spread(p2 * p2, place + 96, limbs)
        else:
            terms = _spread(m, place - lowest, limbs)
        before += tl.sum(terms, axis=1)
        after += tl.sum(tl.where(kept[None, :], terms, 0), axis=1)
    before = _carried(before, limbs)
    after = _carried(after, limbs)
    one = (tl.arange(0, limbs) == (0 - lowest) // 24).to(tl.int64)
    # 1e-7 is that times 2^-76.
    least = size * 0 + 7555786372591432
    sign = _compare(before, one, least, size * 0 - 76, limbs, root)
    low = (infinite == 0) & (sign < 0)
    sign = _compare(after, one, least, size * 0 - 76, limbs, root)
    low = low | ((infinite_kept == 0) & (sign < 0))
    if (nan > 0) | low:
        tl.store(
            model + FACTOR,
            bits_of((size * 0 + 1).to(tl.float64 if WORK == 64 else tl.float32), WORK),
        )
    else:
        if infinite > 0:
            special = tl.where(infinite_kept > 0, float("nan"), float("inf"))
            tl.store(
                model + FACTOR, bits_of(special.to(tl.float64 if WORK == 64 else tl.float32), WORK)
            )
        else:
            tl.store(model + FACTOR, _rounded_quotient(before, after, lowest, limbs, WORK, root))
