"""Options of the methods that need only the Gram matrix of their inputs, and how a tensor is a
matrix to `gram` and `combine` (docs/spec/gram.md).

Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pymerge.dtypes import elements
from pymerge.messages.arguments import argument
from pymerge.rules import types
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import TiesRule, resolve_options

PER: tuple[str, ...] = get_args(types.Per)


def check_per(per: str) -> None:
    """ValueError for another word than those of `per`."""
    if not isinstance(per, str) or per not in PER:
        raise ValueError(f"{argument('per', per)} is not one of {', '.join(map(repr, PER))}")


def matrix_of(shape: tuple[int, ...], per: str) -> tuple[int, int]:
    """G1: (rows, columns) of a tensor: one row of all elements, the rows along its last dimension,
    or its first dimension by all others.
    """
    n = elements(shape)
    if per == "tensor" or not shape:
        return 1, n
    if per == "row":
        return elements(shape[:-1]), shape[-1]
    return shape[0], elements(shape[1:])


def flat_rule(coefficients: Sequence[float], n: int) -> TiesRule:
    """G5 for a whole tensor of n elements: the rule by which `ties` combines with finite
    coefficients. It trims nothing, elects nothing and adds up.
    """
    options = resolve_options(
        len(coefficients), density=1.0, trim="none", elect="none", merge="sum", weights=coefficients
    )
    return options.rule(n)


@dataclass(frozen=True)
class GramOptions(OpOptions):
    """A method that combines its inputs with coefficients that follow from their Gram matrix.

    method: which coefficients (G6 to G10). per: what they are found for, "tensor", "row" or
        "column". values: the method's parameters.
    as_mergekit: whether cases that mergekit decides otherwise than the papers get its numbers.
    """

    op: ClassVar[str] = "gram"

    method: str
    count: int
    per: str
    values: tuple[tuple[str, Any], ...]
    as_mergekit: bool
    non_finite: str

    @property
    def models(self) -> int:
        return self.count

    def memory(self, shape: tuple[int, ...]) -> int:
        """Gram matrices and coefficients of all rows or columns, in binary64, and as many of what
        is computed on the way; of columns also the sums of 4096 rows each.
        """
        rows, columns = matrix_of(shape, self.per)
        held, sums = (columns, rows // 4096 + 1) if self.per == "column" else (rows, 0)
        return 8 * held * self.count * (4 * self.count + 4 + sums * (self.count + 1) // 2)

    def words(self) -> str:
        told = [f"{name} {_told(value)}" for name, value in self.values]
        if self.per != "tensor":
            told.append(f"per {self.per}")
        return ", ".join(told)


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        texts = [f"{each:g}" for each in value]
        return texts[0] if len(set(texts)) == 1 else "/".join(texts)
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}"
