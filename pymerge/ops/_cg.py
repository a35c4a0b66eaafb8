"""Conjugate gradient over stacked layers (M6 to M10). All scalars stay on the device; nothing waits for the host.

Each layer of the stack has its own alpha, beta and state; one that has stopped takes steps of 0. The vector work
of an iteration goes through `Vectors`, which a backend may replace by fused kernels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pymerge import _dispatch
from pymerge.ops._mats_rule import MatsRule

Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class CgState:
    """What a run of CG leaves, per layer (L,): step (L, d_out, d_in), iterations done, and why it stopped."""

    step: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor
    limited: torch.Tensor
    broke: torch.Tensor


class Vectors:
    """The vector updates of an iteration in plain torch. Scalars are (L,) float64 tensors."""

    @staticmethod
    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """<x, y> per layer."""
        return torch.linalg.vecdot(x.flatten(1), y.flatten(1)).double()

    @staticmethod
    def advance(
        step: torch.Tensor, r: torch.Tensor, p: torch.Tensor, q: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """step += alpha p, r -= alpha q; nothing at all where alpha is 0. Returns (<r, r>, <step, step>)."""
        scale = alpha.to(step.dtype)[:, None, None]
        moving = scale != 0
        if step.shape[0] == 1 and step.device.type == "cpu":
            if bool(moving):
                value = float(scale)
                step.add_(p, alpha=value)
                r.sub_(q, alpha=value)
        else:
            torch.where(moving, torch.addcmul(step, scale, p), step, out=step)
            torch.where(moving, torch.addcmul(r, scale, q, value=-1), r, out=r)
        return Vectors.dot(r, r), Vectors.dot(step, step)

    @staticmethod
    def turn(
        p: torch.Tensor, z: torch.Tensor, beta: torch.Tensor, step: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p = z + beta p. Returns (<p, p>, <step, p>)."""
        scale = beta.to(p.dtype)[:, None, None]
        torch.where(scale != 0, torch.addcmul(z, scale, p), z, out=p)
        return Vectors.dot(p, p), Vectors.dot(step, p)


BACKENDS = ("reference", "cpu", "triton")


def vectors_for(device: str, backend: str = "auto") -> type[Vectors]:
    """The vector updates that run on a device type: "reference" is plain torch, "cpu" compiled, "triton" on a GPU.

    ValueError for an unknown backend or one that does not serve the device, RuntimeError for one that is not available here.
    """
    asked = os.environ.get("PYMERGE_BACKEND", "auto") if backend == "auto" else backend
    if asked == "auto":
        for name in _dispatch.ORDER.get(device, ()):
            if name in BACKENDS and _dispatch.why_not(name) is None:
                return _vectors(name)
        return Vectors
    if (
        asked == "cuda"
    ):  # its matrix products are torch's, its vector updates Triton's where there is Triton
        asked = "triton" if _dispatch.why_not("triton") is None else "reference"
    if asked not in BACKENDS:
        raise ValueError(
            f"backend={asked!r} is not one of 'auto', {', '.join(map(repr, BACKENDS))}"
        )
    reason = _dispatch.why_not(asked)
    if reason is not None:
        raise RuntimeError(f"backend {asked!r} is not available: {reason}")
    if not _dispatch.serves(asked, device):
        raise ValueError(
            f"backend {asked!r} does not take tensors on {device!r}; move them, or pass backend='auto'"
        )
    return _vectors(asked)


def _vectors(backend: str) -> type[Vectors]:
    if backend == "cpu":
        from pymerge.ops._cg_cpu import NativeVectors

        return NativeVectors
    if backend == "triton":
        from pymerge.triton_kernels.cg import TritonVectors

        return TritonVectors
    return Vectors


def conjugate_gradient(
    apply: Apply,
    precondition: Apply | None,
    step: torch.Tensor,
    r: torch.Tensor,
    rule: MatsRule,
    iterations: int,
    limit: torch.Tensor | None = None,
    small: torch.Tensor | None = None,
    vectors: type[Vectors] = Vectors,
) -> CgState:
    """Run up to `iterations` iterations from `step` with residual `r`; both are overwritten.

    apply(x, out), precondition(r, out): 𝓐 and P^-1; None for P = I.
    limit: (L,) largest ||step||. small: (L,) the ||r|| at which a layer has converged.
    """
    layers = step.shape[0]
    device = step.device
    q = torch.empty_like(step)
    z = r if precondition is None else precondition(r, torch.empty_like(step))
    p = z.clone()
    zero = torch.zeros(layers, dtype=torch.float64, device=device)
    no = torch.zeros(layers, dtype=torch.bool, device=device)
    rho = vectors.dot(r, z)
    rr = rho if precondition is None else vectors.dot(r, r)
    enough = zero if small is None else small.square()
    pp, dp, dd = zero, zero, zero
    if limit is not None:
        pp, dp, dd = vectors.dot(p, p), vectors.dot(step, p), vectors.dot(step, step)
    converged = rr <= enough
    limited, broke = no, no
    active = ~converged
    done, decrease = zero, zero
    on_host = device.type == "cpu"
    for i in range(iterations):
        if on_host and not bool(active.any()):
            break
        apply(p, q)
        curvature = vectors.dot(p, q)
        alpha = rho / curvature
        # M9: comparisons with NaN are false, so this one catches it.
        good = active & (curvature > 0) & (curvature < math.inf) & (rho > 0) & (alpha < math.inf)
        broke = broke | (active & ~good)
        if limit is not None:
            room = (limit.square() - dd).clamp(min=0)
            over = good & ~(dd + 2 * alpha * dp + alpha.square() * pp <= limit.square())
            to_boundary = ((dp.square() + pp * room).sqrt() - dp) / pp
            alpha = torch.where(over, to_boundary, alpha)
            limited = limited | over
        alpha = torch.where(good, alpha, zero)
        rr, dd = vectors.advance(step, r, p, q, alpha)
        gain = torch.where(good, alpha * rho - alpha.square() * curvature / 2, zero)
        decrease = decrease + gain
        done = done + good
        finished = (gain <= rule.objective_tolerance * decrease) | (rr <= enough)
        converged = converged | (good & finished & ~limited)
        active = good & ~limited & ~converged
        if i + 1 == iterations:
            break
        if precondition is not None:
            precondition(r, z)
        following = rr if precondition is None else vectors.dot(r, z)
        beta = torch.where(active, following / rho, zero)
        rho = torch.where(active, following, rho)
        pp, dp = vectors.turn(p, z, beta, step)
    return CgState(step, done, converged, limited, broke)
