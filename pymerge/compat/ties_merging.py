"""The functions of the official TIES code (github.com/prateeky2806/ties-merging), fused: import
them from here instead.

Flavor "paper" of `pymerge.ties` over flat vectors: int(k n) + 1 magnitudes are kept, signs are
elected by their sum, a zero sum takes the majority sign of the whole vector. An exact tie of the
majority, which leaves a zero sign there, elects - here. NaN and infinity are a ValueError; tensors
whose values are not in their memory (DTensor, meta, ...) a TypeError.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Literal, overload

import torch

from pymerge.messages.arguments import entry_point
from pymerge.messages.words import counted, exact, type_of
from pymerge.ops.memory import check_tensor
from pymerge.ops.tensors import check_numbers
from pymerge.ops.ties.api import ties
from pymerge.ops.ties.select import select
from pymerge.rules.ties import _number
from pymerge.rules.types import Merge

_MERGES: dict[str, Merge] = {"dis-mean": "mean", "dis-sum": "sum", "dis-max": "max"}


@entry_point(models="flat_task_checks", density="reset_thresh")
def ties_merging(
    flat_task_checks: torch.Tensor, reset_thresh: float | None = None, merge_func: str = ""
) -> torch.Tensor:
    """Merge K flat task vectors into one: trim, elect, disjoint merge.

    flat_task_checks: (K, n). reset_thresh: how much is kept, a fraction, or percent where above 1;
    None keeps all. merge_func: "dis-mean", "dis-sum" or "dis-max".

    Returns (n,): lambda times it is to be added to the flat pretrained vector. ValueError for other
    arguments, TypeError for what is no tensor and no number.
    """
    if not isinstance(merge_func, str) or merge_func not in _MERGES:
        raise ValueError(f"merge_func={merge_func!r} is not one of {', '.join(map(repr, _MERGES))}")
    check_tensor("flat_task_checks", flat_task_checks)
    if flat_task_checks.dim() != 2:
        raise ValueError(
            f"flat_task_checks has {counted(flat_task_checks.dim(), 'dimension')}; pass (models,"
            " parameters)"
        )
    density = 1.0 if reset_thresh is None else _fraction("reset_thresh", reset_thresh)
    return ties(list(flat_task_checks), flavor="paper", density=density, merge=_MERGES[merge_func])


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
    check_tensor("M", M)
    if M.dim() not in (1, 2):
        raise ValueError(
            f"M has {counted(M.dim(), 'dimension')}; pass (models, parameters) or (parameters,)"
        )
    rows = M if M.dim() == 2 else M[None]
    thresholds = select(list(rows), density=_fraction("K", K), flavor="paper", scope="tensor")
    mask = rows.abs() >= thresholds[:, None].to(rows.device)
    kept = torch.where(mask, rows, 0)
    if M.dim() == 1:
        kept, mask = kept[0], mask[0]
    fraction = mask.float().mean(dim=-1)
    return (kept, fraction, mask) if return_mask else (kept, fraction)


def state_dict_to_vector(
    state_dict: Mapping[str, torch.Tensor], remove_keys: Collection[str] = ()
) -> torch.Tensor:
    """All tensors of a state dict, sorted by name, flat and concatenated, without `remove_keys`.
    ValueError where none is left.
    """
    names = _names(state_dict, remove_keys)
    if not names:
        raise ValueError("state_dict has no tensors, or remove_keys has all of their names")
    return torch.cat([state_dict[name].reshape(-1) for name in names])


def vector_to_state_dict(
    vector: torch.Tensor, state_dict: Mapping[str, torch.Tensor], remove_keys: Collection[str] = ()
) -> OrderedDict[str, torch.Tensor]:
    """The inverse of `state_dict_to_vector`, with the names and shapes of `state_dict`. ValueError
    for another length.
    """
    check_tensor("vector", vector)
    names = _names(state_dict, remove_keys)
    sizes = [state_dict[name].numel() for name in names]
    if vector.numel() != sum(sizes):
        raise ValueError(
            f"vector has {counted(vector.numel(), 'element')}, the state dict {sum(sizes)}"
        )
    pieces = torch.split(vector.reshape(-1), sizes)
    return OrderedDict(
        (name, piece.reshape(state_dict[name].shape))
        for name, piece in zip(names, pieces, strict=True)
    )


def _names(state_dict: Mapping[str, torch.Tensor], remove_keys: Collection[str]) -> list[str]:
    """The sorted names without `remove_keys`. TypeError for anything but a state dict and a list of
    keys.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is {type_of(state_dict)}; pass a state dict")
    if isinstance(remove_keys, str) or not isinstance(remove_keys, Collection):
        raise TypeError(
            f"remove_keys={remove_keys!r} is {type_of(remove_keys)}; pass a list of keys"
        )
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"state_dict has the key {name!r}, {type_of(name)}; keys are text")
        if name not in remove_keys:
            check_numbers(f"state_dict[{name!r}]", tensor, "a flat vector")
    return [name for name in sorted(state_dict) if name not in remove_keys]


def _fraction(name: str, value: float) -> float:
    value = _number(name, value)
    fraction = value / 100 if value > 1 else value
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name}={exact(value)} is outside [0, 1], or [0, 100] as percent")
    return fraction
