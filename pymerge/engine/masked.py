"""The op `masked` on memory of model folders. Imports torch for `arcee_fusion` alone, whose
divergences it computes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pymerge.backends import native
from pymerge.rules.masked import MaskedOptions, row_of
from pymerge.rules.options import Counts

if TYPE_CHECKING:
    from pymerge.engine.executor import Buffer
    from pymerge.engine.tensor_ops import BufferCall


def merge_buffers(call: BufferCall, options: MaskedOptions) -> Counts:
    """Merge a tensor, or a part of one, where it lies (docs/spec/masked.md)."""
    assert call.base is not None
    base = call.base
    held: list[Any] = []

    def find_divergences(row: int, exact: bool) -> tuple[Buffer, float]:
        torch = importlib.import_module("torch")
        views = importlib.import_module("pymerge.engine.views")
        reference = importlib.import_module("pymerge.reference.masked")
        work = torch.float64 if tensor.wide else torch.float32
        model, start = (views.tensor_at(each, (call.count,)) for each in (call.models[0], base))
        with views.threads_of_torch(call.threads):
            held[:] = [reference.divergences(model, start, row, work, exact)]
        where = held[0].data_ptr(), "float64" if tensor.wide else "float32"
        return where, float(held[0].min())

    tensor = native.MaskedTensor(
        call.models, base, call.count, call.out[1], find_divergences, call.threads
    )
    return tensor.merge(options.rule(call.count, row_of(call.shape), tensor), call.out)
