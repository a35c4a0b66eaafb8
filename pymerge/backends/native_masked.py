"""The compiled kernels of `masked` (docs/spec/masked.md). Imports neither torch nor numpy."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from pymerge.backends import native
from pymerge.rules.masked import MaskedRule
from pymerge.rules.options import Counts

_KEY = {"variance": 0, "importance": 1, "negative_importance": 2}
_MERGE = {"near": 0, "overlap": 1, "consensus": 2, "importance": 3}


class MaskedTensor:
    """A base and K models of n elements, for docs/spec/masked.md: `Measures` of
    pymerge/rules/masked.py, and the merge.

    The inputs may be regions of mapped files. Neither threads nor level change a bit.
    """

    def __init__(
        self,
        models: Sequence[native.Buffer],
        base: native.Buffer,
        n: int,
        out_dtype: str,
        threads: int = 0,
    ) -> None:
        self.wide = "float64" in (out_dtype, base[1], *(dtype for _, dtype in models))
        self._inputs = [native.pointer(b) for b in models], native.pointer(base)
        self._n = n
        self._run = native.thread_count(threads), native.forced_level()
        self._held = array("f")

    def divergences(self, rule: MaskedRule, exact: bool) -> float:
        code, size = ("d", 8) if self.wide else ("f", 4)
        self._held = array(code, bytes(size * (self._n // rule.row)))
        least: float = native.load().masked_divergences(
            *self._inputs,
            self._n,
            self._numbers(rule),
            exact,
            self._held.buffer_info()[0],
            *self._run,
        )
        return least

    def nonzero(self, rule: MaskedRule) -> int:
        found: int = native.load().masked_nonzero(
            *self._inputs, self._n, self._numbers(rule), *self._run
        )
        return found

    def select(self, rule: MaskedRule, ranks: Sequence[int]) -> list[float]:
        found: list[float] = native.load().masked_select(
            *self._inputs, self._n, self._numbers(rule), list(ranks), *self._run
        )
        return found

    def energies(self, rule: MaskedRule) -> list[float]:
        found: list[float] = native.load().masked_energies(
            *self._inputs, self._n, self._numbers(rule), *self._run
        )
        return found

    def overlaps(self, rule: MaskedRule) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = native.load().masked_overlaps(
            *self._inputs, self._n, self._numbers(rule), *self._run
        )
        return found

    def merge(self, rule: MaskedRule, out: native.Buffer) -> Counts:
        """P4 to P8 into `out`, which overlaps no input."""
        kept, conflicts, non_finite = native.load().masked(
            *self._inputs, native.pointer(out), self._n, self._numbers(rule), *self._run
        )
        return Counts(kept, conflicts, non_finite, rule.remark)

    def _numbers(self, rule: MaskedRule) -> dict[str, object]:
        return {
            "wide": self.wide,
            "merge": _MERGE[rule.merge],
            "key": _KEY[rule.key],
            "divergences": native.pointer(
                (self._held.buffer_info()[0], "float64" if self.wide else "float32")
            ),
            "row": rule.row,
            "bound": rule.bound,
            "whole": rule.whole,
            "factors": rule.factors,
            "floor": rule.floor,
        }
