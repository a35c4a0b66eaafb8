"""Conjugate gradient over stacked layers (M6 to M10). All scalars stay on the device; nothing waits for the host.

Each layer of the stack has its own alpha, beta and state; one that has stopped takes steps of 0. An iteration is
four matrix products, `Run.advance` and `Run.turn`; a backend replaces the vector updates of `Run`, or all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pymerge.backends import registry
from pymerge.backends.cg.run import CgState, Run
from pymerge.backends.cg.small import Kernel
from pymerge.interrupt import check
from pymerge.rules.mats import MatsRule

__all__ = ["CgState", "Run", "conjugate_gradient", "run_type", "small_kernel"]

Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

BACKENDS = registry.BACKENDS


def run_type(device: str, backend: str = "auto") -> type[Run]:
    """The vector work that runs on a device type: "reference" is plain torch, "cpu" compiled, "cuda" and "triton" on a GPU.

    ValueError for an unknown backend or one that does not serve the device, RuntimeError for one that is not available here.
    """
    return _load(registry.choose("cg", device, backend))


def small_kernel(device: str, backend: str = "auto") -> Kernel | None:
    """What solves small layers whole: the kernel of the backend, None where it has none."""
    chosen = registry.choose("cg", device, backend)
    if chosen == "cuda" and registry.asked_for(backend) == "auto":
        # Triton's or none, as long as no measurement compares CUDA's with it and with the launches that it saves.
        if registry.why_not("triton") is not None or not registry.serves("triton", device):
            return None
        chosen = "triton"
    if chosen == "cuda":
        from pymerge.backends.cg import cuda

        return cuda.solve_small
    if chosen == "triton":
        from pymerge.triton_kernels.mats import cg_small

        return cg_small.solve_small
    return None


def _load(backend: str) -> type[Run]:
    if backend == "cpu":
        from pymerge.backends.cg.cpu import NativeRun

        return NativeRun
    if backend == "cuda":
        from pymerge.backends.cg.cuda import CudaRun

        return CudaRun
    if backend == "triton":
        from pymerge.triton_kernels.mats.cg import TritonRun

        return TritonRun
    return Run


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
