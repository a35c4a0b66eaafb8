"""Conjugate gradient with its scalars in a table on the device: what the Triton and CUDA kernels
share.

A layer's state is a row of float64 numbers, and nothing goes to the host. Layers of any size take
four launches per iteration: partial sums of <p, q>, the step along p, partial sums of <r, z>, the
next direction. Each update reads one table and writes another, and the two are then swapped. Small
layers are solved as a whole, each by one thread block in a single launch; `SmallLayers` holds what
it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pymerge.backends.cg.iteration import CgState, VectorUpdates

# Columns of the state table, in the order of CgState in csrc/cuda/mats/cg.h.
(
    RHO,
    RR,
    DD,
    DECREASE,
    DONE,
    GAIN,
    ACTIVE,
    CONVERGED,
    LIMITED,
    BROKE,
    ENOUGH,
    LIMIT2,
    TOLERANCE,
    WIDTH,
) = range(14)

BLOCK = 1024  # what a chunk's elements are a multiple of


class DeviceUpdates(VectorUpdates):
    """`VectorUpdates` by kernels; a backend implements `dot_parts`, `advance` and `turn`."""

    LEAST = 8 * BLOCK  # elements per chunk, at least
    MOST_CHUNKS = 1024  # of a layer, since every program adds up the sums of all chunks

    def __init__(
        self,
        step: torch.Tensor,
        r: torch.Tensor,
        z: torch.Tensor,
        tolerance: float,
        limit: torch.Tensor | None,
        enough: torch.Tensor,
    ) -> None:
        super().__init__(step, r, z, tolerance, limit, enough)
        layers = step.shape[0]
        self._n = step.numel() // layers
        self._chunk, self._chunks = self.cut(self._n)

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(layers, *shape, dtype=torch.float64, device=step.device)

        self._curvatures, self._followings = table(self._chunks), table(self._chunks)
        self._sums = table(self._chunks, 2)
        # The sums over the first direction, as if one chunk had them all.
        self._directions = table(self._chunks, 2)
        self._directions[:, 0] = torch.stack((self.pp, self.dp), dim=1)
        self._state, self._other = table(WIDTH), table(WIDTH)
        square = torch.full_like(self.rho, torch.inf) if limit is None else limit.square()
        for column, value in (
            (RHO, self.rho),
            (RR, self.rr),
            (DD, self.dd),
            (ACTIVE, self.active),
            (CONVERGED, self.converged),
            (ENOUGH, enough),
            (LIMIT2, square),
        ):
            self._state[:, column] = value.double()
        self._state[:, TOLERANCE] = tolerance
        self._settled = True

    def stopped(self) -> bool:
        """Always false on a device, where finding out would mean waiting; known where kernels run
        on the host.
        """
        return (
            self.step.device.type == "cpu"
            and self._settled
            and not bool(self._state[:, ACTIVE].any())
        )

    def state(self) -> CgState:
        column = self._state.unbind(1)
        converged, limited = column[CONVERGED] != 0, column[LIMITED] != 0
        if not self._settled:  # what `turn` would have found
            rr = self._sums[:, :, 0].sum(1)
            finished = column[GAIN] <= self.tolerance * column[DECREASE]
            finished |= rr <= self.enough
            converged = converged | ((column[ACTIVE] != 0) & finished & ~limited)
        return CgState(self.step, column[DONE], converged, limited, column[BROKE] != 0)

    @classmethod
    def cut(cls, n: int) -> tuple[int, int]:
        """(elements per chunk, chunks) of a layer of n elements."""
        chunk = max(cls.LEAST, -(-n // cls.MOST_CHUNKS))
        chunk = -(-chunk // BLOCK) * BLOCK
        return chunk, max(1, -(-n // chunk))


LARGEST = 256  # rows and columns of a layer that one block of threads solves


@dataclass(frozen=True)
class SmallLayers:
    """L layers that a launch solves (M6 to M9): contiguous, on one device, fp32 but for the table.

    step, r: (L, d_out, d_in), overwritten.
    a: (L, K, d_in, d_in), or of one layer for all; K = 1 where b is None. b: (L, d_out, K d_out).
    right: (L, d_in, d_in), or of one layer for all. left: (L, d_out, d_out). None for the identity;
        left only with right and b.
    scratch: (L, 3, d_out, d_in), with b (L, 3 + K, d_out, d_in).
    state: (L, WIDTH), the columns above. Read: ENOUGH, LIMIT2, TOLERANCE. Written: DONE, CONVERGED,
        LIMITED, BROKE; others may be.
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
        """Elements from one layer's A to the next."""
        return _stride(self.a, self.step.shape[0])

    @property
    def right_stride(self) -> int:
        return 0 if self.right is None else _stride(self.right, self.step.shape[0])


SmallKernel = Callable[[SmallLayers], None]


def _stride(matrices: torch.Tensor, layers: int) -> int:
    return 0 if matrices.shape[0] < layers else matrices[0].numel()
