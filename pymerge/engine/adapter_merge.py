"""Merging adapters into an adapter: its factors, and what they lose (docs/spec/low_rank.md, L7 to
L9).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.backends import native
from pymerge.checkpoint.adapter import AdaptedModel
from pymerge.checkpoint.ahead import Loaded
from pymerge.checkpoint.low_rank import values_of
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.writer import ShardWriter
from pymerge.dtypes import elements
from pymerge.engine.executor import Executor, Made
from pymerge.errors import NonFiniteError
from pymerge.interrupt import check
from pymerge.messages.words import some_names
from pymerge.planning.plan import Factor, Plan, PlannedTensor
from pymerge.rules.options import Counts
from pymerge.rules.ties import TiesStats

if TYPE_CHECKING:
    import numpy.typing as npt

# Of the subspace iteration (L9): more directions than are kept, and passes over the update.
_MORE = 16
_PASSES = 6
_LEAST = 2.0**-40


class AdapterExecutor(Executor):
    """Makes the factors of an adapter. Both of a module are made with the first one."""

    def __init__(self, plan: Plan, models: Sequence[OpenModel], threads: int) -> None:
        self._plan = plan
        self._models = models
        self._threads = threads
        self._pair: dict[str, npt.NDArray[Any]] = {}  # A and B of the module at hand
        self._stats: TiesStats | None = None
        self._lost: dict[str, float] = {}  # module -> share of its update's norm
        self._squares = np.zeros(2)  # of what was lost, and of all

    def takes(self, index: int) -> bool:
        return self._plan.tensors[index].factor is not None

    def make(self, index: int, reads: Iterator[Loaded], writer: ShardWriter) -> Made:
        tensor = self._plan.tensors[index]
        assert tensor.factor is not None
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused below
            if tensor.factor.which == "A":
                self._pair = self._made(tensor, tensor.factor)
            values = self._pair[tensor.factor.which].astype(np.float32).reshape(-1)
        if not np.isfinite(values).all():
            raise NonFiniteError(self._why_not_finite(tensor.factor))
        values = np.ascontiguousarray(values)
        writer.put(values.ctypes.data, values.nbytes, (tensor.name, tensor.dtype))
        check()
        return Made(stats=[_of_elements(self._stats, tensor)])

    def notes(self) -> list[str]:
        if not self._lost:
            return []
        whole = math.sqrt(self._squares[0] / self._squares[1]) if self._squares[1] else 0.0
        module = max(self._lost, key=lambda name: self._lost[name])
        return [
            f"{100 * whole:.2g} % of the merged update was lost to its lower rank (by its norm; at"
            f" most {100 * self._lost[module]:.2g} % of a module's, {module})"
        ]

    def _made(self, tensor: PlannedTensor, factor: Factor) -> dict[str, npt.NDArray[Any]]:
        """B, (d_out, r), and A, (r, ...), of one module, and what is lost to their rank."""
        if factor.options is None:
            self._stats = None
            b, a = self._concatenated(factor)
            if factor.exact:
                return {"B": b, "A": a}
            b, a, lost, whole = compressed(b, a, factor.rank)
        else:
            update = self._merged(factor, tensor.key_name)
            b, a, lost, whole = approximated(update, factor.rank)
            if factor.transposed:
                b, a = a.T, b.T
        self._squares += (lost, whole)
        self._lost[factor.module] = math.sqrt(lost / whole) if whole else 0.0
        return {"B": b, "A": a}

    def _concatenated(self, factor: Factor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """[w_1 s_1 B_1, ...] and [A_1; ...], whose product is the weighted sum (L7)."""
        left, right = [], []
        for term in factor.terms:
            b, a, scale = self._factors(term.model, term.module)
            left.append(b.astype(np.float64) * (term.coefficient * scale))
            right.append(a.astype(np.float64))
        return np.concatenate(left, axis=1), np.concatenate(right, axis=0)

    def _factors(self, model: int, module: str) -> tuple[Any, Any, float]:
        """(B as (d_out, r), A as (r, ...), s) of one adapter's module."""
        adapted = self._models[model]
        assert isinstance(adapted, AdaptedModel)
        update = adapted.adapter.updates[module]
        b, a = values_of(update.b), values_of(update.a)
        return b.reshape(-1, update.rank), a.reshape(update.rank, -1), update.scale

    def _why_not_finite(self, factor: Factor) -> str:
        damaged = [
            self._models[term.model].reference
            for term in factor.terms
            if term.module
            and not all(np.isfinite(each).all() for each in self._factors(term.model, term.module))
        ]
        if damaged:
            return (
                f"the factors of {factor.module} are NaN or infinite in {some_names(damaged)}; mend"
                " or leave out such an adapter"
            )
        return (
            f"the factors of {factor.module} overflow float32 to infinity, though those of every"
            " adapter are finite; choose smaller weights"
        )

    def _merged(self, factor: Factor, key_name: str) -> npt.NDArray[Any]:
        """The whole updates, merged as the method merges task vectors, in the weight's layout."""
        assert factor.options is not None
        count = elements(factor.shape)
        rows = factor.shape[0]
        updates = []
        zeros = np.zeros(count, np.float32)
        for term in factor.terms:
            update = zeros
            if term.module:
                b, a, scale = self._factors(term.model, term.module)
                left, right = (a.T, b.T) if factor.transposed else (b, a)
                update = _product(left, right, scale).reshape(-1)
            updates.append(update)
        merged = np.empty(count, np.float32)
        rule = factor.options.rule(count, key_name)
        buffers = [(update.ctypes.data, "float32") for update in updates]
        out = (merged.ctypes.data, "float32")
        self._stats = native.ties(buffers, None, out, count, rule, self._threads)
        return merged.reshape(rows, -1)


