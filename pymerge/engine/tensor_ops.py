"""The ops beside `ties` by which planned tensors are merged: on tensors, and on memory that holds
tensors of model folders.

`ties` has calls of its own for many tensors and for parts (`pymerge.ops.ties.api.merge_many`,
`pymerge.engine.cpu.merge_unit`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.dtypes import elements
from pymerge.rules.options import BufferCall, Counts, OpOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorOp:
    """Where the two functions of an op are, as "module:function".

    tensors: function(models, base, options, out, name, backend) -> Counts, of checked tensors.
    buffers: function(call, options) -> Counts; "" views the memory as tensors, which needs torch.
    """

    tensors: str
    buffers: str = ""


OPS: dict[str, TensorOp] = {
    "function": TensorOp("pymerge.ops.function:merge_tensor"),
    "gram": TensorOp("pymerge.ops.gram.methods:merge_tensor", "pymerge.ops.gram.buffers:merge"),
    "masked": TensorOp("pymerge.ops.masked.api:merge_tensor", "pymerge.ops.masked.buffers:merge"),
    "matrix": TensorOp("pymerge.ops.matrix.api:merge_tensor"),
}


def merge_tensor(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    options: OpOptions,
    out: torch.Tensor,
    name: str = "",
    backend: str = "auto",
) -> Counts:
    """Merge checked tensors into `out` by the op of these options."""
    counts: Counts = _function(OPS[options.op].tensors)(models, base, options, out, name, backend)
    return counts


def merge_buffers(call: BufferCall, options: OpOptions) -> Counts:
    """Merge what lies in memory by the op of these options, on the CPU."""
    op = OPS[options.op]
    if op.buffers:
        counts: Counts = _function(op.buffers)(call, options)
        return counts
    views = importlib.import_module("pymerge.engine.views")
    shape = call.shape if call.first == 0 and call.count == elements(call.shape) else (call.count,)
    models = [views.tensor_at(buffer, shape) for buffer in call.models]
    base = None if call.base is None else views.tensor_at(call.base, shape)
    with views.threads_of_torch(call.threads):
        return merge_tensor(
            models, base, options, views.tensor_at(call.out, shape), call.name, "cpu"
        )


@functools.cache
def _function(where: str) -> Callable[..., Any]:
    module, name = where.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
