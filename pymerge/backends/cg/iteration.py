"""Conjugate gradient over stacked layers (docs/spec/mats.md, M6 to M10): one iteration and its
decisions.

An iteration is four matrix products, `VectorUpdates.advance` and `VectorUpdates.turn`. Each layer
of the stack has its own alpha, beta and state; one that has stopped takes steps of 0. All scalars
stay on the device; nothing waits for the host.

The base class is plain torch. The CPU's compiled kernels replace its three sums and updates (`dot`,
`move`, `redirect`), the GPU's replace `advance` and `turn`, decisions included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pymerge.interrupt import check
from pymerge.rules.mats import MatsRule

Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class CgState:
    """The outcome of conjugate gradient: step (L, d_out, d_in), and per layer (L,) the iterations
    done and why it stopped.
    """

    step: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor
    limited: torch.Tensor
    broke: torch.Tensor


class VectorUpdates:
    """The vectors and scalars of a solve, in plain torch. Scalars are (L,) float64 tensors.

    step, r: overwritten. z: P^-1 r. limit: largest ||step||, None for none. enough: ||r||^2 at
        which a layer has converged.
    """

    def __init__(
        self,
        step: torch.Tensor,
        r: torch.Tensor,
        z: torch.Tensor,
        tolerance: float,
        limit: torch.Tensor | None,
        enough: torch.Tensor,
    ) -> None:
        self.step, self.r, self.p = step, r, z.clone()
        self.tolerance, self.enough = tolerance, enough
        self.limit = limit
        layers, device = step.shape[0], step.device
        zero = torch.zeros(layers, dtype=torch.float64, device=device)
        no = torch.zeros(layers, dtype=torch.bool, device=device)
        self.rho = self.dot(r, z)
        self.rr = self.rho if z is r else self.dot(r, r)
        self.pp, self.dp, self.dd = zero, zero, zero
        if limit is not None:
            self.pp, self.dp, self.dd = self.dot(z, z), self.dot(step, z), self.dot(step, step)
        self.converged = self.rr <= enough
        self.limited, self.broke = no, no
        self.active = ~self.converged
        self.done, self.decrease = zero, zero

    def advance(self, q: torch.Tensor) -> None:
        """One step along p, where q is p's image: step += alpha p, r -= alpha q (M6, M8, M9)."""
        curvature = self.dot(self.p, q)
        alpha = self.rho / curvature
        # M9: comparisons with NaN are false, so this one catches it.
        good = (
            self.active
            & (curvature > 0)
            & (curvature < math.inf)
            & (self.rho > 0)
            & (alpha < math.inf)
        )
        self.broke = self.broke | (self.active & ~good)
        if self.limit is not None:
            square = self.limit.square()
            ahead = self.dd + 2 * alpha * self.dp + alpha.square() * self.pp
            over = good & ~(ahead <= square)
            room = (square - self.dd).clamp(min=0)
            to_boundary = ((self.dp.square() + self.pp * room).sqrt() - self.dp) / self.pp
            alpha = torch.where(over, to_boundary, alpha)
            self.limited = self.limited | over
        alpha = torch.where(good, alpha, 0.0)
        gain = torch.where(good, alpha * self.rho - alpha.square() * curvature / 2, 0.0)
        self.decrease = self.decrease + gain
        self.done = self.done + good
        self.rr, self.dd = self.move(self.step, self.r, self.p, q, alpha)
        finished = (gain <= self.tolerance * self.decrease) | (self.rr <= self.enough)
        self.converged = self.converged | (good & finished & ~self.limited)
        self.active = good & ~self.limited & ~self.converged

    def turn(self, z: torch.Tensor) -> None:
        """The next direction: p = z + beta p, where z is P^-1 r."""
        following = self.rr if z is self.r else self.dot(self.r, z)
        beta = torch.where(self.active, following / self.rho, 0.0)
        self.rho = torch.where(self.active, following, self.rho)
        self.pp, self.dp = self.redirect(self.p, z, beta, self.step)

    def stopped(self) -> bool:
        """Whether all layers have stopped, where that is known without waiting for a device."""
        return self.step.device.type == "cpu" and not bool(self.active.any())

    def state(self) -> CgState:
        return CgState(self.step, self.done, self.converged, self.limited, self.broke)

    @staticmethod
    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """<x, y> per layer."""
        return torch.linalg.vecdot(x.flatten(1), y.flatten(1)).double()

    @classmethod
    def move(
        cls,
        step: torch.Tensor,
        r: torch.Tensor,
        p: torch.Tensor,
        q: torch.Tensor,
        alpha: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """step += alpha p, r -= alpha q; layers with alpha 0 are untouched. Returns (<r, r>, <step,
        step>).
        """
        scale = alpha.to(step.dtype)[:, None, None]
        torch.where(scale != 0, torch.addcmul(step, scale, p), step, out=step)
        torch.where(scale != 0, torch.addcmul(r, scale, q, value=-1), r, out=r)
        return cls.dot(r, r), cls.dot(step, step)

    @classmethod
    def redirect(
        cls, p: torch.Tensor, z: torch.Tensor, beta: torch.Tensor, step: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p = z + beta p; p = z where beta is 0. Returns (<p, p>, <step, p>)."""
        scale = beta.to(p.dtype)[:, None, None]
        torch.where(scale != 0, torch.addcmul(z, scale, p), z, out=p)
        return cls.dot(p, p), cls.dot(step, p)


def conjugate_gradient(
    apply: Apply,
    precondition: Apply | None,
    step: torch.Tensor,
    r: torch.Tensor,
    rule: MatsRule,
    iterations: int,
    limit: torch.Tensor | None = None,
    small: torch.Tensor | None = None,
    updates: type[VectorUpdates] = VectorUpdates,
) -> CgState:
    """Run up to `iterations` iterations from `step` with residual `r`; both are overwritten.

    apply(x, out), precondition(r, out): 𝓐 and P^-1; None for P = I.
    limit: (L,) largest ||step||. small: (L,) the ||r|| at which a layer has converged.
    """
    enough = torch.zeros(step.shape[0], dtype=torch.float64, device=step.device)
    if small is not None:
        enough = small.square()
    q = torch.empty_like(step)
    z = r if precondition is None else precondition(r, torch.empty_like(step))
    running = updates(step, r, z, rule.objective_tolerance, limit, enough)
    for i in range(iterations):
        check()
        if running.stopped():
            break
        apply(running.p, q)
        running.advance(q)
        if i + 1 < iterations:
            running.turn(r if precondition is None else precondition(r, z))
    return running.state()
