"""What the options of `ties` mean for one tensor: flavors, ranks and random keys resolved to plain
numbers.

Every backend takes a `TiesRule`, so the options are interpreted in one place. Imports neither torch
nor numpy.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, SupportsFloat, SupportsIndex, get_args

from pymerge.messages.arguments import argument, of_model
from pymerge.messages.words import counted, exact, shown, type_of
from pymerge.rules import types
from pymerge.rules.options import Counts, OpOptions

TRIMS: tuple[str, ...] = get_args(types.Trim)
ELECTIONS: tuple[str, ...] = get_args(types.Elect)
MERGES: tuple[str, ...] = get_args(types.Merge)
ZERO_SIGNS: tuple[str, ...] = get_args(types.ZeroSign)
SCOPES: tuple[str, ...] = get_args(types.Scope)
RESCALES: tuple[str, ...] = get_args(types.Rescale)
NON_FINITE: tuple[str, ...] = get_args(types.NonFinite)


@dataclass(frozen=True)
class Flavor:
    """A tool's conventions (the table "Flavors" of docs/spec/ties.md)."""

    scope: str
    weighted_election: bool
    zero_sign: str
    merge: str


FLAVORS = {
    "mergekit": Flavor("tensor", True, "positive", "weighted_mean"),
    "peft": Flavor("tensor", False, "positive", "mean"),
    "paper": Flavor("model", False, "majority", "mean"),
}


@dataclass(frozen=True)
class TiesOptions(OpOptions):
    """Validated options of `ties` for K models, not yet tied to a tensor's size or name."""

    op: ClassVar[str] = "ties"

    densities: tuple[float, ...]
    weights: tuple[float, ...]
    gammas: tuple[float, ...]
    epsilons: tuple[float, ...]
    scaling: float
    flavor: str
    trim: str
    elect: str
    merge: str
    zero_sign: str
    scope: str
    rescale: str
    seed: int
    non_finite: str

    @property
    def models(self) -> int:
        return len(self.weights)

    @property
    def over_all_tensors(self) -> bool:
        return self.scope == "model"

    def rule(self, n: int, name: str = "", shape: Sequence[int] = ()) -> TiesRule:
        """The rule for one tensor (or one model, where scope is "model") of n elements.

        shape: of the tensor, for trim "magprune".
        """
        length, step = magprune_rows(n, shape)
        ranks, dropped = [], []
        for density, gamma in zip(self.densities, self.gammas, strict=True):
            rank, drop = trim_ranks(n, density, gamma, self.trim, self.flavor)
            ranks.append(rank)
            dropped.append(drop)
        weighted = FLAVORS[self.flavor].weighted_election
        return TiesRule(
            trim=self.trim,
            elect=self.elect,
            merge=self.merge,
            zero_sign=self.zero_sign,
            rescale=self.rescale,
            weights=self.weights,
            elect_weights=self.weights if weighted else (1.0,) * len(self.weights),
            densities=self.densities,
            ranks=tuple(ranks),
            dropped=tuple(dropped),
            scaling=self.scaling,
            key=random_key(self.seed, name) if self.trim in ("random", "magprune") else 0,
            epsilons=self.epsilons,
            row_length=length,
            row_step=step,
        )


