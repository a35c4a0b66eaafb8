"""Vector updates of conjugate gradient by the compiled CPU kernels: one pass over memory each."""

from __future__ import annotations

import torch

from pymerge.backends import native
from pymerge.backends.cg.iteration import VectorUpdates
from pymerge.dtypes import name_of


class CpuUpdates(VectorUpdates):
    """For contiguous CPU tensors. Sums are in float64, and their bits do not depend on the
    threads.
    """

    @staticmethod
    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        layers = x.shape[0]
        sums = native.cg_dot(
            _buffer(x), _buffer(y), layers, x.numel() // layers, torch.get_num_threads()
        )
        return torch.tensor(sums, dtype=torch.float64, device="cpu")

    @classmethod
    def move(
        cls,
        step: torch.Tensor,
        r: torch.Tensor,
        p: torch.Tensor,
        q: torch.Tensor,
        alpha: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = native.cg_advance(
            _buffer(step),
            _buffer(r),
            _buffer(p),
            _buffer(q),
            alpha.tolist(),
            step.numel() // len(alpha),
            torch.get_num_threads(),
        )
        return _columns(sums)

    @classmethod
    def redirect(
        cls, p: torch.Tensor, z: torch.Tensor, beta: torch.Tensor, step: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = native.cg_turn(
            _buffer(p),
            _buffer(z),
            _buffer(step),
            beta.tolist(),
            p.numel() // len(beta),
            torch.get_num_threads(),
        )
        return _columns(sums)


def _columns(sums: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor(sums, dtype=torch.float64, device="cpu")
    return table[:, 0], table[:, 1]


def _buffer(tensor: torch.Tensor) -> native.Buffer:
    assert tensor.is_contiguous()
    return tensor.data_ptr(), name_of(tensor.dtype)
