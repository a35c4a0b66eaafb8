"""fp16 outputs of finite models that overflow (N4 of docs/spec/ties.md)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from pymerge.backends import native
from pymerge.errors import NonFiniteError
from pymerge.messages.arguments import argument, takes
from pymerge.messages.words import counted, some_names
from pymerge.ops.sharded.layout import is_dtensor, local, ranks_of
from pymerge.ops.sharded.sums import added
from pymerge.rules.options import Counts

# An output with its name and what was counted while it was made.
Merged = tuple[str, torch.Tensor, "Counts | None"]


def report_overflow(merged: Sequence[Merged], non_finite: str, stacklevel: int) -> None:
    """ValueError for what overflowed fp16 in a call of `ties`, or a warning where it is let
    through: one for all tensors.

    A wider dtype is not looked at: it takes another read of the output, and inputs near 1e38. Where
    nobody waits for a GPU's counts, nobody waits for this.
    """
    narrow = [
        (name, out)
        for name, out, stats in merged
        if out.dtype == torch.float16 and stats is not None and not any(stats.non_finite)
    ]
    if not narrow:
        return
    found = {name: count for name, count in _counted(narrow) if count}
    if not found:
        return
    names = some_names(repr(name) for name in found if name)
    where = f" of {counted(len(found), 'tensor')} ({names})" if names else ""
    total = sum(found.values())
    text = (
        f"{counted(total, 'value')}{where} of the result overflow{'s' * (total == 1)} float16,"
        " though every model is"
        f" finite; its dtype is that of {'out=, else of ' if takes('out') else ''}the base, else of"
        " the first model: give it a wider one (bfloat16, float32), or choose smaller weights"
    )
    if non_finite == "error":
        if takes("non_finite"):
            text += f", or pass {argument('non_finite', 'allow')} to let them through"
        raise NonFiniteError(text)
    warnings.warn(text, stacklevel=stacklevel + 1)


def _counted(outs: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, int]]:
    """The number of non-finite elements of each output. On a GPU, one number is read where all are
    finite.
    """
    if any(is_dtensor(out) for _, out in outs):
        counts = count_all_non_finite([out for _, out in outs])
        return [(name, count) for (name, _), count in zip(outs, counts, strict=True)]
    full = [(name, out) for name, out in outs if out.numel()]
    near = [(name, out) for name, out in full if _compiled(out)]
    far = [(name, out) for name, out in full if not _compiled(out)]
    if far:
        largest = torch.nn.utils.get_total_norm([out.detach() for _, out in far], math.inf)
        near += [] if math.isfinite(float(largest)) else far
    return [(name, count_non_finite(out)) for name, out in near]


def count_all_non_finite(tensors: Sequence[torch.Tensor]) -> list[int]:
    """`count_non_finite` of each, of a DTensor over all its shards."""
    counts = [
        torch.tensor([count_non_finite(local(each))], dtype=torch.int64, device="cpu")
        for each in tensors
    ]
    return [int(sums) for sums in added([*zip(map(ranks_of, tensors), counts, strict=True)])]


def count_non_finite(tensor: torch.Tensor) -> int:
    """Number of NaN and infinite elements of a tensor."""
    if _compiled(tensor) and tensor.is_contiguous():
        where = tensor.data_ptr(), str(tensor.dtype).removeprefix("torch.")
        return native.count_non_finite(where, tensor.numel(), torch.get_num_threads())
    return int((~tensor.isfinite()).sum())


def _compiled(out: torch.Tensor) -> bool:
    """Whether the compiled kernel can count this tensor."""
    return out.device.type == "cpu" and native.why_not() is None
