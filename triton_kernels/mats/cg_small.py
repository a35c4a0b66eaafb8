"""Conjugate gradient on small layers, one program per layer (docs/spec/mats.md, M6 to M9): (IA)^3
vectors, low-rank systems.

Vectors that all threads read are in device memory, of which a program's share stays in its cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymerge.backends.cg.device import SmallLayers
from pymerge.triton_kernels._launch import launch
from pymerge.triton_kernels.mats.cg import (
    BROKE,
    CONVERGED,
    DONE,
    ENOUGH,
    LIMIT2,
    LIMITED,
    TOLERANCE,
    WIDTH,
)


@triton.jit
def product(
    x, y, out, rows, inner, cols, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """out = x y, row-major (rows, inner) and (inner, cols), by all threads of the program; out is
    visible to all at the end.
    """
    i = tl.arange(0, TM)
    j = tl.arange(0, TN)
    k = tl.arange(0, TK)
    for row in range(0, rows, TM):
        for col in range(0, cols, TN):
            total = tl.zeros((TM, TN), tl.float32)
            for start in range(0, inner, TK):
                left = tl.load(
                    x + (row + i)[:, None] * inner + (start + k)[None, :],
                    mask=((row + i) < rows)[:, None] & ((start + k) < inner)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    y + (start + k)[:, None] * cols + (col + j)[None, :],
                    mask=((start + k) < inner)[:, None] & ((col + j) < cols)[None, :],
                    other=0.0,
                )
                total += tl.dot(left, right, input_precision="ieee")
            tl.store(
                out + (row + i)[:, None] * cols + (col + j)[None, :],
                total,
                mask=((row + i) < rows)[:, None] & ((col + j) < cols)[None, :],
            )
    tl.debug_barrier()


@triton.jit
def dot(x, y, n, BLOCK: tl.constexpr):
    """<x, y> in float64."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        at = start + lanes
        a = tl.load(x + at, mask=at < n, other=0.0).to(tl.float64)
        b = tl.load(y + at, mask=at < n, other=0.0).to(tl.float64)
        total += a * b
    return tl.sum(total, axis=0)


