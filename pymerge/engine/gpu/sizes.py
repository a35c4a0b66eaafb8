"""Buffer sizes on the GPU and in pinned host memory, in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceSizes:
    """Bytes, but for `in_buffers` and `out_buffers`, which are counts.

    align: the alignment of every operand in device memory. scratch: what the kernels may take for
        each model, besides a share of its elements. least: the least device memory with which a
        merge is tried.
    in_buffer, in_buffers: the pinned buffers of inputs, large enough to be copied at the full
        speed of the bus. piece: the size of one read into them. out_buffer, out_buffers: the
        pinned buffers of outputs.
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
