"""The functions of `peft.utils.merge_utils`, fused: import them from here instead.

The arithmetic is in fp32 with one rounding at the end (peft rounds after every step in the tensors'
dtype). Equal magnitudes at the threshold are all kept (docs/spec/ties.md, T3), where peft keeps
those that its sort puts first. NaN and infinity are a ValueError; tensors whose values are not in
their memory (DTensor, meta, ...) a TypeError.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from pymerge.compat._seed import draw_seed
from pymerge.messages.arguments import entry_point, renamed
from pymerge.messages.words import type_of
from pymerge.ops.memory import check_readable, check_tensor
from pymerge.ops.tensors import check_floats, check_numbers
from pymerge.ops.ties.api import ties as _ties
from pymerge.rules.ties import _number
from pymerge.rules.types import Elect

SignMethod = Literal["total", "frequency"]
_ELECTIONS: dict[str, Elect] = {"total": "sum", "frequency": "count"}


@entry_point()
def prune(
    tensor: torch.Tensor,
    density: float,
    method: Literal["magnitude", "random"],
    rescale: bool = False,
) -> torch.Tensor:
    """The `density` largest magnitudes of a tensor, or a random `density` of it, over zeros.

    rescale divides what a random prune keeps by density. With density >= 1 a warning, and the
    tensor itself. ValueError for a negative density or an unknown method.
    """
    check_tensor("tensor", tensor)
    density = _number("density", density)
    if density >= 1:
        warnings.warn(f"density={density} keeps everything; no pruning is done", stacklevel=3)
        return tensor
    if density < 0:
        raise ValueError(f"density={density} is negative; pass a fraction in [0, 1]")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"method={method!r} is not one of 'magnitude', 'random'")


@entry_point()
def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The int(density * n) largest magnitudes of a tensor of n elements, over zeros."""
    check_tensor("tensor", tensor)
    with renamed(models=["tensor"]):
        return _sum([tensor], trim="magnitude", density=density)


@entry_point()
def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Each element with probability density, over zeros; divided by density if rescale."""
    check_tensor("tensor", tensor)
    with renamed(models=["tensor"]):
        return _sum(
            [tensor],
            trim="random",
            density=density,
            rescale="density" if rescale else "none",
            seed=draw_seed(),
        )


def calculate_majority_sign_mask(
    tensor: torch.Tensor, method: SignMethod = "total"
) -> torch.Tensor:
    """Which of the stacked task tensors (K, ...) have the elected sign; a zero sum elects +.

    Plain torch, for code that calls it alone: `ties` elects and merges in one pass without the
    mask. Returns bool (K, ...).
    """
    check_floats("tensor", tensor, "calculate_majority_sign_mask")
    if tensor.dim() == 0:
        raise ValueError("tensor has no dimensions; stack the task tensors, (models, ...)")
    votes = tensor if _election(method) == "sum" else tensor.sign()
    elected = torch.where(votes.sum(dim=0, dtype=_wide(votes)) >= 0, 1, -1).to(tensor.dtype)
    return tensor.sign() == elected


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """The mean over the stacked task tensors (K, ...) that the mask keeps; 0 where it keeps none.
    Plain torch.
    """
    check_floats("task_tensors", task_tensors, "disjoint_merge")
    check_numbers("majority_sign_mask", majority_sign_mask, "disjoint_merge")
    shapes = [tuple(x.shape) for x in (task_tensors, majority_sign_mask)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"task_tensors has shape {shapes[0]}, majority_sign_mask {shapes[1]}; stack the task"
            " tensors, (models, ...), and pass a mask of their shape"
        )
    kept = torch.where(majority_sign_mask.bool(), task_tensors, 0)
    total = kept.sum(dim=0, dtype=_wide(kept))
    return (total / majority_sign_mask.sum(dim=0).clamp(min=1)).to(kept.dtype)


@entry_point(models="task_tensors")
def task_arithmetic(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """sum_k w_k x_k."""
    return _sum(task_tensors, trim="none", weights=weights)


@entry_point(models="task_tensors")
def magnitude_prune(
    task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float
) -> torch.Tensor:
    """sum_k w_k x_k over each tensor's `density` largest magnitudes."""
    return _sum(task_tensors, trim="magnitude", weights=weights, density=density)


@entry_point(models="task_tensors")
def ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """Trim by magnitude, elect by the unweighted sum (or by count), average what agrees (flavor
    "peft" of `pymerge.ties`).
    """
    return _elected(task_tensors, weights, majority_sign_method, trim="magnitude", density=density)


@entry_point(models="task_tensors")
def dare_linear(
    task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float
) -> torch.Tensor:
    """sum_k w_k x_k over a random `density` of each tensor, divided by density."""
    task_tensors = _listed(task_tensors)  # before anything is drawn
    return _sum(
        task_tensors,
        trim="random",
        weights=weights,
        density=density,
        rescale="density",
        seed=draw_seed(),
    )


@entry_point(models="task_tensors")
def dare_ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """As `ties`, over a random `density` of each tensor, divided by density."""
    task_tensors = _listed(task_tensors)  # before anything is drawn
    return _elected(
        task_tensors,
        weights,
        majority_sign_method,
        trim="random",
        density=density,
        rescale="density",
        seed=draw_seed(),
    )


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype for sums: one in fp16 could overflow where the mean does not."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _sum(tensors: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
    merged: torch.Tensor = _ties(
        _listed(tensors), flavor="peft", elect="none", merge="sum", **_clipped(options)
    )
    return merged


def _elected(
    tensors: Sequence[torch.Tensor], weights: torch.Tensor, method: str, **options: Any
) -> torch.Tensor:
    merged: torch.Tensor = _ties(
        _listed(tensors),
        flavor="peft",
        elect=_election(method),
        weights=weights,
        **_clipped(options),
    )
    return merged


def _listed(tensors: Any) -> list[torch.Tensor]:
    """The tensors; unreadable ones are reported under peft's argument."""
    check_readable("task_tensors", tensors)
    scalar = isinstance(tensors, torch.Tensor) and tensors.dim() == 0
    if scalar or not isinstance(tensors, Iterable) or isinstance(tensors, (str, bytes, Mapping)):
        raise TypeError(f"task_tensors is {type_of(tensors)}; pass a list of torch.Tensor")
    listed = list(tensors)
    for k, tensor in enumerate(listed):
        check_readable(f"task_tensors[{k}]", tensor)
    return listed


def _election(method: str) -> Elect:
    if not isinstance(method, str) or method not in _ELECTIONS:
        raise ValueError(f"majority_sign_method={method!r} is not one of 'total', 'frequency'")
    return _ELECTIONS[method]


def _clipped(options: dict[str, Any]) -> dict[str, Any]:
    """A density above 1 becomes 1, with a warning, as in peft."""
    density = _number("density", options.get("density", 0))
    if density >= 1:
        warnings.warn(f"density={density} keeps everything; no pruning is done", stacklevel=5)
        options["density"] = 1.0
    return options
