"""Conjugate gradient with its scalars in a table on the device: what Triton's and CUDA's kernels
have in common.

An iteration is four launches: partial sums of <p, q>, the step along p, partial sums of <r, z>, the
next direction. A layer's state is a row of float64 numbers, read from one table and written to
another, which then change places. Nothing goes to the host.
"""

from __future__ import annotations

import torch

from pymerge.backends.cg.run import CgState, Run

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
_MOST_CHUNKS = 1024  # of a layer: what every program adds up again


class TableRun(Run):
    """`Run` by kernels: a backend has `dot_parts`, `advance` and `turn`."""

    LEAST = 8 * BLOCK  # elements a chunk, at least

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
        """Not known without waiting for the device; where kernels run on the host there is nothing
        to wait for.
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
        """(elements a chunk, chunks) of a layer of n elements."""
        chunk = max(cls.LEAST, -(-n // _MOST_CHUNKS))
        chunk = -(-chunk // BLOCK) * BLOCK
        return chunk, max(1, -(-n // chunk))