@dataclass(frozen=True)
class TiesRule:
    """All that a backend needs beside the tensors; K-tuples are in model order.

    ranks: elements kept plus `dropped` (T2, T3): the lower threshold is the ranks[k]-th largest
        magnitude.
    dropped: elements above the band (T3 `outliers`); the upper threshold is the (dropped[k] + 1)-th
        largest.
    thresholds: precomputed lower thresholds (scope "model", parts of a tensor); then `ranks` is not
        used for trim "magnitude".
    bounds: precomputed upper thresholds, for trim "outliers".
    majority: the precomputed zero sign (scope "model"), +1 or -1; 0 where the backend is to find
        it.
    key: the Philox key of T8.
    epsilons, row_length, row_step: for trim "magprune"; elements of a row, and from one of them to
        the next.

    Where a tensor is merged in parts, the rule for a part also holds:
    factors: the f_k of T3r for rescale "l1", "l2" or "linf", precomputed.
    first: index in the tensor of the part's first element, a multiple of 4 (T8).
    """

    trim: str
    elect: str
    merge: str
    zero_sign: str
    rescale: str
    weights: tuple[float, ...]
    elect_weights: tuple[float, ...]
    densities: tuple[float, ...]
    ranks: tuple[int, ...]
    dropped: tuple[int, ...]
    scaling: float
    key: int
    thresholds: tuple[float, ...] | None = None
    bounds: tuple[float, ...] | None = None
    majority: int = 0
    factors: tuple[float, ...] | None = None
    first: int = 0
    epsilons: tuple[float, ...] = ()
    row_length: int = 1
    row_step: int = 1

    def with_precomputed(self, **values: Any) -> TiesRule:
        """A copy with thresholds, bounds, majority, factors or first filled in."""
        return replace(self, **values)

    def of_tensor(self, own: TiesRule) -> TiesRule:
        """T7: this rule over all tensors for one of them. own: that tensor's by itself."""
        return replace(
            self,
            key=own.key,
            ranks=own.ranks,
            row_length=own.row_length,
            row_step=own.row_step,
        )

    def part(self, first: int, count: int) -> TiesRule:
        """The rule for elements first to first + count, where no element depends on another one."""
        kept = (count,) * len(self.weights) if self.trim == "none" else self.ranks
        return replace(self, first=first, ranks=kept)

    @property
    def lacks_majority(self) -> bool:
        """Whether a majority sign is still to be found, over all that the scope covers (T4)."""
        return self.elect != "none" and self.zero_sign == "majority" and self.majority == 0


@dataclass(frozen=True)
class TiesStats(Counts):
    """What a backend counted in its pass; conflicts are of nonzero election values.

    thresholds: the lower thresholds used, per model (NaN keeps none); empty where trim has none.
    positive, negative: elements with S > 0 and with S < 0, where the zero sign is "majority" (T4);
        else 0.
    """

    thresholds: tuple[float, ...] = ()
    positive: int = 0
    negative: int = 0


def is_elementwise(rule: TiesRule) -> bool:
    """Whether each output element depends on its own inputs alone, so that a tensor may be cut
    anywhere.
    """
    known = rule.trim == "none" or (
        rule.thresholds is not None and (rule.trim == "magnitude" or rule.bounds is not None)
    )
    plain = rule.trim not in ("random", "magprune") and rule.rescale in ("none", "density")
    return plain and known and not rule.lacks_majority


def with_majority(rule: TiesRule, balance_of: Callable[[TiesRule], int]) -> TiesRule:
    """T4: the rule with its majority sign, where that is taken over several calls.

    balance_of: makes all these calls by a rule that assumes +, and returns how many more elements
        have S > 0 than S < 0. Where the sign turns out to be +, its outputs are the result.
    """
    if not rule.lacks_majority:
        return rule
    balance = balance_of(rule.with_precomputed(majority=1))
    return rule.with_precomputed(majority=1 if balance > 0 else -1)


def model_rule(
    options: TiesOptions,
    elements: int,
    select: Callable[[Sequence[int], bool], Iterable[float]],
    balance_of: Callable[[TiesRule], int],
) -> TiesRule:
    """T7, scope "model": the rule over all tensors, as if they were one.

    elements, select: see `model_thresholds`. balance_of: see `with_majority`.
    """
    return with_majority(model_thresholds(options, elements, select), balance_of)


def model_thresholds(
    options: TiesOptions,
    elements: int,
    select: Callable[[Sequence[int], bool], Iterable[float]],
) -> TiesRule:
    """`model_rule` without its majority sign.

    elements: of all tensors together. select(ranks, extra): per model the magnitude of that rank
        over all tensors; with `extra` over one more element, 0.
    """
    whole = options.rule(elements)
    if options.trim in ("magnitude", "outliers"):
        whole = whole.with_precomputed(thresholds=tuple(select(whole.ranks, False)))
    if options.trim == "outliers":
        # `select` returns 0, "keep all", for the rank of the last element. One more element of 0
        # takes that last place, so that the smallest real magnitude is returned as it is.
        above = [dropped + 1 for dropped in whole.dropped]
        whole = whole.with_precomputed(bounds=tuple(select(above, True)))
    return whole