@triton.jit
def precondition(
    r, z, inner, left, right, d_out, d_in,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """M7: z = left r right."""
    if RIGHT and LEFT:
        product(r, right, inner, d_out, d_in, d_in, TM, TN, TK)
        product(left, inner, z, d_out, d_out, d_in, TM, TN, TK)
    elif RIGHT:
        product(r, right, z, d_out, d_in, d_in, TM, TN, TK)
    else:
        lanes = tl.arange(0, BLOCK)
        for start in range(0, d_out * d_in, BLOCK):
            at = start + lanes
            tl.store(z + at, tl.load(r + at, mask=at < d_out * d_in), mask=at < d_out * d_in)
        tl.debug_barrier()


@triton.jit
def solve_kernel(
    step, r, a, b, right, left, scratch, state, d_out, d_in, iterations,
    a_stride, right_stride,
    COUNT: tl.constexpr, OUTPUTS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    LIMITS: tl.constexpr, BLOCK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """A program per layer. a: (COUNT, d_in, d_in) each, a_stride apart. b: (d_out, COUNT d_out),
    read where OUTPUTS.

    scratch: p, q, z and, where OUTPUTS, COUNT products each.
    """
    layer = tl.program_id(0).to(tl.int64)
    n = d_out * d_in
    step += layer * n
    r += layer * n
    a += layer * a_stride
    right += layer * right_stride
    left += layer * d_out * d_out
    b += layer * d_out * d_out * COUNT
    state += layer * WIDTH
    held: tl.constexpr = 3 + COUNT if OUTPUTS else 3
    p = scratch + layer * n * held
    q = p + n
    z = q + n
    inner = z + n
    square = tl.load(state + LIMIT2)
    enough = tl.load(state + ENOUGH)
    tolerance = tl.load(state + TOLERANCE)
    lanes = tl.arange(0, BLOCK)
    infinity = float("inf")

    precondition(r, z, inner, left, right, d_out, d_in, LEFT, RIGHT, BLOCK, TM, TN, TK)
    for start in range(0, n, BLOCK):
        at = start + lanes
        tl.store(p + at, tl.load(z + at, mask=at < n, other=0.0), mask=at < n)
    tl.debug_barrier()
    rho = dot(r, z, n, BLOCK)
    rr = dot(r, r, n, BLOCK)
    decrease = rho * 0
    converged = rr <= enough
    limited = converged & (converged == 0)
    broke = limited
    active = converged == 0
    done = 0
    for _ in range(0, iterations):
        if active:
            if OUTPUTS:
                for k in range(0, COUNT):
                    product(p, a + k * d_in * d_in, inner + k * n, d_out, d_in, d_in, TM, TN, TK)
                product(b, inner, q, d_out, COUNT * d_out, d_in, TM, TN, TK)
            else:
                product(p, a, q, d_out, d_in, d_in, TM, TN, TK)
            curvature = dot(p, q, n, BLOCK)
            alpha = rho / curvature
            # M9: comparisons with NaN are false.
            good = (curvature > 0) & (curvature < infinity) & (rho > 0) & (alpha < infinity)
            broke = good == 0
            if LIMITS:
                pp = dot(p, p, n, BLOCK)
                dp = dot(step, p, n, BLOCK)
                dd = dot(step, step, n, BLOCK)
                ahead = dd + 2 * alpha * dp + alpha * alpha * pp
                limited = good & ((ahead <= square) == 0)
                room = tl.maximum(square - dd, 0.0)
                alpha = tl.where(limited, (tl.sqrt(dp * dp + pp * room) - dp) / pp, alpha)
            if good:
                gain = alpha * rho - alpha * alpha * curvature / 2
                decrease += gain
                done += 1
                factor = alpha.to(tl.float32)
                for start in range(0, n, BLOCK):
                    at = start + lanes
                    mask = at < n
                    moved = tl.load(step + at, mask=mask) + factor * tl.load(p + at, mask=mask)
                    rest = tl.load(r + at, mask=mask) - factor * tl.load(q + at, mask=mask)
                    tl.store(step + at, moved, mask=mask)
                    tl.store(r + at, rest, mask=mask)
                tl.debug_barrier()
                rr = dot(r, r, n, BLOCK)
                converged = ((gain <= tolerance * decrease) | (rr <= enough)) & (limited == 0)
            active = good & (limited == 0) & (converged == 0)
            if active:
                precondition(r, z, inner, left, right, d_out, d_in, LEFT, RIGHT, BLOCK, TM, TN, TK)
                following = dot(r, z, n, BLOCK)
                beta = (following / rho).to(tl.float32)
                rho = following
                for start in range(0, n, BLOCK):
                    at = start + lanes
                    mask = at < n
                    turned = tl.load(z + at, mask=mask) + beta * tl.load(p + at, mask=mask)
                    tl.store(p + at, turned, mask=mask)
                tl.debug_barrier()
    tl.store(state + DONE, done)
    tl.store(state + CONVERGED, converged.to(tl.float64))
    tl.store(state + LIMITED, limited.to(tl.float64))
    tl.store(state + BROKE, broke.to(tl.float64))


def solve_small(problem: SmallLayers) -> None:
    """Solve `SmallLayers`, one program per layer."""
    layers, d_out, d_in = problem.step.shape
    none = problem.step
    launch(
        solve_kernel,
        (layers,),
        problem.step.device,
        problem.step,
        problem.r,
        problem.a,
        none if problem.b is None else problem.b,
        none if problem.right is None else problem.right,
        none if problem.left is None else problem.left,
        problem.scratch,
        problem.state,
        d_out,
        d_in,
        problem.iterations,
        problem.a_stride,
        problem.right_stride,
        COUNT=problem.a.shape[1],
        OUTPUTS=problem.b is not None,
        LEFT=problem.left is not None,
        RIGHT=problem.right is not None,
        LIMITS=problem.limits,
        BLOCK=512,
        TM=16 if d_out <= 16 else 32,
        TN=32,
        TK=16,
        num_warps=8,
    )
