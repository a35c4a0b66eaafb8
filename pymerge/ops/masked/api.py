"""The op `masked` on tensors: validate, choose the backend, call (docs/spec/masked.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.backends import registry
from pymerge.messages.arguments import argument
from pymerge.ops.memory import check_readable
from pymerge.ops.tensors import check_out, check_tensors
from pymerge.ops.ties.api import refuse_non_finite
from pymerge.ops.ties.overflow import report_overflow
from pymerge.rules.masked import MaskedOptions
from pymerge.rules.options import Counts


def masked(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    options: MaskedOptions,
    out: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Merge tensors that nobody has looked at yet; raises as `pymerge.ties` does."""
    if base is None:
        raise ValueError(
            f"{argument('base')} is missing; {options.method} merges task vectors, the differences"
            " from a base model"
        )
    check_tensors(models, base)
    if out is None:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
        check_readable("the result", out)  # a mode of torch may make another kind of tensor
    else:
        check_out(out, models, base)
    counts = merge_tensor(models, base, options, out, "", backend)
    if options.non_finite == "error" and any(counts.non_finite):
        refuse_non_finite(counts, out.numel(), "")
    report_overflow([("", out, counts)], options.non_finite, stacklevel=4)
    return out


def merge_tensor(
    models: Sequence[torch.Tensor],
    base: torch.Tensor,
    options: MaskedOptions,
    out: torch.Tensor,
    name: str,
    backend: str,
) -> Counts:
    """Merge checked tensors into `out`. name: has no effect, nothing is drawn.

    RuntimeError for a backend that is asked for by name and has no kernels for the op.
    """
    function = registry.pick_or_reference("masked", out.device.type, backend, options.method)[1]
    counts: Counts = function(models, base, options, out)
    return counts
