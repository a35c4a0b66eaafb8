"""The op `masked` on memory of model folders."""

from __future__ import annotations

from pymerge.backends.native_masked import MaskedTensor
from pymerge.rules.masked import MaskedOptions, row_of
from pymerge.rules.options import BufferCall, Counts


def merge(call: BufferCall, options: MaskedOptions) -> Counts:
    """Merge a tensor, or a part of one, where it lies (docs/spec/masked.md)."""
    assert call.base is not None
    tensor = MaskedTensor(call.models, call.base, call.count, call.out[1], call.threads)
    return tensor.merge(options.rule(call.count, row_of(call.shape), tensor), call.out)
