"""The functions of `peft.utils.merge_utils`, fused: import them from here instead, or `patch()`
peft, whose `add_weighted_adapter` then runs on them.

The arithmetic is in fp32 with one rounding at the end (peft rounds after every step in the tensors'
dtype). The result's dtype is peft's: that of the tensors and of a tensor of weights, promoted, so
that fp32 weights of bf16 adapters give fp32, and at least fp32 where signs are elected. Equal
magnitudes at the threshold are all kept (docs/spec/ties.md, T3), where peft keeps those that its
sort puts first. NaN and infinity are a ValueError; tensors whose values are not in their memory
(DTensor, meta, ...) a TypeError; shapes and weights that do not fit, and an unknown
majority_sign_method, a `MergeUtilsError`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from pymerge.compat._patching import Patch, Replacements
from pymerge.compat._seed import draw_seed
from pymerge.errors import MergeError
from pymerge.messages.arguments import check_flags, entry_point, renamed
from pymerge.messages.words import shown, type_of
from pymerge.ops.memory import check_readable, check_tensor
from pymerge.ops.tensors import FLOATS, check_floats, check_numbers
from pymerge.ops.ties.api import ties as _ties
from pymerge.rules.ties import _number
from pymerge.rules.types import Elect

SignMethod = Literal["total", "frequency"]
_PATCHED = (
    "calculate_majority_sign_mask",
    "dare_linear",
    "dare_ties",
    "disjoint_merge",
    "magnitude_based_pruning",
    "magnitude_prune",
    "prune",
    "random_pruning",
    "task_arithmetic",
    "ties",
)
_ELECTIONS: dict[str, Elect] = {"total": "sum", "frequency": "count"}


class MergeUtilsError(ValueError, RuntimeError):
    """Arguments that do not fit. torch, on which peft relies for these checks, raises a
    RuntimeError, so that it is one too.
    """


def patch() -> Patch:
    """Make peft use the functions of this module, until `unpatch()` or the end of a `with` block.

    Every module of peft that has one of its functions gets ours, also those that are imported
    later. ImportError where peft is not installed.

    >>> with pymerge.compat.peft.patch():
    ...     model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "merged", "ties", density=0.2)
    """
    return _patches().apply()


def unpatch() -> None:
    """Give peft its own functions back, whichever calls of `patch` replaced them."""
    _patches().undo()


@functools.cache
def _patches() -> Replacements:
    merge_utils = importlib.import_module("peft.utils.merge_utils")
    importlib.import_module("peft.tuners.lora.model")
    ours = globals()
    return Replacements("peft", [(getattr(merge_utils, name), ours[name]) for name in _PATCHED])


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
    check_flags(rescale=rescale)
    density = _number("density", density)
    if density >= 1:
        warnings.warn(f"density={density} keeps everything; no pruning is done", stacklevel=3)
        return tensor
    if density < 0:
        raise ValueError(f"density={density} is negative; pass a fraction in [0, 1]")
    if not isinstance(method, str) or method not in ("magnitude", "random"):
        raise ValueError(f"method={shown(method)} is not one of 'magnitude', 'random'")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    return random_pruning(tensor, density, rescale=rescale)


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
        raise MergeUtilsError("tensor has no dimensions; stack the task tensors, (models, ...)")
    votes = tensor if _election(method) == "sum" else tensor.sign()
    elected = torch.where(votes.sum(dim=0, dtype=_wide(votes)) >= 0, 1, -1).to(tensor.dtype)
    return tensor.sign() == elected


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """The mean over the stacked task tensors (K, ...) that the mask keeps; 0 where it keeps none.
    Plain torch; fp32 for 16-bit tensors, as in peft.
    """
    check_floats("task_tensors", task_tensors, "disjoint_merge")
    check_numbers("majority_sign_mask", majority_sign_mask, "disjoint_merge")
    shapes = [tuple(x.shape) for x in (task_tensors, majority_sign_mask)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise MergeUtilsError(
            f"task_tensors has shape {shapes[0]}, majority_sign_mask {shapes[1]}; stack the task"
            " tensors, (models, ...), and pass a mask of their shape"
        )
    kept = torch.where(majority_sign_mask.bool(), task_tensors, 0)
    total = kept.sum(dim=0, dtype=_wide(kept))
    return total / majority_sign_mask.sum(dim=0).clamp(min=1)


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
    return _merged(tensors, elect="none", merge="sum", **_clipped(options))


def _elected(
    tensors: Sequence[torch.Tensor], weights: torch.Tensor, method: str, **options: Any
) -> torch.Tensor:
    return _merged(
        tensors,
        least=torch.float32,  # peft divides by counts that are
        elect=_election(method),
        weights=weights,
        **_clipped(options),
    )


def _merged(
    tensors: Sequence[torch.Tensor], *, least: torch.dtype | None = None, **options: Any
) -> torch.Tensor:
    """The op, in the dtype that tensors, weights and `least` promote to. MergeUtilsError for a
    ValueError that has no class of its own.
    """
    listed = _listed(tensors)
    target = _target(listed, options.get("weights"), least)
    with _torch_errors():
        merged: torch.Tensor = _ties(listed, flavor="peft", out=target, **options)
    return merged


@contextlib.contextmanager
def _torch_errors() -> Iterator[None]:
    try:
        yield
    except MergeError:
        raise
    except ValueError as error:
        raise MergeUtilsError(str(error)) from None


def _target(tensors: Sequence[Any], weights: Any, least: torch.dtype | None) -> torch.Tensor | None:
    """A new tensor of the result's dtype; None where the first tensor has it, and where the op is
    to refuse what is none.
    """
    dtypes = [each.dtype if isinstance(each, torch.Tensor) else None for each in tensors]
    if not dtypes or any(dtype not in FLOATS for dtype in dtypes):
        return None
    more = [weights.dtype] if isinstance(weights, torch.Tensor) else []
    dtypes += [*more, *([] if least is None else [least])]
    try:
        dtype = functools.reduce(torch.promote_types, [each for each in dtypes if each is not None])
    except RuntimeError:  # quantised and 8-bit dtypes promote to none
        raise TypeError(f"weights are {weights.dtype}; pass them in float32") from None
    if dtype == tensors[0].dtype or dtype not in FLOATS:
        return None
    return torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device)


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
        raise MergeUtilsError(
            f"majority_sign_method={shown(method)} is not one of 'total', 'frequency'"
        )
    return _ELECTIONS[method]


def _clipped(options: dict[str, Any]) -> dict[str, Any]:
    """A density above 1 becomes 1, with a warning, as in peft."""
    density = _number("density", options.get("density", 0))
    if density >= 1:
        warnings.warn(f"density={density} keeps everything; no pruning is done", stacklevel=5)
        options["density"] = 1.0
    return options