def trim_ranks(n: int, density: float, gamma: float, trim: str, flavor: str) -> tuple[int, int]:
    """(rank, dropped) of T2 and T3 for one model: it keeps the (dropped + 1)-th to the rank-th
    largest magnitude.
    """
    if trim in ("none", "random", "magprune") or density >= 1:
        return n, 0
    if trim == "outliers":
        target = int(density * n)
        if target == 0:
            return 0, 0
        too_small = max(0, n - target - int(gamma * n))
        return n - too_small, n - target - too_small
    rank = int(density * n)
    if flavor == "mergekit" and density > 0 and n > 0:
        rank = max(1, rank)
    elif flavor == "paper":
        rank = min(n, rank + 1)
    return rank, 0


def magprune_rows(n: int, shape: Sequence[int]) -> tuple[int, int]:
    """T3 `magprune`: the elements of a row, which differ in their second index alone, and how far
    apart they are. A vector is one row.
    """
    if len(shape) < 2 or n == 0:
        return max(1, n), 1
    return shape[1], math.prod(shape[2:])


def random_key(seed: int, name: str) -> int:
    """The 64-bit Philox key of T8."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


def random_cutoff(density: float) -> int:
    """T3 `random`: an element is kept iff its word is below this; 2**32 keeps all."""
    return 1 << 32 if density >= 1 else int(density * 4294967296.0)


def resolve_options(
    count: int,
    *,
    density: types.PerModel = 0.2,
    weights: types.PerModel | None = None,
    scaling: SupportsFloat = 1.0,
    flavor: str = "mergekit",
    trim: str = "magnitude",
    elect: str = "sum",
    merge: str | None = None,
    zero_sign: str | None = None,
    scope: str | None = None,
    rescale: str = "none",
    gamma: types.PerModel = 0.01,
    epsilon: types.PerModel = 0.15,
    seed: SupportsIndex = 0,
    non_finite: str = "error",
) -> TiesOptions:
    """Check the options of `ties` for `count` models and fill in what the flavor sets.

    Raises ValueError or TypeError that names the option, the value, what is allowed and the way out
        (E4).
    """
    if count < 1:
        raise ValueError(f"{argument('models')} is empty; pass at least one model")
    tool = FLAVORS[_choice("flavor", flavor, tuple(FLAVORS))]
    densities = _per_model("density", density, count, fractions=True)
    epsilons = _per_model("epsilon", epsilon, count, fractions=True)
    if _choice("trim", trim, TRIMS) == "magprune":
        _check_window(densities, epsilons)
    return TiesOptions(
        densities=densities,
        weights=_per_model("weights", 1.0 if weights is None else weights, count),
        gammas=_per_model("gamma", gamma, count, fractions=True),
        epsilons=epsilons,
        scaling=_number("scaling", scaling),
        flavor=flavor,
        trim=_choice("trim", trim, TRIMS),
        elect=_choice("elect", elect, ELECTIONS),
        merge=_choice("merge", tool.merge if merge is None else merge, MERGES),
        zero_sign=_choice(
            "zero_sign", tool.zero_sign if zero_sign is None else zero_sign, ZERO_SIGNS
        ),
        scope=_choice("scope", tool.scope if scope is None else scope, SCOPES),
        rescale=_choice("rescale", rescale, RESCALES),
        seed=_seed(seed),
        non_finite=_choice("non_finite", non_finite, NON_FINITE),
    )


def _check_window(densities: Sequence[float], epsilons: Sequence[float]) -> None:
    """T3 `magprune`: the probabilities are in [0, 1]."""
    for k, (density, epsilon) in enumerate(zip(densities, epsilons, strict=True)):
        if 0 < density < 1 and (density - epsilon < 0 or density + epsilon > 1):
            most = min(density, 1 - density)
            raise ValueError(
                f"{spelled('epsilon', epsilon, k)} with {spelled('density', density, k)} leaves"
                f" [0, 1]: elements are kept with probabilities from density - epsilon to density +"
                f" epsilon; for this density pass an epsilon of at most {most:.6g}"
            )


def _choice(what: str, value: str, allowed: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else ()
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument(what, value)} is not one of {', '.join(map(repr, allowed))}{hint}")


def spelled(what: str, number: float, model: int | None = None) -> str:
    """`density=1.0000001`, or `density[2]=...` for one model's: a refused number, not rounded."""
    name = argument(what) if model is None else of_model(what, model)
    return f"{name}={exact(number)}"


