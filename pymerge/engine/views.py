"""The memory of model folders viewed as torch tensors, in place."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch

from pymerge.dtypes import elements, item_size, torch_dtype
from pymerge.engine.executor import Buffer


def tensor_at(buffer: Buffer, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of this shape that lies at (address, dtype); it must not outlive the memory."""
    address, name = buffer
    dtype, length = torch_dtype(name), elements(shape) * item_size(name)
    if length == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = (ctypes.c_ubyte * length).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@contextlib.contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    """Inside, torch uses the merge's number of threads; 0 leaves torch's own."""
    before = torch.get_num_threads()
    if threads:
        # No more than there are processors: torch aborts the process if the system cannot start
        # a thread.
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
