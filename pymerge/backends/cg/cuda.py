"""Vector updates of conjugate gradient by the compiled CUDA kernels (csrc/cuda/mats/cg.h), on the
current stream.
"""

from __future__ import annotations

from typing import Any

import torch

from pymerge.backends import cuda, native
from pymerge.backends.cg.device import BLOCK, DeviceUpdates, SmallLayers
from pymerge.dtypes import name_of


class CudaUpdates(DeviceUpdates):
    """For contiguous tensors on an NVIDIA GPU, with the scalars in a table in its memory."""

    # Not measured. With it, a layer of 512 x 512 is cut into about as many chunks as a device has
    # multiprocessors.
    LEAST = 2 * BLOCK

    def advance(self, q: torch.Tensor) -> None:
        _dot(self.p, q, self._curvatures, self._chunk)
        self._launch(
            "advance",
            self.step,
            self.r,
            self.p,
            q,
            self._curvatures,
            None if self.limit is None else self._directions,
            self._sums,
        )
        self._settled = False

    def turn(self, z: torch.Tensor) -> None:
        plain = z is self.r
        if not plain:
            _dot(self.r, z, self._followings, self._chunk)
        self._launch(
            "turn",
            self.p,
            z,
            self.step,
            None if plain else self._followings,
            self._sums,
            None if self.limit is None else self._directions,
        )
        self._settled = True

    @staticmethod
    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        layers = x.shape[0]
        chunk, chunks = CudaUpdates.cut(x.numel() // layers)
        parts = torch.empty(layers, chunks, dtype=torch.float64, device=x.device)
        _dot(x, y, parts, chunk)
        return parts.sum(1)

    def _launch(self, name: str, *tensors: torch.Tensor | None) -> None:
        addresses = [0 if x is None else _address(x) for x in tensors]
        tables = _address(self._state), _address(self._other)
        launch = getattr(_call(self.step, self._chunk), name)
        launch(*addresses, *tables, *cuda.place(self.step.device))
        self._state, self._other = self._other, self._state


def solve_small(problem: SmallLayers) -> None:
    """Solve `SmallLayers`, one thread block per layer."""
    addresses = (problem.step, problem.r, problem.a, problem.b, problem.right, problem.left)
    native.cuda().cg_small(
        *problem.step.shape,
        problem.a.shape[1],
        *(0 if x is None else _address(x) for x in addresses),
        problem.a_stride,
        problem.right_stride,
        _address(problem.scratch),
        _address(problem.state),
        problem.limits,
        problem.iterations,
        *cuda.place(problem.step.device),
    )


def _dot(x: torch.Tensor, y: torch.Tensor, parts: torch.Tensor, chunk: int) -> None:
    _call(x, chunk).dot(_address(x), _address(y), _address(parts), *cuda.place(x.device))


def _call(x: torch.Tensor, chunk: int) -> Any:
    """Launchers for the dtype and device of vectors like x."""
    layers = x.shape[0]
    return native.cuda().Cg(layers, x.numel() // layers, chunk, name_of(x.dtype))


def _address(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
