"""Options of the methods that take task vectors as matrices, and the numbers that decide in them
(docs/spec/matrix.md). Imports neither torch nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pymerge.dtypes import elements
from pymerge.messages.words import exact
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import resolve_options

# The parameters of each method, as recipes name them.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "wudi": ("iterations", "damping", "lambda"),
    "tsv": ("lambda",),
    "iso_c": ("lambda",),
}
ITERATIONS, DAMPING = 5, 0.1

# X3: a singular value is none where rounding of the stored weights explains it and it is no more
# than this part of the largest; or, whatever they are, at the level of binary32's rounding.
_SMALL, _NOTHING = 2.0**-10, 2.0**-20
# X3: half a unit in the last place of 1.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
# X6: eigenvalues of the Gram matrix of unit vectors below this part of the largest are none.
DEPENDENT = 2.0**-40

# Rows of a matrix that are in binary64 at a time.
ROWS = 1024


@dataclass(frozen=True)
class MatrixOptions(OpOptions):
    """Checked options of a method on matrices, for `count` models. scaling: lambda."""

    op: ClassVar[str] = "matrix"

    method: str
    count: int
    scaling: float = 1.0
    iterations: int = ITERATIONS
    damping: float = DAMPING
    non_finite: str = "error"

    @property
    def models(self) -> int:
        return self.count

    @property
    def reports(self) -> bool:
        return self.method == "wudi"

    def of_tensor(self, shape: tuple[int, ...], linear: bool) -> OpOptions:
        """X2: base + scaling * the average of the task vectors, for a tensor that is no linear
        layer's.
        """
        if linear and len(shape) in (2, 3):
            return self
        return resolve_options(
            self.count,
            trim="none",
            elect="none",
            density=1.0,
            merge="weighted_mean",
            scaling=self.scaling,
            non_finite=self.non_finite,
        )

    def memory(self, shape: tuple[int, ...]) -> int:
        """Of one matrix, in binary32 where no tensor is wider; a stack of matrices is merged one by
        one.
        """
        rows, columns = shape[-2:]
        size, k = elements((rows, columns)), self.count
        if self.method == "wudi":
            # As a solve by statistics: task vectors, their distances from the start, products, K of
            # each, and the Gram matrices; a dozen matrices and eight squares.
            return 4 * (size * (4 * k + 12) + (k + 8) * columns**2)
        small = min(rows, columns)
        chunk = 8 * 3 * ROWS * max(rows, columns)
        # A factorisation: Gram matrix, eigenvectors, and their workspace.
        factors = 8 * 5 * small**2
        if self.method == "iso_c":
            return 4 * k * size + 8 * 3 * size + factors + chunk
        # Task vectors; K factorisations at a time, and their singular vectors; the orthogonal ones,
        # and the result.
        return 4 * k * size + k * factors + chunk * k + 8 * 5 * size + 8 * 2 * small**2

    def words(self) -> str:
        values = {"lambda": self.scaling, "iterations": self.iterations, "damping": self.damping}
        return ", ".join(f"{name} {exact(values[name])}" for name in PARAMETERS[self.method])


def rounding_level(dtype: str, norm: float, shape: tuple[int, int]) -> float:
    """X3: what rounding to a dtype may do to the singular values of a matrix of this norm."""
    rows, columns = shape
    size = rows * columns
    return _ROUNDING[dtype] * norm * (math.sqrt(rows) + math.sqrt(columns)) / math.sqrt(size)


def floor_of(largest: float, level: float) -> float:
    """X3: singular values up to this are none."""
    return max(_NOTHING * largest, min(level, _SMALL * largest))


def share_of(shape: Sequence[int], count: int) -> int:
    """X6: the singular vectors that each task gets."""
    return max(1, min(shape) // count)
