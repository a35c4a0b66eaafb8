"""The plan of a merge, tensor by tensor: plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pymerge.checkpoint.tokens import AddedToken
from pymerge.checkpoint.types import Source
from pymerge.dtypes import MERGEABLE, elements, storage_bytes
from pymerge.methods._statistics import SolveOptions
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import TiesOptions

# Bytes for layers that are solved together; a larger layer is solved alone.
WINDOW = 256 * 10**6


# GPU memory by default: so many of the largest tensor with its inputs, one that is copied in, one
# that is merged, one that is copied out, one of slack, and the kernels' own memory; and never less
# than lets many small tensors share a launch.
GPU_SETS = 5
GPU_LEAST = 10**9


# Elements of a tensor that Fisher merging takes at a time.
FISHER_CHUNK = 4 << 20


@dataclass(frozen=True)
class Sum:
    """A sum in a model's statistics file: its key, the divisor of its mean, its bytes."""

    key: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Solve:
    """How a tensor that has statistics is merged.

    inputs: of each model the Gram matrix of its inputs, or its Fisher; None where it has none,
        which counts as zero.
    outputs: the Gram matrices of the output gradients, or None. transposed: the weight is stored
        (d_in, d_out).
    slices: of a tensor of more than two dimensions, how each of the matrices of `slice_shape` that
        lie in it one behind the other is merged, as a layer of its own (M16).
    asks: nothing is known of the statistics yet but that these are the most that there can be.
    """

    options: SolveOptions
    inputs: tuple[Sum | None, ...]
    outputs: tuple[Sum | None, ...] | None
    transposed: bool
    note: str
    asks: bool = False
    slices: tuple[Solve, ...] = ()
    slice_shape: tuple[int, int] = (0, 0)

    @property
    def sums(self) -> Iterator[tuple[int, Sum]]:
        """All sums that are read: (the model's place among the sources, sum)."""
        for sums in (self.inputs, self.outputs or ()):
            yield from ((k, each) for k, each in enumerate(sums) if each is not None)
        for part in self.slices:
            yield from part.sums

    @property
    def whole(self) -> bool:
        """Whether Fisher merging needs the tensor in one piece: trimming looks at all of it, and
        so do the traces of task weights.
        """
        by_trace = dict(self.options.options).get("task_weights") == "trace"
        return self.options.init == "ties" or by_trace

    @property
    def in_chunks(self) -> bool:
        """Whether the tensor is merged a few elements at a time."""
        return self.options.method == "fisher" and not self.whole

    @property
    def in_parts(self) -> bool:
        """Whether the tensor is read and written in parts, and not together with others."""
        return self.options.method == "fisher" or bool(self.slices)

    @property
    def nbytes(self) -> int:
        """Bytes of statistics that are read."""
        return sum(each.nbytes for _, each in self.sums)

    def memory(self, shape: Sequence[int]) -> int:
        """Bytes that solving takes beside the mapped inputs, at the most demanding precision in
        use.
        """
        if self.slices:
            return max(each.memory(self.slice_shape) for each in self.slices)
        count, size = len(self.inputs), elements(tuple(shape))
        if self.options.method == "fisher":
            return 8 * (size if self.whole else min(size, FISHER_CHUNK)) * (2 * count + 5)
        d_in = shape[-1] if not self.transposed else shape[0]
        if len(shape) != 2:
            d_in = size
        d_out = size // d_in if d_in else 0
        width = 8 if self.options.exact or self.options.precision == "fp64" else 4
        # The Grams as read and stacked; weights, their distances from the start, and products, K of
        # each; a dozen vectors.
        squares = 4 * 2 * count * d_in**2 + width * (count + 4) * d_in**2
        if self.outputs is not None:
            squares += 4 * 2 * count * d_out**2 + width * (count + 4) * d_out**2
        return squares + width * size * (4 * count + 12)


@dataclass(frozen=True)
class Term:
    """One adapter's part of a module's update: its module's name there, times a coefficient."""

    model: int
    module: str
    coefficient: float


