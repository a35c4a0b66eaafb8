"""Merging by a function of tensors that somebody else wrote."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.messages.words import type_of
from pymerge.ops.ties.overflow import count_non_finite
from pymerge.rules.function import FunctionOptions
from pymerge.rules.options import Counts


def merge_tensor(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    options: FunctionOptions,
    out: torch.Tensor,
    name: str,
    backend: str,
) -> Counts:
    """Call the function and write what it returns to `out`. TypeError and ValueError for what is
    no tensor of the inputs' shape. backend: has no effect, the function computes where it likes.
    """
    in_base = 0 if base is None else count_non_finite(base)
    bad = tuple(count_non_finite(model) + in_base for model in models)
    if options.non_finite == "error" and any(bad):
        return Counts((out.numel(),) * len(models), 0, bad)  # the caller refuses
    with torch.no_grad():
        made = options.function(list(models), base, **dict(options.values))
    where = getattr(options.function, "__name__", "the function")
    if not isinstance(made, torch.Tensor):
        raise TypeError(f"{where} returned {type_of(made)} for {name!r}; it has to return a tensor")
    if made.shape != out.shape:
        raise ValueError(
            f"{where} returned shape {tuple(made.shape)} for {name!r}, whose shape is"
            f" {tuple(out.shape)}; it has to keep the shape"
        )
    out.copy_(made)
    return Counts((out.numel(),) * len(models), 0, bad)
