"""Vector updates of conjugate gradient, with all scalars and decisions on the device
(docs/spec/mats.md, M6 to M9).

An iteration is four launches beside its matrix products: partial sums of <p, q>; `advance_kernel`;
partial sums of <r, z>; `turn_kernel`. Each program of an update adds up the partial sums itself, so
that nothing is launched in between and no scalar goes to the host: a solve can be captured in a
graph. A layer's state is a row of float64 numbers, read from one table and written, by the layer's
first program, to another.

Bytes moved for a layer of n elements of size e: 2ne, 6ne, 2ne, 4ne. Sums run in an order that
depends on n alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pymerge.backends.cg import device
from pymerge.backends.cg.device import DeviceUpdates
from pymerge.triton_kernels._launch import launch

# Columns of the state table.
RHO = tl.constexpr(device.RHO)
RR = tl.constexpr(device.RR)
DD = tl.constexpr(device.DD)
DECREASE = tl.constexpr(device.DECREASE)
DONE = tl.constexpr(device.DONE)
GAIN = tl.constexpr(device.GAIN)
ACTIVE = tl.constexpr(device.ACTIVE)
CONVERGED = tl.constexpr(device.CONVERGED)
LIMITED = tl.constexpr(device.LIMITED)
BROKE = tl.constexpr(device.BROKE)
ENOUGH = tl.constexpr(device.ENOUGH)
LIMIT2 = tl.constexpr(device.LIMIT2)
TOLERANCE = tl.constexpr(device.TOLERANCE)
WIDTH = tl.constexpr(device.WIDTH)

_BLOCK = device.BLOCK  # elements per step of a program


@triton.jit
def sum_parts(parts, chunks, STRIDE: tl.constexpr, LANES: tl.constexpr):
    """The sum of a layer's partial sums, `chunks` of them, STRIDE apart."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    for start in range(0, chunks, LANES):
        at = start + lanes
        total += tl.load(parts + at * STRIDE, mask=at < chunks, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def dot_kernel(x, y, parts, n, chunk, chunks, BLOCK: tl.constexpr):
    """parts[layer, chunk] = <x, y> over the chunk."""
    layer = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * chunk
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, chunk, BLOCK):
        at = start + i + lanes
        mask = at < n
        a = tl.load(x + layer * n + at, mask=mask, other=0.0).to(tl.float64)
        b = tl.load(y + layer * n + at, mask=mask, other=0.0).to(tl.float64)
        total += a * b
    tl.store(parts + layer * chunks + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def advance_kernel(
    step, r, p, q, curvatures, directions, sums, state, state_out, n, chunk, chunks,
    LIMITS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`VectorUpdates.advance` but for the test of convergence, which needs the sums that this
    kernel leaves in `sums`.

    curvatures: partial <p, q>. directions: partial (<p, p>, <step, p>). sums: partial (<r, r>,
        <step, step>).
    """
    layer = tl.program_id(1).to(tl.int64)
    here = state + layer * WIDTH
    rho = tl.load(here + RHO)
    active = tl.load(here + ACTIVE) != 0
    curvature = sum_parts(curvatures + layer * chunks, chunks, 1, LANES)
    alpha = rho / curvature
    infinity = float("inf")
    # M9: comparisons with NaN are false.
    good = active & (curvature > 0) & (curvature < infinity) & (rho > 0) & (alpha < infinity)
    over = good & (rho < 0)
    if LIMITS:
        pp = sum_parts(directions + layer * chunks * 2, chunks, 2, LANES)
        dp = sum_parts(directions + layer * chunks * 2 + 1, chunks, 2, LANES)
        dd = tl.load(here + DD)
        square = tl.load(here + LIMIT2)
        ahead = dd + 2 * alpha * dp + alpha * alpha * pp
        over = good & ((ahead <= square) == 0)
        room = tl.maximum(square - dd, 0.0)
        alpha = tl.where(over, (tl.sqrt(dp * dp + pp * room) - dp) / pp, alpha)
    alpha = tl.where(good, alpha, 0.0)
    gain = tl.where(good, alpha * rho - alpha * alpha * curvature / 2, 0.0)
    if tl.program_id(0) == 0:
        there = state_out + layer * WIDTH
        tl.store(there + RHO, rho)
        tl.store(there + DECREASE, tl.load(here + DECREASE) + gain)
        tl.store(there + GAIN, gain)
        tl.store(there + DONE, tl.load(here + DONE) + good.to(tl.float64))
        tl.store(there + ACTIVE, good.to(tl.float64))
        tl.store(there + CONVERGED, tl.load(here + CONVERGED))
        tl.store(there + LIMITED, tl.maximum(tl.load(here + LIMITED), over.to(tl.float64)))
        tl.store(
            there + BROKE, tl.maximum(tl.load(here + BROKE), (active & (good == 0)).to(tl.float64))
        )
        tl.store(there + ENOUGH, tl.load(here + ENOUGH))
        tl.store(there + LIMIT2, tl.load(here + LIMIT2))
        tl.store(there + TOLERANCE, tl.load(here + TOLERANCE))

    start = tl.program_id(0).to(tl.int64) * chunk
    lanes = tl.arange(0, BLOCK)
    factor = alpha.to(step.dtype.element_ty)
    moving = factor != 0
    rr = tl.zeros((BLOCK,), tl.float64)
    dd_part = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, chunk, BLOCK):
        at = start + i + lanes
        mask = at < n
        moved = tl.load(step + layer * n + at, mask=mask, other=0.0)
        left = tl.load(r + layer * n + at, mask=mask, other=0.0)
        if moving:  # a stopped layer may hold NaN in p and q
            moved += factor * tl.load(p + layer * n + at, mask=mask, other=0.0)
            left -= factor * tl.load(q + layer * n + at, mask=mask, other=0.0)
            tl.store(step + layer * n + at, moved, mask=mask)
            tl.store(r + layer * n + at, left, mask=mask)
        rr += left.to(tl.float64) * left.to(tl.float64)
        dd_part += moved.to(tl.float64) * moved.to(tl.float64)
    target = sums + (layer * chunks + tl.program_id(0)) * 2
    tl.store(target, tl.sum(rr, axis=0))
    tl.store(target + 1, tl.sum(dd_part, axis=0))


@triton.jit
def turn_kernel(
    p, z, step, followings, sums, directions, state, state_out, n, chunk, chunks,
    PLAIN: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The test of convergence, then `VectorUpdates.turn`. followings: partial <r, z>; not read
    where PLAIN (z is r).
    """
    layer = tl.program_id(1).to(tl.int64)
    here = state + layer * WIDTH
    rr = sum_parts(sums + layer * chunks * 2, chunks, 2, LANES)
    dd = sum_parts(sums + layer * chunks * 2 + 1, chunks, 2, LANES)
    following = rr
    if PLAIN == 0:
        following = sum_parts(followings + layer * chunks, chunks, 1, LANES)
    good = tl.load(here + ACTIVE) != 0
    limited = tl.load(here + LIMITED)
    gain = tl.load(here + GAIN)
    decrease = tl.load(here + DECREASE)
    finished = (gain <= tl.load(here + TOLERANCE) * decrease) | (rr <= tl.load(here + ENOUGH))
    stops = good & finished & (limited == 0)
    active = good & (limited == 0) & (stops == 0)
    rho = tl.load(here + RHO)
    beta = tl.where(active, following / rho, 0.0)
    if tl.program_id(0) == 0:
        there = state_out + layer * WIDTH
        tl.store(there + RHO, tl.where(active, following, rho))
        tl.store(there + RR, rr)
        tl.store(there + DD, dd)
        tl.store(there + DECREASE, decrease)
        tl.store(there + GAIN, gain)
        tl.store(there + DONE, tl.load(here + DONE))
        tl.store(there + ACTIVE, active.to(tl.float64))
        tl.store(there + CONVERGED, tl.maximum(tl.load(here + CONVERGED), stops.to(tl.float64)))
        tl.store(there + LIMITED, limited)
        tl.store(there + BROKE, tl.load(here + BROKE))
        tl.store(there + ENOUGH, tl.load(here + ENOUGH))
        tl.store(there + LIMIT2, tl.load(here + LIMIT2))
        tl.store(there + TOLERANCE, tl.load(here + TOLERANCE))

    start = tl.program_id(0).to(tl.int64) * chunk
    lanes = tl.arange(0, BLOCK)
    factor = beta.to(p.dtype.element_ty)
    pp = tl.zeros((BLOCK,), tl.float64)
    dp = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, chunk, BLOCK):
        at = start + i + lanes
        mask = at < n
        following_p = tl.load(z + layer * n + at, mask=mask, other=0.0)
        if factor != 0:
            following_p += factor * tl.load(p + layer * n + at, mask=mask, other=0.0)
        tl.store(p + layer * n + at, following_p, mask=mask)
        wide = following_p.to(tl.float64)
        pp += wide * wide
        dp += tl.load(step + layer * n + at, mask=mask, other=0.0).to(tl.float64) * wide
    target = directions + (layer * chunks + tl.program_id(0)) * 2
    tl.store(target, tl.sum(pp, axis=0))
    tl.store(target + 1, tl.sum(dp, axis=0))


class TritonUpdates(DeviceUpdates):
    """`VectorUpdates` by Triton kernels, with the scalars in a table on the device."""

    def advance(self, q: torch.Tensor) -> None:
        self._dot(self.p, q, self._curvatures)
        self._launch(
            advance_kernel,
            self.step,
            self.r,
            self.p,
            q,
            self._curvatures,
            self._directions,
            self._sums,
            LIMITS=self.limit is not None,
        )
        self._settled = False

    def turn(self, z: torch.Tensor) -> None:
        plain = z is self.r
        if not plain:
            self._dot(self.r, z, self._followings)
        self._launch(
            turn_kernel,
            self.p,
            z,
            self.step,
            self._followings,
            self._sums,
            self._directions,
            PLAIN=plain,
        )
        self._settled = True

    @staticmethod
    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        layers = x.shape[0]
        chunk, chunks = TritonUpdates.cut(x.numel() // layers)
        parts = torch.empty(layers, chunks, dtype=torch.float64, device=x.device)
        _dot(x, y, parts, chunk)
        return parts.sum(1)

    def _dot(self, x: torch.Tensor, y: torch.Tensor, parts: torch.Tensor) -> None:
        _dot(x, y, parts, self._chunk)

    def _launch(self, kernel: Any, *tensors: torch.Tensor, **options: Any) -> None:
        launch(
            kernel,
            (self._chunks, self.step.shape[0]),
            self.step.device,
            *tensors,
            self._state,
            self._other,
            self._n,
            self._chunk,
            self._chunks,
            **options,
            BLOCK=_BLOCK,
            LANES=_BLOCK,
            num_warps=4,
        )
        self._state, self._other = self._other, self._state


def _dot(x: torch.Tensor, y: torch.Tensor, parts: torch.Tensor, chunk: int) -> None:
    layers, chunks = parts.shape
    n = x.numel() // layers
    launch(
        dot_kernel,
        (chunks, layers),
        x.device,
        x,
        y,
        parts,
        n,
        chunk,
        chunks,
        BLOCK=_BLOCK,
        num_warps=4,
    )