@dataclass(frozen=True)
class Factor:
    """A factor of one module's update, in an adapter that a merge writes (docs/spec/low_rank.md).

    which: "A" or "B". module: its name in the result. weight: that of the base's tensor, with its
    shape; transposed: it is stored (d_in, d_out), or an embedding (rows, d).
    rank: of the result. exact: it is the sum of the terms' ranks, so that nothing is lost.
    options: by which the terms' whole updates are merged; None for their weighted sum.
    """

    which: str
    module: str
    weight: str
    shape: tuple[int, ...]
    transposed: bool
    rank: int
    exact: bool
    terms: tuple[Term, ...]
    options: TiesOptions | None

    @property
    def memory(self) -> int:
        """Bytes for the terms' whole updates, their merge and its approximation (L9); 0 where
        these are not needed.
        """
        return 0 if self.options is None else 4 * elements(self.shape) * (len(self.terms) + 3)


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. `options` None copies sources[0]; then `duplicates` are to be compared
    with it.

    strict: whether a duplicate that differs is an error (dtypes that nothing can be computed in) or
        a note.
    solve: where the tensor is merged by statistics; `options` is None then.
    non_finite: what NaN and infinity are, in the task vectors and in the output: "error" or
        "allow".
    factor: where it is one of an adapter's, which has no sources among the models' tensors.
    otherwise: what it is if it turns out to have no statistics, where these are still to be asked
        for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    sources: tuple[Source, ...]
    base: Source | None
    options: OpOptions | None
    key_name: str
    duplicates: tuple[Source, ...] = ()
    strict: bool = False
    solve: Solve | None = None
    non_finite: str = "error"
    otherwise: PlannedTensor | None = None
    factor: Factor | None = None

    @property
    def solve_memory(self) -> int:
        """Bytes that solving takes; 0 for a tensor that is not solved. Those of a factor too."""
        if self.factor is not None:
            return self.factor.memory
        return 0 if self.solve is None else self.solve.memory(self.shape)

    @property
    def op_memory(self) -> int:
        """Bytes that an op takes beside inputs and output; 0 for a copy."""
        return 0 if self.options is None else self.options.memory(self.shape)

    @cached_property
    def elements(self) -> int:
        return elements(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return storage_bytes(self.dtype, self.shape)

    @property
    def inputs(self) -> tuple[Source, ...]:
        """All sources that are read, the base last."""
        merged = self.sources if self.base is None else (*self.sources, self.base)
        return merged + self.duplicates


@dataclass(frozen=True)
class TokenizerChanges:
    """What the result's tokenizer files have that those of the model lack (docs/spec/rows.md, V9).

    added: tokens with their ids. dropped: tokens without a row in the result.
    """

    added: tuple[tuple[AddedToken, int], ...]
    dropped: frozenset[str]


@dataclass(frozen=True)
class Vocabulary:
    """That of the result, where the recipe names its tokenizer (docs/spec/rows.md, V7).

    rows: a token each, with padding. new_ids: where tokens of the model that gives the config went,
        None where they are gone.
    """

    rows: int
    new_ids: Mapping[int, int | None]


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do, and every reason why it cannot.

    base: index into `models` of the recipe's base_model. tokenizer: changes to its files. config:
        entries of the result's config that are not the base's. largest_set: bytes of the largest
        tensor that is computed, inputs and output together.
    """

    models: tuple[str, ...]
    tensors: tuple[PlannedTensor, ...]
    bytes_read: int
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    vocabulary: Vocabulary | None = None
    tokenizer: TokenizerChanges | None = None
    method: str = ""
    base: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    largest_set: int = 0

    @property
    def inputs(self) -> tuple[int, ...]:
        """The models in the order of their weights, if that order is the same for all tensors; else
        empty.
        """
        orders = {tuple(s.model for s in t.sources) for t in self.tensors if t.method != "copy"}
        return orders.pop() if len(orders) == 1 else ()

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bytes_written(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def solve_memory(self) -> int:
        """The most bytes that solving takes at any one time; 0 where nothing is solved."""
        needs = [tensor.solve_memory for tensor in self.tensors]
        return max(max(needs, default=0), min(WINDOW, sum(needs)))

    @property
    def memory(self) -> int:
        """The most bytes that solving, or an op, takes at any one time."""
        return max(self.solve_memory, max((t.op_memory for t in self.tensors), default=0))

    @property
    def gpu_memory(self) -> int:
        """Bytes of a GPU's memory that a merge there has a use for. Where layers are solved, half
        is for them.
        """
        whole = max(GPU_LEAST, GPU_SETS * self.largest_set)
        solved = 8 * self.solve_memory // 7  # the engine leaves an eighth to the kernels
        return 2 * max(whole, solved) if self.solve_memory else whole

    @property
    def gpu_pays(self) -> bool:
        """Whether a GPU is likely to be faster: where layers are solved. Merging element by element
        takes no longer than reading the inputs, which the CPU does once, and a GPU by way of the
        bus.
        """
        return any(t.solve is not None and t.solve.options.method != "fisher" for t in self.tensors)

    @property
    def dtype(self) -> str:
        """The floating-point dtype of most parameters."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.dtype in MERGEABLE:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
        return max(counts, key=lambda name: counts[name]) if counts else ""
