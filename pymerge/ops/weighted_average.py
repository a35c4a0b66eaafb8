"""The public op `weighted_average`: diagonal Fisher merging (docs/spec/mats.md, M15)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pymerge.ops._mats_layer import Init, MatsLayer, initial
from pymerge.ops._mats_rule import _at_least_zero, given_task_weights
from pymerge.ops._tensors import check_tensors


def weighted_average(
    weights: Sequence[torch.Tensor],
    fishers: Sequence[torch.Tensor],
    *,
    task_weights: Sequence[float] | None = None,
    minimum: float = 0.0,
    init: Init = "average",
    base: torch.Tensor | None = None,
    init_options: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Average K tensors elementwise, each with its own weight per element (diagonal Fisher merging):

        out = sum_k w_k F_k W_k / sum_k w_k F_k

    weights: K tensors of one shape, float32, float16, bfloat16 or float64. fishers: K tensors of that shape, not negative.
    task_weights: w_k, K numbers; 1 by default. minimum: smaller F_k become this (the official code: 1e-8).
    init: the value where the F_k of all models are 0 or the quotient is not finite; see `pymerge.mats`.

    Returns a tensor of the first weight's dtype. Raises ValueError and TypeError for tensors that do not fit.

    Source: Matena, Raffel 2021, arXiv:2111.09832.
    """
    check_tensors(weights, base)
    first = weights[0]
    if len(fishers) != len(weights):
        raise ValueError(
            f"fishers has {len(fishers)} tensors for {len(weights)} models; pass one per model"
        )
    for k, fisher in enumerate(fishers):
        if fisher.shape != first.shape or fisher.device != first.device:
            raise ValueError(
                f"fishers[{k}] has shape {tuple(fisher.shape)} on {fisher.device}, the weights "
                f"{tuple(first.shape)} on {first.device}; they must be equal"
            )
    _at_least_zero("minimum", minimum)
    shares = given_task_weights(
        [1.0] * len(weights) if task_weights is None else task_weights, len(weights)
    )
    if isinstance(shares, str):
        raise ValueError(
            f"task_weights={shares!r}: a diagonal Fisher has no matrix trace; pass {len(weights)} numbers"
        )
    work = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    top = torch.zeros(first.shape, dtype=work, device=first.device)
    bottom = torch.zeros_like(top)
    finite = torch.ones_like(top, dtype=torch.bool)
    for share, weight, fisher in zip(shares, weights, fishers, strict=True):
        part = fisher.detach().to(work).clamp(min=minimum).mul_(share)
        top.addcmul_(part, weight.detach().to(work))
        bottom.add_(part)
        finite &= weight.detach().isfinite()
    quotient = top / bottom
    sound = (bottom != 0) & quotient.isfinite()
    if bool(sound.all()):
        return quotient.to(first.dtype)
    held = [w for w in weights if bool(w.isfinite().all())]
    if not held:
        raise ValueError("every model holds NaN or infinity; mend the models (N2)")
    start = initial(MatsLayer(weights, fishers, None, base, init, init_options or {}), held, work)
    return torch.where(sound, quotient, start).to(first.dtype)
