"""Per-example gradients of a module's parameters from its input and its output's gradient (rule S5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from pymerge.statistics._targets import linear_shape

_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class Use:
    """One call of a module: its input (n, ...) and the gradient of its output (n, ...), examples first.

    parameters: local name -> canonical name, of those that are asked for.
    """

    module: nn.Module
    parameters: Mapping[str, str]
    x: torch.Tensor
    g: torch.Tensor


def up(tensor: torch.Tensor) -> torch.Tensor:
    """To the working precision: fp32, or fp64 where it is fp64 already."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def has_formula(module: nn.Module, arguments: int = 1) -> bool:
    """Whether `gradients` can be tried on a module that was called with so many arguments.

    Not on one with children, whose parameters may be used inside its own forward, nor on containers, never called.
    """
    if any(True for _ in module.children()) or isinstance(
        module, (nn.ParameterDict, nn.ParameterList)
    ):
        return False
    return arguments == 1 or linear_shape(module) is not None


def chunks(use: Use, local: str) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose per-example gradients of a parameter stay small together."""
    numel = max(1, use.module._parameters[local].numel())  # type: ignore[union-attr]
    n = use.g.shape[0]
    step = max(1, _CHUNK_BYTES // (4 * numel))
    for low in range(0, n, step):
        yield low, min(low + step, n)


def gradients(use: Use, local: str, low: int, high: int) -> torch.Tensor:
    """(high - low, *shape): the gradients of one parameter by the examples low to high."""
    module, x, g = use.module, use.x[low:high], up(use.g[low:high])
    shape = linear_shape(module)
    if shape is not None and local in ("weight", "bias"):
        g = g.reshape(g.shape[0], -1, shape[1])
        if local == "bias":
            return g.sum(1)
        x = up(x).reshape(g.shape[0], -1, shape[0])
        return torch.bmm(x.mT, g) if shape[2] else torch.bmm(g.mT, x)
    if isinstance(module, nn.Embedding):
        dense = g.new_zeros(g.shape[0], *module.weight.shape)
        for row in range(g.shape[0]):
            ids, rows = embedding_rows(module, x[row], g[row])
            dense[row].index_add_(0, ids, rows)
        return dense
    if isinstance(module, nn.LayerNorm) and local in ("weight", "bias"):
        if local == "weight":
            g = g * functional.layer_norm(up(x), module.normalized_shape, eps=module.eps)
        return g.reshape(g.shape[0], -1, *module.normalized_shape).sum(1)
    return torch.stack(
        [_local(module, local, x[i : i + 1], g[i : i + 1]) for i in range(g.shape[0])]
    )


def embedding_rows(
    module: nn.Embedding, x: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One example's gradient of an embedding: the distinct row numbers and their gradients."""
    ids, inverse = torch.unique(x.reshape(-1), return_inverse=True)
    rows = g.new_zeros(ids.numel(), g.shape[-1])
    rows.index_add_(0, inverse, g.reshape(-1, g.shape[-1]))
    if module.padding_idx is not None:
        rows[ids == module.padding_idx] = 0
    return ids, rows


def _local(module: nn.Module, local: str, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """One example's gradient by a second pass through the module alone."""
    state = {
        name: value.detach()
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    state = {
        name: up(value) if value.is_floating_point() else value for name, value in state.items()
    }
    state[local] = state[local].clone().requires_grad_()
    with torch.enable_grad():
        y = torch.func.functional_call(module, state, (up(x) if x.is_floating_point() else x,))
    (gradient,) = torch.autograd.grad(y, state[local], g.to(y.dtype))
    return gradient