def _number(what: str, value: Any, model: int | None = None) -> float:
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        name = argument(what) if model is None else of_model(what, model)
        raise TypeError(f"{name}={shown(value)} is {type_of(value)}; pass a number")
    _check_has_values(what, value)
    try:
        number = float(value)
    except (RuntimeError, TypeError, ValueError):  # several elements, or none that have values
        name = argument(what) if model is None else of_model(what, model)
        raise TypeError(f"{name} is {type_of(value)} that is no number; pass one") from None
    except OverflowError:  # an integer beyond float64
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{spelled(what, number, model)} is not finite; pass a finite number")
    return number


def _fraction(what: str, value: Any, model: int | None = None) -> float:
    number = _number(what, value, model)
    if not 0 <= number <= 1:
        # Between 1 and 2 a rounding error above 1 is likelier than a percentage.
        hint = f"; for {exact(number)}% pass {exact(number / 100)}" if 2 <= number <= 100 else ""
        raise ValueError(f"{spelled(what, number, model)} is outside [0, 1]{hint}")
    return number


def _per_model(what: str, value: Any, count: int, *, fractions: bool = False) -> tuple[float, ...]:
    one = _fraction if fractions else _number
    value = _plain(what, value)
    if not isinstance(value, (list, tuple)):
        return (one(what, value),) * count
    if len(value) != count:
        raise ValueError(
            f"{argument(what)} has {counted(len(value), 'value')} for {counted(count, 'model')};"
            " pass one number, or one per model"
        )
    return tuple(one(what, v, k) for k, v in enumerate(value))


def _check_has_values(what: str, value: Any) -> None:
    """TypeError for a tensor whose memory was freed or cut, before anything is read from it.
    ValueError for one whose gradient is recorded.
    """
    _check_no_gradient(what, value)
    if hasattr(value, "untyped_storage") and _is_cut(value):
        raise TypeError(
            f"{argument(what)} is {type_of(value)} whose memory was freed or cut; pass numbers"
        )


def _is_cut(tensor: Any) -> bool:
    """Whether a tensor reaches beyond its storage: reading it would return foreign memory."""
    import torch  # a tensor is here, so that it is loaded

    try:
        with torch._C.DisableTorchFunctionSubclass():  # a class may answer otherwise
            if not tensor.numel():
                return False
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
            return bool((last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes())
    except (AttributeError, RuntimeError, ValueError):  # no storage at all: `tolist` raises
        return False


def _check_no_gradient(what: str, value: Any) -> None:
    """ValueError for a tensor whose gradient is recorded, which a number taken from it would cut
    off in silence.
    """
    if getattr(value, "requires_grad", False):
        import torch  # a tensor is here, so that it is loaded

        if torch.is_grad_enabled():
            raise ValueError(
                f"{argument(what)} requires a gradient, which a number has not; pass"
                f" {what}.detach(), or merge under torch.no_grad(). pymerge.merge gives weights a"
                " gradient"
            )


def _plain(what: str, value: Any) -> Any:
    """A tensor or array as nested lists; anything else as it is."""
    tolist = getattr(value, "tolist", None)
    if tolist is None:
        return value
    _check_has_values(what, value)
    try:
        return tolist()
    except (AttributeError, RuntimeError, ValueError):  # on the meta device, nested, ...
        raise TypeError(
            f"{argument(what)} is {type_of(value)} that has no values here; pass numbers"
        ) from None


def _integer(what: str, value: Any) -> int:
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        _check_has_values(what, value)
        with suppress(RuntimeError, TypeError, ValueError):  # an array of several, or of floats
            return int(value.__index__())
    raise TypeError(f"{argument(what, value)} is {type_of(value)}; pass an integer")


def _seed(value: Any) -> int:
    seed = _integer("seed", value)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"{argument('seed', seed)} is outside [0, 2**64)")
    return seed
