"""Conjugate gradient on small layers, whole in one program each (docs/spec/mats.md, M6 to M9): (IA)^3 vectors, low-rank systems.

A launch solves L layers of at most 256 x 256 in fp32: products, preconditioner, updates, every decision. Vectors that all threads
read lie in device memory, where a program's own stay in its cache; nothing else is launched and nothing goes to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pymerge.ops._cg_run import CgState
from pymerge.ops._mats_system import Preconditioner, System
from pymerge.triton_kernels._launch import launch

LARGEST = 256


@triton.jit
def product(
    x, y, out, rows, inner, cols, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """out = x y, row-major (rows, inner) and (inner, cols), by all threads of the program; out is visible to all at the end."""
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
    step, r, a, b, right, left, scratch, limits, flags, d_out, d_in, iterations,
    a_stride, right_stride,
    COUNT: tl.constexpr, OUTPUTS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    LIMITS: tl.constexpr, BLOCK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """A program per layer. a: (COUNT, d_in, d_in) each, a_stride apart. b: (d_out, COUNT d_out), read where OUTPUTS.

    limits: (largest ||step||^2, enough, tolerance) each, float64. flags: (done, converged, limited, broke) each, float64.
    scratch: p, q, z and COUNT products each.
    """
    layer = tl.program_id(0).to(tl.int64)
    n = d_out * d_in
    step += layer * n
    r += layer * n
    a += layer * a_stride
    right += layer * right_stride
    left += layer * d_out * d_out
    b += layer * d_out * d_out * COUNT
    p = scratch + layer * n * (3 + COUNT)
    q = p + n
    z = q + n
    inner = z + n
    square = tl.load(limits + layer * 3)
    enough = tl.load(limits + layer * 3 + 1)
    tolerance = tl.load(limits + layer * 3 + 2)
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
            for k in range(0, COUNT):
                product(p, a + k * d_in * d_in, inner + k * n, d_out, d_in, d_in, TM, TN, TK)
            if OUTPUTS:
                product(b, inner, q, d_out, COUNT * d_out, d_in, TM, TN, TK)
            else:
                for start in range(0, n, BLOCK):
                    at = start + lanes
                    tl.store(q + at, tl.load(inner + at, mask=at < n, other=0.0), mask=at < n)
                tl.debug_barrier()
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
    out = flags + layer * 4
    tl.store(out, done)
    tl.store(out + 1, converged.to(tl.float64))
    tl.store(out + 2, limited.to(tl.float64))
    tl.store(out + 3, broke.to(tl.float64))


def takes(system: System, step: torch.Tensor, precision: str) -> bool:
    """Whether one program a layer is the way: small blocks, and tiny ones or enough of them to fill the device.

    The bounds are reasoned, not measured: a program does the products of a layer of 64 x 64 in about the time of the launches
    that it saves.
    """
    layers, d_out, d_in = step.shape
    if precision != "fp32" or step.dtype != torch.float32 or max(d_out, d_in) > LARGEST:
        return False
    return max(d_out, d_in) <= 64 or d_out == 1 or layers >= 64


def solve(
    system: System,
    precondition: Preconditioner,
    step: torch.Tensor,
    r: torch.Tensor,
    tolerance: float,
    iterations: int,
    limit: torch.Tensor | None,
    small: torch.Tensor,
) -> CgState:
    """As `pymerge.ops._cg.conjugate_gradient`, in one launch; step and r are overwritten."""
    layers, d_out, d_in = step.shape
    outputs = system.b is not None
    first = system.a if outputs else system.total_a
    assert first is not None
    count = system.a.shape[1] if outputs else 1
    first = first if outputs else first[:, None]
    shared = first.stride(0) == 0
    first = (first[:1] if shared else first).contiguous()
    right, left = precondition.right, precondition.left
    right_shared = right is not None and right.stride(0) == 0
    if right is not None:
        right = (right[:1] if right_shared else right).contiguous()
    wide = {"dtype": torch.float64, "device": step.device}
    limits = torch.empty(layers, 3, **wide)
    limits[:, 0] = torch.inf if limit is None else limit.square()
    limits[:, 1] = small.square()
    limits[:, 2] = tolerance
    flags = torch.zeros(layers, 4, **wide)
    scratch = torch.empty(layers, 3 + count, d_out, d_in, dtype=step.dtype, device=step.device)
    none = step
    launch(
        solve_kernel,
        (layers,),
        step.device,
        step,
        r,
        first,
        none if system.b is None else system.b.contiguous(),
        none if right is None else right,
        none if left is None else left.contiguous(),
        scratch,
        limits,
        flags,
        d_out,
        d_in,
        iterations,
        0 if shared else count * d_in * d_in,
        0 if right_shared or right is None else d_in * d_in,
        COUNT=count,
        OUTPUTS=outputs,
        LEFT=left is not None,
        RIGHT=right is not None,
        LIMITS=limit is not None,
        BLOCK=512,
        TM=16 if d_out <= 16 else 32,
        TN=32,
        TK=32,
        num_warps=8,
    )
    return CgState(step, flags[:, 0], flags[:, 1] != 0, flags[:, 2] != 0, flags[:, 3] != 0)
