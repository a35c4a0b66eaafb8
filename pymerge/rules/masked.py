"""What the options of `masked` mean for one tensor: the numbers that its merge needs, from what a
backend measures of the tensor (docs/spec/masked.md).

Every backend measures and merges; what follows from the measurements is computed here, once.
Imports neither torch nor numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, SupportsFloat, get_args

from pymerge.dtypes import elements
from pymerge.messages.arguments import argument
from pymerge.messages.words import counted, exact
from pymerge.rules import types
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import NON_FINITE, _choice, _fraction, _number

METHODS: tuple[str, ...] = get_args(types.MaskedMethod)
FLAVORS: tuple[str, ...] = get_args(types.MaskedFlavor)
# P4, P7: these merge one model.
PAIRS = ("nearswap", "arcee_fusion")

_LEAST_SUM = 1e-6  # P6 in flavor mergekit: of mean squares, and of a divisor
_EVEN = (
    "sce weighs the models alike, as mergekit does, since their mean squares sum to less than 1e-6;"
    " flavor 'paper' weighs them by energy"
)


@dataclass(frozen=True)
class MaskedRule:
    """All that a backend's merge needs beside the tensors.

    merge: "near" (P4), "overlap" (P5), "consensus" (P6) or "importance" (P7).
    key: "variance", "importance" or "negative_importance" (P2).
    bound: t, epsilon, or the least key that is selected.
    whole: every element is selected, whatever its key.
    factors: lambda_k of P5, w_k of P6; 1 for other merges.
    floor: the least divisor of P6; 0 where a divisor of 0 becomes 1.
    row: elements of a row (P2).
    remark: what a person should know of this tensor's rule; "" for nothing.
    """

    merge: str
    bound: float
    factors: tuple[float, ...]
    key: str = "variance"
    whole: bool = False
    floor: float = 0.0
    row: int = 1
    remark: str = ""


class Measures(Protocol):
    """One tensor of a base and its models, on a backend: what it is asked in one merge."""

    wide: bool  # whether the working precision is binary64

    def divergences(self, rule: MaskedRule, exact: bool) -> float:
        """Find the divergence of each row (P2), in binary64 or in the working precision. The least
        of them, or 0.
        """

    def nonzero(self, rule: MaskedRule) -> int:
        """How many keys are above 0."""

    def select(self, rule: MaskedRule, ranks: Sequence[int]) -> list[float]:
        """The keys of these ranks, counted from the largest, which has rank 1."""

    def energies(self, rule: MaskedRule) -> list[float]:
        """The sum of squares over the selected elements, of each model (P6)."""

    def overlaps(self, rule: MaskedRule) -> list[tuple[int, int]]:
        """Of each model the elements that others have too, and that it alone has (P5)."""


# The parameters of each method, as recipes name them.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "nearswap": ("t",),
    "ram": ("epsilon",),
    "ramplus_tl": ("r", "alpha", "epsilon"),
    "sce": ("select_topk", "flavor"),
    "arcee_fusion": ("flavor",),
}


@dataclass(frozen=True)
class MaskedOptions(OpOptions):
    """Validated options of a method under masks, for `count` models."""

    op: ClassVar[str] = "masked"

    method: str
    count: int
    flavor: str = "mergekit"
    t: float = 0.0
    epsilon: float = 1e-5
    r: float = 0.1
    alpha: float = 0.2
    select_topk: float = 1.0
    non_finite: str = "error"

    @property
    def models(self) -> int:
        return self.count

    def may_be_cut(self, shape: tuple[int, ...]) -> bool:
        return self.method in ("nearswap", "ram")

    def memory(self, shape: tuple[int, ...]) -> int:
        """The divergences of all rows (P2)."""
        if self.method != "arcee_fusion":
            return 0
        return 8 * elements(shape) // max(1, row_of(shape))

    def words(self) -> str:
        values = [(name, getattr(self, name)) for name in PARAMETERS[self.method]]
        return ", ".join(
            f"{name} {value if isinstance(value, str) else exact(value)}" for name, value in values
        )

    def rule(self, n: int, row: int, measures: Measures) -> MaskedRule:
        """The rule for a tensor of n elements in rows of `row`. Reads the inputs as often as P3 to
        P7 ask for.
        """
        ones = (1.0,) * self.count
        if self.method == "nearswap":
            return MaskedRule("near", self.t, ones)
        if self.method in ("ram", "ramplus_tl"):
            rule = MaskedRule("overlap", self.epsilon, ones)
            if self.method == "ram" or n == 0:
                return rule
            return replace(rule, factors=tuple(map(self._reinforced, measures.overlaps(rule))))
        if self.method == "sce":
            return self._consensus(n, measures)
        return self._importance(n, row, measures)

    def _reinforced(self, overlap: tuple[int, int]) -> float:
        """P5: lambda_k."""
        shared, alone = overlap
        return 1 + self.r * min(shared / alone, self.alpha) if alone else 1.0

    def _consensus(self, n: int, measures: Measures) -> MaskedRule:
        """P6: which elements are selected, and the weights."""
        even = (1 / self.count,) * self.count
        floor = _LEAST_SUM if self.flavor == "mergekit" else 0.0
        rule = MaskedRule("consensus", 0.0, even, whole=self.select_topk >= 1, floor=floor)
        if n == 0:
            return rule
        if not rule.whole:
            rank = int(measures.nonzero(rule) * self.select_topk)
            # NaN selects none.
            rule = replace(rule, bound=measures.select(rule, [rank])[0] if rank else float("nan"))
        means = [energy / n for energy in measures.energies(rule)]
        total = sum(means)
        if total == 0:
            return rule
        if total < _LEAST_SUM and self.flavor == "mergekit":
            return replace(rule, remark=_EVEN if self.count > 1 else "")
        return replace(rule, factors=tuple(mean / total for mean in means))

    def _importance(self, n: int, row: int, measures: Measures) -> MaskedRule:
        """P7: the threshold from the quartiles of all scores."""
        rule = MaskedRule("importance", 0.0, (1.0,), key="importance", row=max(1, row))
        if n == 0:
            return rule
        least = measures.divergences(rule, self.flavor == "paper")
        negative = replace(rule, key="negative_importance")
        below = measures.nonzero(negative) if least < 0 else 0
        places = [quarter * (n - 1) // 4 for quarter in (1, 2, 3)]  # in ascending order, from 0
        low = [place for place in places if place < below]
        found = [-value for value in measures.select(negative, [p + 1 for p in low])] if low else []
        high = [n - place for place in places if place >= below]
        found += measures.select(rule, high) if high else []
        first, median, third = found
        rounded = (lambda x: x) if measures.wide else _to_single
        spread = rounded(1.5 * rounded(third - first))
        return replace(rule, bound=rounded(median + spread))


def row_of(shape: Sequence[int]) -> int:
    """Elements of a row (P2)."""
    return shape[-1] if shape else 1


def _to_single(x: float) -> float:
    """x rounded to binary32."""
    try:
        value: float = struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return float("inf") if x > 0 else float("-inf")
    return value


def resolve_masked(
    method: str,
    count: int,
    *,
    flavor: str = "mergekit",
    t: SupportsFloat = 0.0,
    epsilon: SupportsFloat = 1e-5,
    r: SupportsFloat = 0.1,
    alpha: SupportsFloat = 0.2,
    select_topk: SupportsFloat = 1.0,
    non_finite: str = "error",
) -> MaskedOptions:
    """Check the options of a method under masks for `count` models.

    Raises ValueError or TypeError that names the option, the value and what is allowed.
    """
    if count < 1:
        raise ValueError(f"{argument('models')} is empty; pass at least one model")
    if method in PAIRS and count != 1:
        raise ValueError(
            f"{argument('models')} has {counted(count, 'model')}, and {method} merges one model"
            " into its base; pass one model"
        )
    return MaskedOptions(
        method=method,
        count=count,
        flavor=_choice("flavor", flavor, FLAVORS),
        t=_number("t", t),
        epsilon=_not_negative("epsilon", epsilon),
        r=_number("r", r),
        alpha=_not_negative("alpha", alpha),
        select_topk=_fraction("select_topk", select_topk),
        non_finite=_choice("non_finite", non_finite, NON_FINITE),
    )


def _not_negative(what: str, value: Any) -> float:
    number = _number(what, value)
    if number < 0:
        raise ValueError(f"{argument(what)}={exact(number)} is outside [0, infinity)")
    return number
