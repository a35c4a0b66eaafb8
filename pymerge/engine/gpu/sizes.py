"""The bytes in which a GPU is used: of its memory, and of pinned memory on the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceSizes:
    """align: of every operand in device memory. scratch: what the kernels may take for each model,
        besides a share of its elements. least: device memory below which nothing is tried.
    in_buffer, in_buffers: the pinned buffers of inputs, of a size that is copied at the full speed
        of the bus. piece: of one read into them. out_buffer, out_buffers: those of outputs.
    """

    align: int = 256
    scratch: int = 100 << 10
    least: int = 1 << 20
    in_buffer: int = 32 << 20
    in_buffers: int = 8
    piece: int = 8 << 20
    out_buffer: int = 32 << 20
    out_buffers: int = 4


SIZES = DeviceSizes()
