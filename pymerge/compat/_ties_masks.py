"""What trims task vectors, for `pymerge.compat.ties_merging`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch

from pymerge.compat._ties_checks import check_finite, fraction_of, working_dtype
from pymerge.messages.arguments import entry_point
from pymerge.messages.words import counted, exact
from pymerge.ops.memory import check_tensor
from pymerge.ops.tensors import check_floats
from pymerge.ops.ties.select import select
from pymerge.rules.ties import _number


@overload
def topk_values_mask(
    M: torch.Tensor, K: float = ..., return_mask: Literal[False] = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def topk_values_mask(
    M: torch.Tensor, K: float = ..., *, return_mask: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
@overload
def topk_values_mask(
    M: torch.Tensor, K: float, return_mask: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
@overload
def topk_values_mask(
    M: torch.Tensor, K: float = ..., return_mask: bool = ...
) -> tuple[torch.Tensor, ...]: ...
@entry_point(models="M", density="K")
def topk_values_mask(
    M: torch.Tensor, K: float = 0.7, return_mask: bool = False
) -> tuple[torch.Tensor, ...]:
    """Each row's K largest magnitudes over zeros, and the fraction kept of each row; with
    return_mask the mask too.

    M: (K, n) or (n,). K: a fraction, or percent where above 1. ValueError for other numbers of
    dimensions and for a K outside of that.
    """
    fraction = fraction_of("K", K)
    return _masked(M, lambda rows: top_mask(rows, fraction), return_mask)


@entry_point(models="M", density="K")
def bottomk_values_mask(
    M: torch.Tensor, K: float = 0.7, return_mask: bool = False
) -> tuple[torch.Tensor, ...]:
    """Each row's int(K n) smallest magnitudes, and those equal to the last of them, over zeros;
    returns as `topk_values_mask`. ValueError where int(K n) is 0.
    """
    fraction = fraction_of("K", K)

    def mask(rows: torch.Tensor) -> torch.Tensor:
        k = int(rows.shape[1] * fraction)
        if k == 0:
            raise ValueError(
                f"K={exact(K)} of {counted(rows.shape[1], 'element')} is none; pass a larger K"
            )
        magnitudes = rows.abs()
        return magnitudes <= magnitudes.kthvalue(k, dim=1, keepdim=True)[0]

    return _masked(M, mask, return_mask)


@entry_point(models="tensor")
def greater_than_std_mask(
    tensor: torch.Tensor, factor: float, return_mask: bool = False
) -> tuple[torch.Tensor, ...]:
    """What is further from its row's mean than `factor` standard deviations (n - 1 in the
    denominator), over zeros; returns as `topk_values_mask`. tensor: (K, n).
    """
    factor = _number("factor", factor)
    return _masked(tensor, lambda rows: std_mask(rows, factor, torch.gt), return_mask, "tensor")


@entry_point(models="tensor")
def less_than_std_mask(
    tensor: torch.Tensor, factor: float, return_mask: bool = False
) -> tuple[torch.Tensor, ...]:
    """What is nearer to its row's mean than `factor` standard deviations; else as
    `greater_than_std_mask`.
    """
    factor = _number("factor", factor)
    return _masked(tensor, lambda rows: std_mask(rows, factor, torch.lt), return_mask, "tensor")


@entry_point(models="T", density="normfrac")
def topk_mask_preserve_normfrac(
    T: torch.Tensor, normfrac: float = 0.9, return_mask: bool = False
) -> tuple[torch.Tensor, ...]:
    """Each row's largest magnitudes, as few as have the share `normfrac` of its squared norm, and
    its last element, over zeros; returns as `topk_values_mask`.

    T: (K, n). The original keeps the last element too, whatever it is. A share that rounding keeps
    from being reached keeps all here, and the largest and the last element there.
    """
    share = _number("normfrac", normfrac)
    if not 0 <= share <= 1:
        raise ValueError(f"normfrac={exact(share)} is outside [0, 1]")
    return _masked(T, lambda rows: norm_mask(rows, share), return_mask, "T")


def top_mask(rows: torch.Tensor, density: float) -> torch.Tensor:
    thresholds = select(list(rows), density=density, flavor="paper", scope="tensor")
    return rows.abs() >= thresholds[:, None].to(rows.device)


def std_mask(
    rows: torch.Tensor,
    factor: float,
    compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    wide = rows.to(working_dtype(rows))
    spread = factor * wide.std(dim=1, keepdim=True)
    return compare((wide - wide.mean(dim=1, keepdim=True)).abs(), spread)


def norm_mask(rows: torch.Tensor, share: float) -> torch.Tensor:
    wide = rows.to(working_dtype(rows))
    norm = wide.norm(dim=1, keepdim=True)
    ordered, order = (
        (wide / torch.where(norm > 0, norm, 1))
        .abs()
        .square()
        .sort(dim=1, descending=True, stable=True)
    )
    # An element is kept where those before it have not reached the share yet.
    before = torch.zeros_like(ordered)
    before[:, 1:] = ordered.cumsum(dim=1)[:, :-1]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, before < share)
    if rows.shape[1]:
        mask.scatter_(1, order[:, :1], True)
        mask[:, -1] = True
    return mask


def _masked(
    tensor: torch.Tensor,
    mask_of: Callable[[torch.Tensor], torch.Tensor],
    return_mask: bool,
    name: str = "M",
) -> tuple[torch.Tensor, ...]:
    """What a mask keeps of each row, over zeros, the share kept, and the mask where asked for."""
    check_tensor(name, tensor)
    if tensor.dim() not in (1, 2):
        raise ValueError(
            f"{name} has {counted(tensor.dim(), 'dimension')}; pass (models, parameters) or"
            " (parameters,)"
        )
    rows = tensor if tensor.dim() == 2 else tensor[None]
    for k, row in enumerate(rows):
        check_floats(f"{name}[{k}]", row, "a mask", readable=True)
    check_finite(name, rows)
    mask = mask_of(rows)
    kept = torch.where(mask, rows, 0)
    if tensor.dim() == 1:
        kept, mask = kept[0], mask[0]
    share = mask.float().mean(dim=-1)
    return (kept, share, mask) if return_mask else (kept, share)