def _product(left: Any, right: Any, scale: float) -> npt.NDArray[Any]:
    """scale (left right), by L2, of a base of zeros."""
    left, right = (np.ascontiguousarray(each, np.float32) for each in (left, right))
    shape = (left.shape[0], right.shape[1])
    zeros, out = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    native.add_low_rank(
        (zeros.ctypes.data, "float32"),
        left.ctypes.data,
        (right.ctypes.data, shape[1]),
        left.shape[1],
        scale,
        (out.ctypes.data, "float32"),
        shape,
    )
    return out


def compressed(
    b: npt.NDArray[Any], a: npt.NDArray[Any], rank: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], float, float]:
    """(B, A, square of what is lost, square of all) of the best approximation of b a by that rank
    (L8): QR of both factors, and an SVD of the product of the triangles.
    """
    outputs, upper = np.linalg.qr(b)
    inputs, lower = np.linalg.qr(a.T)
    return _cut(outputs, upper @ lower.T, inputs.T, rank)


def approximated(
    update: npt.NDArray[Any], rank: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], float, float]:
    """Approximately the same for a whole update (L9): within the space of its largest directions,
    which are found by passing random ones through it.
    """
    # In fp32 the products of very large elements would overflow, those of very small ones vanish.
    largest = float(max(update.max(initial=0.0), -update.min(initial=0.0)))
    half = 0 if _LEAST < largest < 1 / _LEAST else math.frexp(largest)[1] // 2
    if half:
        update = np.ldexp(update, -2 * half)
    total = float(np.square(update, dtype=np.float64).sum())
    width = min(rank + _MORE, *update.shape)
    start = np.random.Generator(np.random.Philox(0)).standard_normal((update.shape[1], width))
    space = np.linalg.qr(update @ start.astype(np.float32))[0]
    for _ in range(_PASSES):
        check()
        space = np.linalg.qr(update.T @ space)[0]
        space = np.linalg.qr(update @ space)[0]
    inner = (space.T @ update).astype(np.float64)
    inputs, lower = np.linalg.qr(inner.T)
    b, a, lost, inside = _cut(space.astype(np.float64), lower.T, inputs.T, rank)
    lost = max(0.0, total - (inside - lost))
    return (
        np.ldexp(b, half),
        np.ldexp(a, half),
        math.ldexp(lost, 4 * half),
        math.ldexp(total, 4 * half),
    )


def _cut(
    outputs: npt.NDArray[Any], core: npt.NDArray[Any], inputs: npt.NDArray[Any], rank: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], float, float]:
    """Split outputs core inputs into two factors of a rank, of equal norms. NaN where the core is
    not finite, of which there is no SVD.
    """
    if not np.isfinite(core).all():
        core = np.zeros_like(core)
        outputs = np.full_like(outputs, np.nan)
    left, sizes, right = np.linalg.svd(core, full_matrices=False)
    squares = np.square(sizes)
    roots = np.sqrt(sizes[:rank])
    b = outputs @ (left[:, :rank] * roots)
    a = (roots[:, None] * right[:rank]) @ inputs
    return b, a, float(squares[rank:].sum()), float(squares.sum())


def _of_elements(stats: TiesStats | None, tensor: PlannedTensor) -> Counts:
    """The counts of a module's update, as if it had the elements of this factor."""
    count = tensor.elements
    assert tensor.factor is not None
    models = len(tensor.factor.terms)
    kept = (count,) * models
    conflicts = 0
    if stats is not None:
        share = count / max(1, elements(tensor.factor.shape))
        kept = tuple(round(each * share) for each in stats.kept)
        conflicts = round(stats.conflicts * share)
    return Counts(kept, conflicts, (0,) * models)
