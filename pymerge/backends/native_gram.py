"""The compiled kernels of `gram` and `combine` (docs/spec/gram.md). Imports neither torch nor
numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.backends import native
from pymerge.backends.native import Buffer


def gram(
    models: Sequence[Buffer],
    base: Buffer | None,
    shape: tuple[int, int],
    by_column: bool,
    out: int,
    threads: int = 0,
) -> None:
    """The dot products of K buffers (less the base's) for each row, or column, of a matrix of this
    shape (docs/spec/gram.md, G2 and G3).

    out: the address of float64, K (K + 1) / 2 for each row or column: (1, 1), (1, 2), ..., (2, 2),
        ... The bits depend neither on the number of threads nor on the level.
    """
    native.load().gram(
        [native.pointer(b) for b in models],
        None if base is None else native.pointer(base),
        *shape,
        by_column,
        out,
        native.thread_count(threads),
        native.forced_level(),
    )


def combine(
    models: Sequence[Buffer],
    base: Buffer | None,
    shape: tuple[int, int],
    by_column: bool,
    coefficients: int,
    out: Buffer,
    threads: int = 0,
) -> None:
    """base + sum_k c_k (models[k] - base) into `out`, which overlaps no input (docs/spec/gram.md,
    G5).

    coefficients: the address of float64, (rows, K), or (K, columns) where they are of columns.
    """
    native.load().combine(
        [native.pointer(b) for b in models],
        None if base is None else native.pointer(base),
        *shape,
        by_column,
        coefficients,
        native.pointer(out),
        native.thread_count(threads),
        native.forced_level(),
    )
