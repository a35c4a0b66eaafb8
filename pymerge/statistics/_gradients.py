"""Per-example gradients of a module's parameters from its input and its output's gradient (rule
S5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from pymerge.statistics._targets import linear_shape

_CHUNK_BYTES = 1 << 26
_CHUNK_EXAMPLES = 2048


@dataclass(frozen=True)
class Use:
    """One call of a module: its input (n, ...) and the gradient of its output (n, ...), examples
    first.

    parameters: local name -> canonical name, of those that are asked for.
    """

    module: nn.Module
    parameters: Mapping[str, str]
    x: torch.Tensor
    g: torch.Tensor


def up(tensor: torch.Tensor) -> torch.Tensor:
    """To the working precision: fp32, or fp64 where it is fp64 already. TypeError for complex
    numbers, of which statistics are not defined.
    """
    if tensor.is_complex():
        raise TypeError(
            f"a layer's input or gradient is {str(tensor.dtype).removeprefix('torch.')};"
            " statistics are of real numbers, leave such layers out with layers="
        )
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def has_formula(module: nn.Module, arguments: int = 1) -> bool:
    """Whether `gradients` can be tried on a module that was called with so many arguments.

    Not on one with children, whose parameters may be used inside its own forward, nor on
    containers, never called.
    """
    if any(True for _ in module.children()) or isinstance(
        module, (nn.ParameterDict, nn.ParameterList)
    ):
        return False
    return arguments == 1 or linear_shape(module) is not None


def chunks(use: Use, local: str, whole: bool) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose per-example gradients of a parameter, if they are made `whole`, stay
    small together.
    """
    parameter = use.module._parameters[local]
    assert parameter is not None
    n, step = use.g.shape[0], _CHUNK_EXAMPLES
    if whole or use.g.device.type != "cpu" or linear_shape(use.module) is None:
        step = min(step, max(1, _CHUNK_BYTES // (4 * max(1, parameter.numel()))))
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


def squares(use: Use, local: str, low: int, high: int) -> torch.Tensor:
    """The sum over the examples low to high of one parameter's squared gradients, of its shape."""
    shape = linear_shape(use.module)
    if shape is None or local != "weight":
        return gradients(use, local, low, high).square_().sum(0)
    g = up(use.g[low:high]).reshape(high - low, -1, shape[1])
    x = up(use.x[low:high]).reshape(high - low, -1, shape[0])
    left, right = (x, g) if shape[2] else (g, x)
    if g.shape[1] == 1:
        return left.squeeze(1).square().T @ right.squeeze(1).square()
    total = g.new_zeros(left.shape[2], right.shape[2])
    # One example at a time stays in the cache: 64 examples of 32 positions at 384 x 384 take 8 ms
    # on two AVX-512 cores, where a batched product and a sum take 85; at 384 x 1536, 26 against
    # 370.
    if g.device.type == "cpu":
        product = torch.empty_like(total)
        for one, other in zip(left.unbind(0), right.unbind(0), strict=True):
            torch.mm(one.T, other, out=product)
            total.addcmul_(product, product)
        return total
    return torch.bmm(left.mT, right).square_().sum(0)


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
