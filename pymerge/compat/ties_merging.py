"""The functions of the official TIES code (github.com/prateeky2806/ties-merging, its `merge_utils`
and its notebook), fused: import them from here instead. What loads the paper's own checkpoints or
plots them is left out.

Flavor "paper" of `pymerge.ties` over flat vectors: int(k n) + 1 magnitudes are kept, signs are
elected by their sum, a zero sum takes the majority sign of the whole vector. An exact tie of the
majority, which leaves a zero sign there, elects - where the kernels merge; `resolve_sign` and what
takes its signs keep the zero. Arithmetic is in fp32 (fp64 for fp64 inputs) with one rounding at the
end; "dis-mean" of 16-bit inputs is fp32, as there.

Functions that compute refuse NaN and infinity (ValueError); those that convert or compare pass them
on. Tensors whose values are not in their memory (DTensor, meta, ...) are a TypeError.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch

from pymerge.compat._ties_checks import (
    check_finite,
    check_word,
    fraction_of,
    narrowed,
    refuse,
    rows_of,
    signs_of,
    working_dtype,
)
from pymerge.compat._ties_masks import (
    bottomk_values_mask,
    greater_than_std_mask,
    less_than_std_mask,
    norm_mask,
    std_mask,
    top_mask,
    topk_mask_preserve_normfrac,
    topk_values_mask,
)
from pymerge.compat._ties_vectors import (
    add_ptm_to_tv,
    check_parameterNamesMatch,
    check_state_dicts_equal,
    state_dict_to_vector,
    vector_to_state_dict,
)
from pymerge.messages.arguments import entry_point
from pymerge.messages.words import exact, shown, type_of
from pymerge.ops.tensors import check_numbers
from pymerge.ops.ties.api import ties
from pymerge.rules.ties import _number
from pymerge.rules.types import Merge

__all__ = [
    "add_ptm_to_tv",
    "aggregate",
    "basic_merging",
    "bottomk_values_mask",
    "check_parameterNamesMatch",
    "check_state_dicts_equal",
    "disjoint_merge",
    "greater_than_std_mask",
    "less_than_std_mask",
    "merge_methods",
    "merge_with_oracle_sign",
    "normfrac_based_sign",
    "normmass_based_sign",
    "resolve_sign",
    "resolve_zero_signs",
    "sign_agreement_ratio",
    "state_dict_to_vector",
    "ties_merging",
    "topk_mask_preserve_normfrac",
    "topk_values_mask",
    "tv_merging",
    "vector_to_state_dict",
]

_MERGES: dict[str, Merge] = {"mean": "mean", "sum": "sum", "max": "max"}
_AGGREGATES: dict[str, Merge] = {"mean": "weighted_mean", "sum": "sum", "magnitude": "max"}
_RESOLVE_METHODS = ("mass", "normfrac", "normmass")


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
    merge = _disjoint(merge_func)
    if merge is None:
        refuse("merge_func", merge_func, [f"dis-{each}" for each in _MERGES])
    rows = rows_of("flat_task_checks", flat_task_checks)
    density = 1.0 if reset_thresh is None else fraction_of("reset_thresh", reset_thresh)
    return _fused(rows, density, merge, elected=True)


@entry_point(models="flat_task_checks", density="reset_thresh")
def merge_methods(
    reset_type: str,
    flat_task_checks: torch.Tensor,
    reset_thresh: float | Literal["none"] | None = None,
    resolve_method: str | None = None,
    merge_func: str = "",
) -> torch.Tensor:
    """Merge K flat task vectors into one by any of the official code's combinations.

    reset_type: what trims them, by a word that it contains: "topk" (the share `reset_thresh`, a
        fraction or percent), "std" (what is further from its row's mean than `reset_thresh`
        standard deviations), "nf" (the largest magnitudes that have the share `reset_thresh` of the
        row's squared norm, and the last element); "" and "none" trim nothing.
    flat_task_checks: (K, n). reset_thresh: None and "none" keep all.
    resolve_method: "mass", "normfrac" or "normmass" (see `resolve_sign`), or "none".
    merge_func: "dis-mean", "dis-sum" or "dis-max" of what has the elected sign, or of all that is
        not zero; "mean", "sum", "median" or "magnitude" of all rows, their magnitude under the
        elected sign.

    Returns (n,). ValueError for other arguments and for "dis-max" without signs.
    """
    rows = rows_of("flat_task_checks", flat_task_checks)
    check_word("resolve_method", resolve_method, (*_RESOLVE_METHODS, "none"))
    disjoint = _disjoint(merge_func)
    if disjoint is None:
        _check_aggregate("merge_func", merge_func, "dis-mean", "dis-sum", "dis-max")
    if disjoint == "max" and resolve_method == "none":
        raise ValueError(
            "merge_func='dis-max' needs signs; pass resolve_method='mass', or"
            " merge_func='magnitude' for the largest magnitude without them"
        )
    kept, density = _reset(reset_type, rows, reset_thresh)
    fused: Merge | None = _AGGREGATES.get(merge_func) if disjoint is None else disjoint
    if resolve_method == "none" and fused is not None:
        return _fused(kept, density, fused, elected=False)
    if resolve_method == "mass" and disjoint is not None:
        return _fused(kept, density, disjoint, elected=True)
    check_finite("flat_task_checks", kept)
    if density < 1:
        kept = _trimmed(kept, density)
    signs = None if resolve_method == "none" else resolve_sign(kept, str(resolve_method))
    if disjoint is not None:
        return disjoint_merge(kept, merge_func, signs)
    return aggregate(kept, merge_func, signs)


@entry_point(models="flat_task_checks", density="reset_thresh")
def merge_with_oracle_sign(
    final_signs: torch.Tensor,
    flat_task_checks: torch.Tensor,
    reset_thresh: float | Literal["none"] | None,
    merge_func: str,
) -> torch.Tensor:
    """Trim K flat task vectors by magnitude and merge what has the given signs.

    final_signs: (n,), as of a model trained on all tasks. flat_task_checks: (K, n). reset_thresh:
    the share kept, a fraction or percent; None and "none" keep all. merge_func: as of
    `disjoint_merge`.
    """
    rows = rows_of("flat_task_checks", flat_task_checks)
    density = 1.0 if _keeps_all(reset_thresh) else fraction_of("reset_thresh", reset_thresh)
    signs = signs_of("final_signs", final_signs, rows)
    return disjoint_merge(_trimmed(rows, density) if density < 1 else rows, merge_func, signs)


@entry_point(models="tv_flat_checks")
def tv_merging(tv_flat_checks: torch.Tensor) -> torch.Tensor:
    """Task arithmetic: the sum of K flat task vectors (K, n)."""
    return _fused(rows_of("tv_flat_checks", tv_flat_checks), 1.0, "sum", elected=False)


@entry_point(models="flat_checks")
def basic_merging(
    merge_func: str,
    flat_checks: torch.Tensor,
    sd_checks: Sequence[Mapping[str, torch.Tensor]],
    remove_keys: Collection[str],
) -> OrderedDict[str, torch.Tensor]:
    """`aggregate` of K flat checkpoints (K, n), as a state dict with the names of sd_checks[0]."""
    rows = rows_of("flat_checks", flat_checks)
    if not isinstance(sd_checks, Sequence) or not sd_checks:
        raise TypeError(f"sd_checks is {shown(sd_checks)}; pass a list of state dicts")
    _check_aggregate("merge_func", merge_func)
    return vector_to_state_dict(aggregate(rows, merge_func, None), sd_checks[0], remove_keys)


@entry_point(models="T")
def aggregate(
    T: torch.Tensor, agg_type: str, final_signs: torch.Tensor | None, dim: int = 0
) -> torch.Tensor:
    """The "mean", "sum", "median" (the lower of two in the middle) or "magnitude" (the value of the
    largest magnitude) of K rows.

    T: (K, n). final_signs: (n,): the result's magnitude is returned under these signs; None returns
    it as it is. dim: 0, or 1 for those of the columns.
    """
    rows = rows_of("T", T)
    if not isinstance(dim, int) or dim not in (0, 1, -1, -2):
        refuse("dim", dim, (0, 1))
    if dim in (1, -1):
        rows = rows.t()
    _check_aggregate("agg_type", agg_type)
    if agg_type in _AGGREGATES:
        result = _fused(rows, 1.0, _AGGREGATES[agg_type], elected=False)
    else:
        check_finite("T", rows)
        result = rows.median(dim=0)[0]
    if final_signs is None:
        return result
    return result.abs() * signs_of("final_signs", final_signs, rows).to(result.dtype)


@entry_point(models="Tensor")
def disjoint_merge(
    Tensor: torch.Tensor, merge_func: str, sign_to_mult: torch.Tensor | None
) -> torch.Tensor:
    """The "mean", "sum" or "max" over the rows of (K, n) that have the given signs.

    merge_func: its last part after a "-" counts, as in "dis-mean". sign_to_mult: (n,): where it is
    above 0, positive elements are merged, elsewhere negative ones; None merges all that is not
    zero ("mean" and "sum").

    The magnitude of "max" is multiplied by the signs. "mean" of 16-bit tensors is fp32.
    """
    rows = rows_of("Tensor", Tensor)
    merge = _MERGES.get(merge_func.split("-")[-1]) if isinstance(merge_func, str) else None
    if merge is None:
        refuse("merge_func", merge_func, [f"dis-{each}" for each in _MERGES])
    if sign_to_mult is None:
        if merge == "max":
            raise ValueError(
                f"merge_func={merge_func!r} needs signs; pass sign_to_mult, as of resolve_sign"
            )
        return _fused(rows, 1.0, merge, elected=False)
    signs = signs_of("sign_to_mult", sign_to_mult, rows)
    check_finite("Tensor", rows)
    positive = signs > 0
    merged = rows.new_zeros(rows.shape[1:], dtype=working_dtype(rows))
    number = torch.zeros_like(merged)
    for row in rows:  # one at a time, since a mask of all would be another copy
        kept = torch.where(torch.where(positive, row > 0, row < 0), row, 0).to(merged.dtype)
        if merge == "max":
            merged = torch.maximum(merged, kept.abs())
        else:
            merged += kept
            number += kept != 0
    if merge == "mean":
        return merged / number.clamp(min=1)
    if merge == "max":
        return (merged * signs).to(rows.dtype)
    return narrowed(merged, rows.dtype)


@entry_point(models="Tensor")
def resolve_sign(Tensor: torch.Tensor, resolve_method: str = "mass") -> torch.Tensor:
    """The elected sign of each column of (K, n): 1, -1, or 0 where the majority is an exact tie.

    resolve_method: "mass", the sign of the sum; "normfrac", of the element that has the largest
    share of its row's norm; "normmass", of the sum of these shares, each squared under its sign. A
    column that elects 0 takes the majority of the other columns. A row of zeros has no share, where
    the original divides 0 by 0.

    Returns (n,) in the rows' dtype.
    """
    rows = rows_of("Tensor", Tensor)
    check_word("resolve_method", resolve_method, _RESOLVE_METHODS)
    check_finite("Tensor", rows)
    elect = {"mass": _mass_sign, "normfrac": normfrac_based_sign, "normmass": normmass_based_sign}
    return resolve_zero_signs(elect[resolve_method](rows), "majority")


def resolve_zero_signs(
    sign_to_mult: torch.Tensor, method: Literal["majority", "minority"] | str = "majority"
) -> torch.Tensor:
    """The signs with their zeros set, in place, to the majority's sign, or to the minority's;
    another method leaves them. A tie of the majority leaves zeros.
    """
    check_numbers("sign_to_mult", sign_to_mult, "resolve_zero_signs")
    balance = int((sign_to_mult > 0).sum()) - int((sign_to_mult < 0).sum())
    majority = (balance > 0) - (balance < 0)
    if isinstance(method, str) and method in ("majority", "minority"):
        sign_to_mult[sign_to_mult == 0] = majority if method == "majority" else -majority
    return sign_to_mult


def _mass_sign(rows: torch.Tensor) -> torch.Tensor:
    total = rows.new_zeros(rows.shape[1:], dtype=working_dtype(rows))
    for row in rows:  # in model order, as the kernels sum (T4)
        total += row
    return total.sign().to(rows.dtype)


@entry_point(models="Tensor")
def normfrac_based_sign(Tensor: torch.Tensor) -> torch.Tensor:
    """The sign, in each column of (K, n), of the element that has the largest share of its row's
    norm; the first of equal ones.
    """
    rows = rows_of("Tensor", Tensor)
    largest = torch.full(rows.shape[1:], -1.0, dtype=working_dtype(rows), device=rows.device)
    signs = torch.zeros_like(largest)
    for share in _shares(rows):
        more = share.abs() > largest
        largest = torch.where(more, share.abs(), largest)
        signs = torch.where(more, share.sign(), signs)
    return signs.to(rows.dtype)


@entry_point(models="Tensor")
def normmass_based_sign(Tensor: torch.Tensor) -> torch.Tensor:
    """The sign, in each column of (K, n), of the sum of the squared shares of their rows' norms,
    each under its own sign.
    """
    rows = rows_of("Tensor", Tensor)
    total = rows.new_zeros(rows.shape[1:], dtype=working_dtype(rows))
    for share in _shares(rows):
        total += share * share.abs()
    return total.sign().to(rows.dtype)


def _shares(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each row over its norm; a row of zeros as it is."""
    check_finite("Tensor", rows)
    for row in rows.to(working_dtype(rows)):
        norm = row.norm()
        yield row / torch.where(norm > 0, norm, 1)


def sign_agreement_ratio(M: torch.Tensor) -> torch.Tensor:
    """For each column of (K, n): |positive - negative| elements over those that are not zero, 1
    where all are zero. fp32, (n,).
    """
    check_numbers("M", M, "sign_agreement_ratio")
    positive, negative = (M > 0).float().sum(dim=0), (M < 0).float().sum(dim=0)
    voters = positive + negative
    return torch.where(voters != 0, (positive - negative).abs() / voters.clamp(min=1), 1.0)


def _fused(rows: torch.Tensor, density: float, merge: Merge, *, elected: bool) -> torch.Tensor:
    """The kernels' merge of rows that are trimmed by magnitude on the way."""
    out = rows.new_empty(
        rows.shape[1:], dtype=working_dtype(rows) if merge == "mean" else rows.dtype
    )
    return ties(
        list(rows),
        flavor="paper",
        density=density,
        elect="sum" if elected else "none",
        merge=merge,
        out=out,
    )


def _reset(
    reset_type: str, rows: torch.Tensor, thresh: float | Literal["none"] | None
) -> tuple[torch.Tensor, float]:
    """The rows as `merge_methods` trims them, and the density at which the kernels are to do it."""
    if not isinstance(reset_type, str):
        raise TypeError(f"reset_type is {type_of(reset_type)}; pass 'topk', 'std', 'nf' or 'none'")
    kinds = [kind for kind in ("nf", "topk", "std") if kind in reset_type]
    if not kinds and reset_type not in ("", "none"):
        refuse("reset_type", reset_type, ("topk", "std", "nf", "none"))
    if not kinds or _keeps_all(thresh):
        return rows, 1.0
    if kinds[0] == "topk":
        return rows, fraction_of("reset_thresh", thresh)
    number = _number("reset_thresh", thresh)
    if kinds[0] == "nf" and not 0 <= number <= 1:
        raise ValueError(f"reset_thresh={exact(number)} is outside [0, 1], as 'nf' takes it")
    check_finite("flat_task_checks", rows)
    mask = norm_mask(rows, number) if kinds[0] == "nf" else std_mask(rows, number, torch.gt)
    return torch.where(mask, rows, 0), 1.0


def _keeps_all(thresh: object) -> bool:
    return thresh is None or (isinstance(thresh, str) and thresh == "none")


def _trimmed(rows: torch.Tensor, density: float) -> torch.Tensor:
    check_finite("flat_task_checks", rows)
    return torch.where(top_mask(rows, density), rows, 0)


def _disjoint(merge_func: str) -> Merge | None:
    """The merge of "dis-mean", "dis-sum" and "dis-max"; None for a name without "dis"."""
    if not isinstance(merge_func, str) or "dis" not in merge_func:
        return None
    merge = _MERGES.get(merge_func.split("-")[-1])
    if merge is None:
        refuse("merge_func", merge_func, [f"dis-{each}" for each in _MERGES])
    return merge


def _check_aggregate(name: str, value: object, *others: str) -> None:
    check_word(name, value, (*others, "mean", "sum", "median", "magnitude"))
