"""Conjugate gradient on small layers, each whole in one block of threads (M6 to M9): what Triton's and CUDA's kernels have in common.

A launch solves L layers of at most 256 x 256 in fp32: products, preconditioner, updates, every decision. Nothing else is launched and
nothing goes to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pymerge.ops._cg_run import CgState
from pymerge.ops._cg_table import (
    BROKE,
    CONVERGED,
    DONE,
    ENOUGH,
    LIMIT2,
    LIMITED,
    TOLERANCE,
    WIDTH,
)
from pymerge.ops._mats_system import Preconditioner, System

LARGEST = 256


@dataclass(frozen=True)
class Problem:
    """What a launch reads and writes: contiguous, on one device, fp32 but for the table.

    step, r: (L, d_out, d_in), overwritten.
    a: (L, K, d_in, d_in), or of one layer for all; K = 1 where b is None. b: (L, d_out, K d_out).
    right: (L, d_in, d_in), or of one layer for all. left: (L, d_out, d_out). None for the identity; left only with right and b.
    scratch: (L, 3, d_out, d_in), with b (L, 3 + K, d_out, d_in).
    state: (L, WIDTH), the columns of `_cg_table`. Read: ENOUGH, LIMIT2, TOLERANCE. Written: DONE, CONVERGED, LIMITED, BROKE; others may be.
    limits: whether LIMIT2 bounds any step.
    """

    step: torch.Tensor
    r: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor | None
    right: torch.Tensor | None
    left: torch.Tensor | None
    scratch: torch.Tensor
    state: torch.Tensor
    limits: bool
    iterations: int

    @property
    def a_stride(self) -> int:
        """Elements from one layer's A to the next one's."""
        return _stride(self.a, self.step.shape[0])

    @property
    def right_stride(self) -> int:
        return 0 if self.right is None else _stride(self.right, self.step.shape[0])


Kernel = Callable[[Problem], None]


def takes(step: torch.Tensor, precision: str) -> bool:
    """Whether a block a layer is the way: small layers, and tiny ones or enough of them to fill the device.

    The bounds are reasoned, not measured: a block does the products of a layer of 64 x 64 in about the time of the launches
    that it saves.
    """
    layers, d_out, d_in = step.shape
    if precision != "fp32" or step.dtype != torch.float32 or max(d_out, d_in) > LARGEST:
        return False
    return max(d_out, d_in) <= 64 or d_out == 1 or layers >= 64


def solve(
    kernel: Kernel,
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
    first = system.total_a[:, None] if system.total_a is not None else system.a
    state = torch.zeros(layers, WIDTH, dtype=torch.float64, device=step.device)
    state[:, ENOUGH] = small.square()
    state[:, LIMIT2] = torch.inf if limit is None else limit.square()
    state[:, TOLERANCE] = tolerance
    held = 3 if system.b is None else 3 + first.shape[1]
    scratch = torch.empty(layers, held, d_out, d_in, dtype=step.dtype, device=step.device)
    kernel(
        Problem(
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
    """Contiguous; one layer's where all layers share them."""
    return (matrices[:1] if matrices.stride(0) == 0 else matrices).contiguous()


def _stride(matrices: torch.Tensor, layers: int) -> int:
    return 0 if matrices.shape[0] < layers else matrices[0].numel()
