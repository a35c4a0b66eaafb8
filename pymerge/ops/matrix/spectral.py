"""`tsv` and `iso_c` of one matrix, in binary64 by eigenvalues of small Gram matrices (X3, X6, X7).

A Gram matrix in binary64 has the singular vectors of a binary32 matrix to more digits than a
decomposition of the matrix itself in binary32 (a singular value of s times the largest to 2^-52 /
s^2 of it, and X3 drops those below 2^-20), at less than half of the time of one in binary64: 0.10 s
against 0.31 s for 1536 x 384, 1.6 s against 4.2 s for 4096 x 1024, one thread of an AVX-512 server
processor, MKL 2024.2, 2026-11-30.

On a CPU every call of the libraries has one thread, so that the bits do not depend on how many
there are; the tasks are dealt to threads instead.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from pymerge.dtypes import name_of
from pymerge.rules.matrix import (
    DEPENDENT,
    ROWS,
    MatrixOptions,
    floor_of,
    rounding_level,
    share_of,
)

Item = TypeVar("Item")
Found = TypeVar("Found")

# Torch's number of threads is one for the process: two merges at a time would set each other's.
_ALONE = threading.Lock()


class Factors(NamedTuple):
    """Leading singular vectors and values: U (m, r), s (r,), V (n, r), in binary64."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def tsv(
    deltas: Sequence[torch.Tensor], models: Sequence[torch.Tensor], options: MatrixOptions
) -> torch.Tensor:
    """X6: T from the task vectors, in their dtype."""
    tall, turned = _tall(deltas)
    share = share_of(tall[0].shape, options.count)

    def factors(k: int) -> Factors:
        return _factors(tall[k], _level(models[k]), share)

    with _one_thread(tall[0].device) as threads:
        parts = _each(factors, range(len(tall)), threads)
        left = torch.cat([part.left for part in parts], 1)
        values = torch.cat([part.values for part in parts])
        right = torch.cat([part.right for part in parts], 1)
        del parts
        left, right = _each(orthogonal, [left, right], threads)
        merged = (left * values) @ right.T
    return _back(merged, turned, deltas[0])


def iso_c(
    deltas: Sequence[torch.Tensor], models: Sequence[torch.Tensor], options: MatrixOptions
) -> torch.Tensor:
    """X7: T from the task vectors, in their dtype."""
    tall, turned = _tall(deltas)
    with _one_thread(tall[0].device):
        total = tall[0].double()
        for each in tall[1:]:
            total += each
        level = math.sqrt(sum(_level(model) ** 2 for model in models))
        values, basis = _eigenvectors(total)
        kept = _kept(values, level)
        if not kept:
            return torch.zeros_like(deltas[0])
        values, basis = values[:kept], basis[:, :kept]
        turn = (basis * (values.mean() / values)) @ basis.T
        merged = torch.empty_like(total)
        for rows in _chunks(total):
            merged[rows] = total[rows] @ turn
    return _back(merged, turned, deltas[0])


def orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    """X6: the polar factor of (m, r): the nearest matrix with orthonormal columns, of the rank of
    `vectors`.
    """
    if vectors.shape[1] == 0:
        return vectors
    values, basis = torch.linalg.eigh(_gram(vectors))
    kept = values > DEPENDENT * values[-1]
    values, basis = values[kept], basis[:, kept]
    return vectors @ ((basis / values.sqrt()) @ basis.T)


def _factors(matrix: torch.Tensor, level: float, share: int) -> Factors:
    """At most `share` singular vectors of (m, n), m >= n, of those above rounding (X3)."""
    values, basis = _eigenvectors(matrix)
    count = min(share, _kept(values, level))
    values, basis = values[:count], basis[:, :count].contiguous()
    left = basis.new_empty(matrix.shape[0], count)
    for rows in _chunks(matrix):
        left[rows] = (matrix[rows].double() @ basis) / values
    return Factors(left, values, basis)


def _eigenvectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values in descending order, and right singular vectors, of (m, n), m >= n."""
    power = _power_of_two(float(matrix.abs().max()))
    values, basis = torch.linalg.eigh(_gram(matrix, power))
    return values.clamp_(min=0).sqrt_().flip(0) / power, basis.flip(1)


def _gram(matrix: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """(power X)^T (power X) of (m, n), in binary64, some rows at a time."""
    size = matrix.shape[1]
    total = matrix.new_zeros(size, size, dtype=torch.float64)
    for rows in _chunks(matrix):
        part = matrix[rows].double()
        if power != 1:
            part = part * power
        total.addmm_(part.T, part)
    return total


def _kept(values: torch.Tensor, level: float) -> int:
    """X3: how many singular values, in descending order, are some."""
    largest = float(values[0])
    return int((values > floor_of(largest, level)).sum()) if largest > 0 else 0


def _level(model: torch.Tensor) -> float:
    """X3: of a model's matrix."""
    norm = float(torch.linalg.vector_norm(model.detach(), dtype=torch.float64))
    rows, columns = model.shape
    return rounding_level(name_of(model.dtype), norm, (rows, columns))


def _tall(deltas: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], bool]:
    """(m, n) with m >= n, and whether they were transposed."""
    rows, columns = deltas[0].shape
    return ([each.T for each in deltas], True) if rows < columns else ([*deltas], False)


def _back(merged: torch.Tensor, turned: bool, like: torch.Tensor) -> torch.Tensor:
    return (merged.T if turned else merged).to(like.dtype).contiguous()


def _chunks(matrix: torch.Tensor) -> Iterator[slice]:
    for begin in range(0, matrix.shape[0], ROWS):
        yield slice(begin, begin + ROWS)


def _power_of_two(largest: float) -> float:
    """The power of two that brings a matrix to unit scale, so that squares neither overflow nor
    vanish.
    """
    return 2.0 ** -math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def _each(function: Callable[[Item], Found], items: Sequence[Item], threads: int) -> list[Found]:
    """The results in order, computed by several threads."""
    if threads <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items)), thread_name_prefix="pymerge-matrix") as pool:
        return [*pool.map(function, items)]


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[int]:
    """Inside, libraries use one thread on a CPU. Gives the number of threads to deal work to."""
    if device.type != "cpu":
        yield 1
        return
    with _ALONE:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield before
        finally:
            torch.set_num_threads(before)
