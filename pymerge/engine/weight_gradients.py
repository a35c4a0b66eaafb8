"""Gradients of a merge with respect to its weights, for methods whose weights choose no element:

    out = base + scaling * sum_k w_k delta'_k          d out / d w_k = scaling * delta'_k

and where the sum is divided by W = sum_k w_k: scaling * (delta'_k - merged) / W. delta'_k are the
task vectors as trimming leaves them (T3, T3r), which is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pymerge.engine.mappings import Mappings
from pymerge.messages.arguments import argument
from pymerge.ops.ties.api import ties
from pymerge.planning.plan import PlannedTensor
from pymerge.rules.ties import TiesOptions

_NO_DIVISOR = 1e-8  # T5


def tracked_weights(value: Any, count: int) -> torch.Tensor | None:
    """The weights as one tensor (count,) where any of them requires a gradient, else None."""
    if not torch.is_grad_enabled():
        return None
    if isinstance(value, torch.Tensor):
        if not value.requires_grad:
            return None
        return value.expand(count) if value.dim() == 0 else value
    if not isinstance(value, (list, tuple)):
        return None
    tensors = [each for each in value if isinstance(each, torch.Tensor)]
    if not any(each.requires_grad for each in tensors):
        return None
    like = next(each for each in tensors if each.requires_grad)
    return torch.stack(
        [torch.as_tensor(each, dtype=like.dtype, device=like.device).reshape(()) for each in value]
    )


def check_differentiable(options: object, method: str) -> None:
    """ValueError for options by which a change of the weights changes more than the weights."""
    assert isinstance(options, TiesOptions)  # other ops refuse such weights by themselves
    if options.elect == "none" and options.merge in ("sum", "weighted_mean"):
        return
    what = "elects signs" if options.elect != "none" else f"merges by merge={options.merge!r}"
    raise ValueError(
        f"{argument('weights')} requires a gradient, which there is for methods that sum or average"
        " without an election (linear, task_arithmetic, dare_linear, breadcrumbs);"
        f" {method} {what}. Pass weights.detach(), or merge under torch.no_grad()"
    )


def with_gradient(
    weights: torch.Tensor,
    merged: dict[str, torch.Tensor],
    tensors: Sequence[PlannedTensor],
    inputs: Mappings,
    options: object,
) -> dict[str, torch.Tensor]:
    """The result of a merge whose tensors know how they depend on the weights.

    weights: (K,). merged: by name, tied names the same tensor. tensors: those of the plan that were
    computed. The inputs must not change before the backward pass.
    """
    # Running statistics of normalisation, say, are averaged whatever the weights are.
    made = [tensor for tensor in tensors if tensor.options == options]
    if not made:
        return merged
    held = [merged[tensor.name] for tensor in made]
    results = _Merged.apply(weights, made, inputs, options, *held)  # type: ignore[no-untyped-call]
    new = {id(old): result for old, result in zip(held, results, strict=True)}
    return {name: new.get(id(tensor), tensor) for name, tensor in merged.items()}


class _Merged(torch.autograd.Function):
    """Passes merged tensors on, and gives their gradient to the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        made: Sequence[PlannedTensor],
        inputs: Mappings,
        options: TiesOptions,
        *held: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(weights)
        ctx.made, ctx.inputs, ctx.options = made, inputs, options
        return tuple(tensor.view_as(tensor) for tensor in held)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        options: TiesOptions = ctx.options
        by_name = {
            tensor.key_name: gradient
            for tensor, gradient in zip(ctx.made, gradients, strict=True)
            if gradient is not None
        }
        products = torch.tensor(
            [
                _product(by_name, _kept(ctx.made, ctx.inputs, options, k))
                for k in range(len(options.weights))
            ],
            dtype=torch.float64,
            device="cpu",
        )
        if options.merge == "weighted_mean":
            used = torch.tensor(options.weights, dtype=torch.float64, device="cpu")
            total = float(used.sum())
            if abs(total) >= _NO_DIVISOR:
                products = (products - (used * products).sum() / total) / total
        gradient = (options.scaling * products).to(weights)
        return (gradient, None, None, None, *(None for _ in gradients))


def _kept(
    made: Sequence[PlannedTensor], inputs: Mappings, options: TiesOptions, k: int
) -> Mapping[str, torch.Tensor]:
    """delta'_k of every tensor, by the name that keys its random mask."""
    deltas = {}
    for tensor in made:
        model = inputs.tensor(tensor.sources[k], tensor.shape).detach()
        wide = torch.promote_types(model.dtype, torch.float32)
        if tensor.base is None:
            deltas[tensor.key_name] = model.to(wide)
        else:
            base = inputs.tensor(tensor.base, tensor.shape).detach()
            wide = torch.promote_types(wide, base.dtype)
            deltas[tensor.key_name] = model.to(wide) - base.to(wide)
    if options.trim == "none":
        return deltas
    # The mask of model k is the one at its place (T8), so others stand before it, with weight 0.
    return ties(
        [deltas] * (k + 1),
        density=options.densities[k],
        gamma=options.gammas[k],
        epsilon=options.epsilons[k],
        weights=[*[0.0] * k, 1.0],
        trim=options.trim,  # type: ignore[arg-type]
        rescale=options.rescale,  # type: ignore[arg-type]
        flavor=options.flavor,  # type: ignore[arg-type]
        scope=options.scope,  # type: ignore[arg-type]
        elect="none",
        merge="sum",
        seed=options.seed,
        non_finite="allow",
    )


def _product(gradients: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]) -> float:
    total = 0.0
    for name, gradient in gradients.items():
        total += float((gradient.to(kept[name]) * kept[name]).sum(dtype=torch.float64))
    return total
