"""The public op `weighted_average`: diagonal Fisher merging (docs/spec/mats.md, M15)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, SupportsFloat

import torch

from pymerge.messages.arguments import checked_options
from pymerge.messages.words import counted, some_names
from pymerge.ops.mats.layer import Init, MatsLayer, check_init, initial, rounded
from pymerge.ops.mats.report import warn_of_layer
from pymerge.ops.tensors import check_floats, check_list, check_tensors
from pymerge.rules.mats import _at_least_zero, given_task_weights, trace_shares
from pymerge.rules.mats import task_weights as weights_by
from pymerge.rules.report import MatsReport
from pymerge.rules.ties import spelled
from pymerge.rules.types import TaskWeights


def weighted_average(
    weights: Sequence[torch.Tensor],
    fishers: Sequence[torch.Tensor],
    *,
    task_weights: TaskWeights | Sequence[SupportsFloat] | None = None,
    minimum: SupportsFloat = 0.0,
    init: Init = "average",
    base: torch.Tensor | None = None,
    init_options: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Average K tensors elementwise, each with its own weight per element (diagonal Fisher
    merging):

        out = sum_k w_k F_k W_k / sum_k w_k F_k

    weights: K tensors of one shape, float32, float16, bfloat16 or float64. fishers: K tensors of
        that shape, not negative.
    task_weights: w_k, K numbers, 1 by default; or "trace": 1 / (the sum of F_k), so that every
        model has the same total weight. minimum: smaller F_k become this (the official code: 1e-8).
    init: the value where the F_k of all models are 0, one is negative, or the quotient is not
        finite; see `pymerge.mats`.

    Returns a tensor of the first weight's dtype. Where a weight or an F_k holds NaN or infinity,
    all of it is `init`, with a warning that names the model (N1, N2); there is one for a negative
    F_k too (N5). Raises ValueError and
    TypeError for tensors that do not fit, TypeError for those whose values are not in their memory
    (DTensor, meta, ...; it says what to pass).

    Source: Matena, Raffel 2021, arXiv:2111.09832.
    """
    start = checked_options("init_options", init_options)
    layer = MatsLayer(weights, fishers, None, base, init, start)
    _check(layer)
    damage = damage_of(weights, fishers)
    merged = averaged(
        weights,
        fishers,
        damage,
        task_weights=task_weights,
        minimum=minimum,
        init=init,
        base=base,
        init_options=init_options,
    )
    if any(damage):
        warn_of_layer(f"{_sentence(damage)}; the tensor", stacklevel=2)
    elif negative := negative_of(fishers):
        warn_of_layer(f"{_negative_sentence(negative)}; each such element", stacklevel=2)
    return merged


# Which weights and which Fishers hold NaN or infinity, by model.
Damage = tuple[tuple[int, ...], tuple[int, ...]]


def damage_of(weights: Sequence[torch.Tensor], fishers: Sequence[torch.Tensor]) -> Damage:
    """Which weights and which Fishers are not finite (N1, N2)."""
    bad = [
        tuple(k for k, x in enumerate(tensors) if not bool(x.isfinite().all()))
        for tensors in (weights, fishers)
    ]
    return bad[0], bad[1]


def negative_of(fishers: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """N5: which of the Fishers have negative elements."""
    return tuple(k for k, x in enumerate(fishers) if x.numel() and bool(x.amin() < 0))


def averaged(
    weights: Sequence[torch.Tensor],
    fishers: Sequence[torch.Tensor],
    damage: Damage,
    *,
    task_weights: TaskWeights | Sequence[SupportsFloat] | None = None,
    minimum: SupportsFloat = 0.0,
    init: Init = "average",
    base: torch.Tensor | None = None,
    init_options: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """`weighted_average` without the warning, for tensors or equal parts of them. damage: of the
    whole tensors.
    """
    start = checked_options("init_options", init_options)
    layer = MatsLayer(weights, fishers, None, base, init, start)
    _check(layer)
    first = weights[0]
    least = _at_least_zero("minimum", minimum)
    given = given_task_weights("raw" if task_weights is None else task_weights, len(weights))
    totals = [float(f.sum(dtype=torch.float64)) for f in fishers] if given == "trace" else []
    shares = weights_by(given, totals or [1.0] * len(weights), None)
    work = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    largest = torch.finfo(work).max
    if least > largest:
        raise ValueError(f"{spelled('minimum', least)} is above {largest:.6g}, the largest {work}")
    if len(damage[0]) == len(weights):
        raise ValueError("every model holds NaN or infinity; mend the models (N2)")
    if any(damage):
        return rounded(initial(layer, work, damage[0]), first.dtype)
    top = torch.zeros(first.shape, dtype=work, device=first.device)
    bottom = torch.zeros_like(top)
    for share, weight, fisher in zip(shares, weights, fishers, strict=True):
        part = fisher.detach().to(work).clamp(min=least).mul_(share)
        top.addcmul_(part, weight.detach().to(work))
        bottom.add_(part)
    quotient = top / bottom
    sound = (bottom != 0) & quotient.isfinite()
    for k in negative_of(fishers):
        sound &= fishers[k] >= 0
    if bool(sound.all()):
        return quotient.to(first.dtype)
    return rounded(torch.where(sound, quotient, initial(layer, work)), first.dtype)


def _check(layer: MatsLayer) -> None:
    """E1 and E2: weights, and instead of Gram matrices a Fisher of each weight's shape."""
    weights, fishers = layer.weights, layer.input_grams
    check_list(weights, layer.base, "weights")
    check_tensors(weights, layer.base, "weights", "weighted_average")
    first, count = weights[0], len(weights)
    check_list(fishers, None, "fishers")
    if len(fishers) != count:
        raise ValueError(
            f"fishers has {counted(len(fishers), 'tensor')} for {counted(count, 'model')}; pass one"
            " per model"
        )
    for k, fisher in enumerate(fishers):
        check_floats(f"fishers[{k}]", fisher, "weighted_average")
        if fisher.shape != first.shape or fisher.device != first.device:
            raise ValueError(
                f"fishers[{k}] has shape {tuple(fisher.shape)} on {fisher.device}, the weights "
                f"{tuple(first.shape)} on {first.device}; they must be equal"
            )
    check_init(layer)


def fisher_report(
    name: str,
    totals: Sequence[float],
    damage: Damage,
    task_weights: TaskWeights | Sequence[float] | None = None,
    negative: Collection[int] = (),
) -> MatsReport:
    """What happened to a tensor. totals: the sum of each model's F_k. negative: models that have
    F_k below 0.
    """
    if any(damage):
        return MatsReport(name, "non_finite", "fisher", message=_sentence(damage))
    given = given_task_weights(task_weights or "raw", len(totals))
    shares = trace_shares(weights_by(given, totals, None), totals)
    status, message = "exact" if shares else "no_statistics", ""
    if negative:
        status, message = "not_positive", _negative_sentence(negative)
    return MatsReport(name, status, "fisher", trace_shares=shares, message=message)


def _negative_sentence(models: Collection[int]) -> str:
    return f"{some_names(f'fishers[{k}]' for k in sorted(models))}: negative values"


def _sentence(damage: Damage) -> str:
    named = [
        f"{what}[{k}]"
        for what, bad in zip(("weights", "fishers"), damage, strict=True)
        for k in bad
    ]
    return f"{some_names(named)}: NaN or infinity"
