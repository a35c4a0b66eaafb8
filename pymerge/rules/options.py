"""What planning and the engine ask the options of any op.

Each op has its own frozen dataclass of options for one planned tensor, in its module of this
package: plain data, checked, equal and hashable by value, so that tensors with equal options are
merged together. Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pymerge.rules.report import MatsReport


class OpOptions:
    """The options of one op for K models, not yet tied to a tensor.

    op: the op's name in the table of `pymerge.engine.tensor_ops`. non_finite: "error" or "allow"
        (docs/spec/ties.md, N3).
    """

    op: ClassVar[str]
    non_finite: str

    @property
    def models(self) -> int:
        """K, the number of models beside the base."""
        raise NotImplementedError

    @property
    def over_all_tensors(self) -> bool:
        """Whether something is found over all tensors before the first is merged (T7)."""
        return False

    @property
    def reports(self) -> bool:
        """Whether the op says of each tensor what it did (`Counts.report`)."""
        return False

    def of_tensor(self, shape: tuple[int, ...], linear: bool) -> OpOptions:
        """The options for one tensor, which may be those of another op. linear: whether it is the
        weight of a linear layer, or a stack of such weights.
        """
        return self

    def may_be_cut(self, shape: tuple[int, ...]) -> bool:
        """Whether each output element depends on its own inputs alone, so that a tensor may be
        merged in parts that begin anywhere.
        """
        return False

    def memory(self, shape: tuple[int, ...]) -> int:
        """Bytes that merging takes beside the inputs in place and the output."""
        return 0

    def words(self) -> str:
        """The parameters as in a recipe, for people; without those that change nothing."""
        return ""


@dataclass(frozen=True)
class Counts:
    """What was counted while a tensor was merged.

    kept: elements kept per model. conflicts: elements where kept values of both signs meet.
    non_finite: elements with a NaN or infinite task vector (without a base, of the model itself),
        per model.
    remark: what a person should know of how this tensor was merged; "" for nothing.
    report: of a solved system; its name is the caller's to fill in.
    """

    kept: tuple[int, ...]
    conflicts: int
    non_finite: tuple[int, ...]
    remark: str = ""
    report: MatsReport | None = None


# An address and the dtype of what lies there.
Buffer = tuple[int, str]


@dataclass(frozen=True)
class BufferCall:
    """A tensor of a merge of folders, or a part of it, where it lies in memory.

    name: what keys random numbers (T8). shape: of the whole tensor. models, base, out: (address,
    dtype) of the part's first element, in order, at any alignment. first, count: the part's
    elements in the tensor.
    """

    name: str
    shape: tuple[int, ...]
    models: Sequence[Buffer]
    base: Buffer | None
    out: Buffer
    first: int
    count: int
    threads: int
