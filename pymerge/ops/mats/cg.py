"""Conjugate gradient over stacked layers (M6 to M10). All scalars stay on the device; nothing waits
for the host.

Each layer of the stack has its own alpha, beta and state; one that has stopped takes steps of 0. An
iteration is four matrix products, `Run.advance` and `Run.turn`; a backend replaces the vector
updates of `Run`, or all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pymerge.backends import registry
from pymerge.backends.cg.problem import Kernel
from pymerge.backends.cg.run import CgState, Run
from pymerge.interrupt import check
from pymerge.rules.mats import MatsRule

__all__ = ["CgState", "Run", "conjugate_gradient", "run_type", "small_kernel"]

Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def run_type(device: str, backend: str = "auto") -> type[Run]:
    """The vector updates that run on a device type: "reference" is plain torch, "cpu" compiled,
    "cuda" and "triton" on a GPU.

    ValueError for an unknown backend or one that does not serve the device, RuntimeError for one
    that is not available here.
    """
    found: Any = registry.pick("cg", device, backend)[1]
    run: type[Run] = found
    return run


def small_kernel(device: str, backend: str = "auto") -> Kernel | None:
    """What solves small layers whole: the kernel of the backend, None where it has none."""
    chosen = registry.choose(device, backend)
    if chosen == "cuda" and registry.asked_for(backend) == "auto":
        # Triton's or none, as long as no measurement compares CUDA's with it and with the launches
        # that it saves.
        if registry.why_not("triton") is not None or not registry.serves("triton", device):
            return None
        chosen = "triton"
    return registry.load("cg_small", chosen) if chosen in registry.TABLE["cg_small"] else None


def conjugate_gradient(
    apply: Apply,
    precondition: Apply | None,
    step: torch.Tensor,
    r: torch.Tensor,
    rule: MatsRule,
    iterations: int,
    limit: torch.Tensor | None = None,
    small: torch.Tensor | None = None,
    run: type[Run] = Run,
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
    running = run(step, r, z, rule.objective_tolerance, limit, enough)
    for i in range(iterations):
        check()
        if running.stopped():
            break
        apply(running.p, q)
        running.advance(q)
        if i + 1 < iterations:
            running.turn(r if precondition is None else precondition(r, z))
    return running.state()
