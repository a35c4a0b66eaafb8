"""Typed loads and stores: a tensor is an address in a table and a dtype code.

Codes are those of csrc/common/dtype.h: 0 float32, 1 float16, 2 bfloat16, 3 float64; -1 no tensor; 4
(`MIXED`) says that the models differ and the code is in the table. WORK is the width of the working
precision, 32 or 64. bfloat16 is handled in integers: exact everywhere, subnormals included, and the
same in Triton's
    interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

MIXED = 4


@triton.jit
def number(table, index, WORK: tl.constexpr):
    """A number of the working precision, stored by its bits in a 64-bit word."""
    bits = tl.load(table + index)
    if WORK == 64:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def bits_of(value, WORK: tl.constexpr):
    """The inverse of `number`, for a value already in the working precision."""
    if WORK == 64:
        return value.to(tl.int64, bitcast=True)
    else:
        return value.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _widen_bfloat16(raw):
    return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load(pointer, start, lanes, mask, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    pointer += start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        return tl.load(pointer + lanes, mask=mask, other=0)
    else:
        return tl.load(pointer + lanes)


@triton.jit
def load(
    address,
    code,
    start,
    lanes,
    mask,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Elements start + lanes in the working precision; 0 where masked.

    start is a 64-bit number, lanes are 32-bit: no 64-bit arithmetic an element. ALIGNED: every
    address is a multiple of 16 bytes, and start of 8 elements.
    """
    if DTYPE == 4:
        # At most one of the masks is ever set, so the memory traffic is that of one load.
        code = (
            code + lanes * 0
        )  # a block: Triton 3.9's interpreter makes integers of a scalar truth and a block's
        there = lanes >= 0
        if MASKED:
            there = there & mask
        whole = _load(
            address.to(tl.pointer_type(tl.float32)),
            start,
            lanes,
            there & (code == 0),
            ALIGNED,
            True,
        )
        half = _load(
            address.to(tl.pointer_type(tl.float16)),
            start,
            lanes,
            there & (code == 1),
            ALIGNED,
            True,
        )
        brain = _load(
            address.to(tl.pointer_type(tl.int16)), start, lanes, there & (code == 2), ALIGNED, True
        )
        value = tl.where(
            code == 1, half.to(tl.float32), tl.where(code == 2, _widen_bfloat16(brain), whole)
        )
        if WORK == 64:
            double = _load(
                address.to(tl.pointer_type(tl.float64)),
                start,
                lanes,
                there & (code == 3),
                False,
                True,
            )
            return tl.where(code == 3, double, value.to(tl.float64))
        else:
            return value
    else:
        if DTYPE == 0:
            value = _load(
                address.to(tl.pointer_type(tl.float32)), start, lanes, mask, ALIGNED, MASKED
            )
        elif DTYPE == 1:
            value = _load(
                address.to(tl.pointer_type(tl.float16)), start, lanes, mask, ALIGNED, MASKED
            )
        elif DTYPE == 2:
            value = _widen_bfloat16(
                _load(address.to(tl.pointer_type(tl.int16)), start, lanes, mask, ALIGNED, MASKED)
            )
        else:
            value = _load(
                address.to(tl.pointer_type(tl.float64)), start, lanes, mask, ALIGNED, MASKED
            )
        if WORK == 64:
            return value.to(tl.float64)
        else:
            return value.to(tl.float32)


@triton.jit
def _to_odd(value):
    """float64 as float32, rounded to odd, so that rounding to 16 bits afterwards is exact as a
    single rounding.
    """
    near = value.to(tl.float32)
    bits = near.to(tl.int32, bitcast=True)
    size = tl.abs(value)
    above = tl.abs(near).to(tl.float64) > size
    inexact = (tl.abs(near).to(tl.float64) != size) & (value == value)
    bits = tl.where(inexact, (bits - above.to(tl.int32)) | 1, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store(
    address,
    start,
    lanes,
    value,
    mask,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """T6: the one cast, to nearest, ties to even; overflow gives infinity. NaN is that of N2,
    replaced as an integer: of numbers a compiler may take any NaN for any other.
    """
    if DTYPE == 3:
        pointer = address.to(tl.pointer_type(tl.int64))
        double = value.to(tl.float64)
        bits = double.to(tl.int64, bitcast=True)
        cast = tl.where(double != double, 0x7FF8000000000000, bits)
    elif DTYPE == 0:
        pointer = address.to(tl.pointer_type(tl.int32))
        single = value.to(tl.float32)
        cast = tl.where(single != single, 0x7FC00000, single.to(tl.int32, bitcast=True))
    else:
        single = value
        if WORK == 64:
            single = _to_odd(value)
        pointer = address.to(tl.pointer_type(tl.int16))
        if DTYPE == 1:
            near = single.to(tl.float16).to(tl.int16, bitcast=True)
            cast = tl.where(single != single, 0x7E00, near).to(tl.int16)
        else:
            bits = single.to(tl.int32, bitcast=True)
            # The sum may wrap for a NaN; it is replaced. Shifts of negative numbers only add high
            # bits, cut off below.
            near = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            cast = tl.where(single != single, 0x7FC0, near).to(tl.int16)
    pointer += start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        tl.store(pointer + lanes, cast, mask=mask)
    else:
        tl.store(pointer + lanes, cast)
