"""Conjugate gradient on small layers, each whole in one block of threads (M6 to M9): what Triton's
and CUDA's kernels have in common.

A launch solves L layers of at most 256 x 256 in fp32: products, preconditioner, updates, every
decision. Nothing else is launched and nothing goes to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

LARGEST = 256


@dataclass(frozen=True)
class Problem:
    """What a launch reads and writes: contiguous, on one device, fp32 but for the table.

    step, r: (L, d_out, d_in), overwritten.
    a: (L, K, d_in, d_in), or of one layer for all; K = 1 where b is None. b: (L, d_out, K d_out).
    right: (L, d_in, d_in), or of one layer for all. left: (L, d_out, d_out). None for the identity;
        left only with right and b.
    scratch: (L, 3, d_out, d_in), with b (L, 3 + K, d_out, d_in).
    state: (L, WIDTH), the columns of `_cg_table`. Read: ENOUGH, LIMIT2, TOLERANCE. Written: DONE,
        CONVERGED, LIMITED, BROKE; others may be.
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


def _stride(matrices: torch.Tensor, layers: int) -> int:
    return 0 if matrices.shape[0] < layers else matrices[0].numel()
