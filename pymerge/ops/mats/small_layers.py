"""Small layers solved as a whole, each by one thread block: when, and with which operands (M6 to
M9).
"""

from __future__ import annotations

import torch

from pymerge.backends.cg.device import (
    BROKE,
    CONVERGED,
    DONE,
    ENOUGH,
    LARGEST,
    LIMIT2,
    LIMITED,
    TOLERANCE,
    WIDTH,
    SmallKernel,
    SmallLayers,
)
from pymerge.backends.cg.iteration import CgState
from pymerge.ops.mats.system import Preconditioner, System


def takes(step: torch.Tensor, precision: str) -> bool:
    """Whether one block per layer pays off: for tiny layers, and for small ones that are enough to
    fill the device.

    The bounds are reasoned, not measured: a block does the products of a layer of 64 x 64 in about
    the time of the launches that it saves.
    """
    layers, d_out, d_in = step.shape
    if precision != "fp32" or step.dtype != torch.float32 or max(d_out, d_in) > LARGEST:
        return False
    return max(d_out, d_in) <= 64 or d_out == 1 or layers >= 64


def solve(
    kernel: SmallKernel,
    system: System,
    precondition: Preconditioner,
    step: torch.Tensor,
    r: torch.Tensor,
    tolerance: float,
    iterations: int,
    limit: torch.Tensor | None,
    small: torch.Tensor,
) -> CgState:
    """As `conjugate_gradient`, in one launch; step and r are overwritten."""
    layers, d_out, d_in = step.shape
    first = system.total_a[:, None] if system.total_a is not None else system.a
    state = torch.zeros(layers, WIDTH, dtype=torch.float64, device=step.device)
    state[:, ENOUGH] = small.square()
    state[:, LIMIT2] = torch.inf if limit is None else limit.square()
    state[:, TOLERANCE] = tolerance
    held = 3 if system.b is None else 3 + first.shape[1]
    scratch = torch.empty(layers, held, d_out, d_in, dtype=step.dtype, device=step.device)
    kernel(
        SmallLayers(
            step,
            r,
            _once(first),
            None if system.b is None else system.b.contiguous(),
            None if precondition.right is None else _once(precondition.right),
            None if precondition.left is None else precondition.left.contiguous(),
            scratch,
            state,
            limit is not None,
            iterations,
        )
    )
    column = state.unbind(1)
    flags = (column[which] != 0 for which in (CONVERGED, LIMITED, BROKE))
    return CgState(step, column[DONE], *flags)


def _once(matrices: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor; a single layer's where all layers share it."""
    return (matrices[:1] if matrices.stride(0) == 0 else matrices).contiguous()
