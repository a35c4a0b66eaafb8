"""The kernels of `gram` and `combine` (docs/spec/gram.md).

Inputs stand in a table of 64-bit words, (address, dtype code) for each model and then for the base.
Each input is read once: a program holds the products of all pairs of models of its elements, in
binary64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.triton_kernels._load import load, store


@triton.jit
def gram_kernel(
    table, sums, rows, columns, parts, part_size,
    K: tl.constexpr, MODELS: tl.constexpr, BY_COLUMN: tl.constexpr, HAS_BASE: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, WORK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[part, group, pair]: a part of `part_size` elements of a row, or of as many rows of
    BLOCK columns. MODELS: K, up to a power of 2.
    """
    program = tl.program_id(0).to(tl.int64)
    if BY_COLUMN:
        strips = (columns + BLOCK - 1) // BLOCK
        part = program // strips
        offset = program % strips * BLOCK
        end = tl.minimum(rows, (part + 1) * part_size)
    else:
        row = program // parts
        part = program % parts
        offset = row * columns
        end = tl.minimum(columns, (part + 1) * part_size)
    model = tl.arange(0, MODELS)
    address = tl.load(table + 2 * model, mask=model < K, other=0)[:, None]
    code = tl.load(table + 2 * model + 1, mask=model < K, other=0)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    products = tl.zeros([MODELS, MODELS, BLOCK], tl.float64)
    step = 1 if BY_COLUMN else BLOCK
    for i in range(part * part_size, end, step):
        if BY_COLUMN:
            start = i * columns + offset
            there = lanes < (columns - offset)
        else:
            start = offset + i
            there = lanes < (end - i)
        mask = there & (model[:, None] < K)
        x = load(address, code, start, lanes, mask, XD, WORK, False, True)
        if HAS_BASE:
            base = load(tl.load(table + 2 * K), 0, start, lanes, there, BD, WORK, False, True)
            x = tl.where(mask, x - base, 0.0)
        wide = x.to(tl.float64)
        products += wide[:, None, :] * wide[None, :, :]
    first = model[:, None]
    second = model[None, :]
    pair = first * K - first * (first - 1) // 2 + second - first
    counts = (first <= second) & (second < K)
    pairs = K * (K + 1) // 2
    if BY_COLUMN:
        column = offset + tl.arange(0, BLOCK)
        at = (part * columns + column)[None, None, :] * pairs + pair[:, :, None]
        inside = counts[:, :, None] & (column < columns)[None, None, :]
        tl.store(sums + at, products, mask=inside)
    else:
        at = (part * rows + row) * pairs + pair
        tl.store(sums + at, tl.sum(products, axis=2), mask=counts)


@triton.jit
def combine_kernel(
    table, coefficients, out, n, columns,
    K: tl.constexpr, BY_COLUMN: tl.constexpr, HAS_BASE: tl.constexpr,
    XD: tl.constexpr, BD: tl.constexpr, OD: tl.constexpr, WORK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G5 for BLOCK elements. Bytes moved: one read of every input, one write."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < (n - start)
    at = start + lanes
    group = at % columns if BY_COLUMN else at // columns
    if HAS_BASE:
        base = load(tl.load(table + 2 * K), 0, start, lanes, mask, BD, WORK, False, True)
    total = tl.zeros([BLOCK], tl.float64 if WORK == 64 else tl.float32)
    for k in range(K):
        address = tl.load(table + 2 * k)
        code = tl.load(table + 2 * k + 1)
        value = load(address, code, start, lanes, mask, XD, WORK, False, True)
        if HAS_BASE:
            value -= base
        factor = tl.load(coefficients + group * K + k, mask=mask, other=0.0)
        total += factor.to(total.dtype) * value
    if HAS_BASE:
        total = base + total
    store(out, start, lanes, total, mask, OD, WORK, False, True)
