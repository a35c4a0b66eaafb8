"""What computes the planned tensors of a merge of folders: the interface that a run knows, and what
comes of a tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pymerge.checkpoint.ahead import Loaded, ReadAhead, Unit
from pymerge.checkpoint.writer import ShardWriter
from pymerge.planning.plan import Plan
from pymerge.rules.mats import MatsReport
from pymerge.rules.ties import TiesRule, TiesStats

# An address and the dtype of what lies there.
Buffer = tuple[int, str]


@dataclass
class Made:
    """What was seen while a tensor was made.

    stats: the counts of its parts, where an op made it. different: references of the models whose
        duplicates are not equal to what was copied. non_finite: elements of the models and of
        their statistics that are NaN or infinite, where it was merged by statistics; report: what
        happened to it then.
    """

    stats: list[TiesStats] = field(default_factory=list)
    different: set[str] = field(default_factory=set)
    non_finite: int = 0
    report: MatsReport | None = None


class Executor:
    """Computes some of a plan's tensors into the output.

    A run asks its executors in order: the first that takes a tensor makes it. What an executor
    wants read is read ahead, in the order in which it is asked for it; `reads` give just that.
    """

    def takes(self, index: int) -> bool:
        """Whether it makes this tensor of the plan."""
        raise NotImplementedError

    def running(self, indices: Sequence[int]) -> contextlib.AbstractContextManager[object]:
        """What is open while these tensors, all that it will be asked for, are made in this
        order.
        """
        return contextlib.nullcontext()

    def together(self, batch: Sequence[int]) -> Sequence[Unit]:
        """What is read before the first of its tensors of a batch is made."""
        return ()

    def begin(self, batch: Sequence[int], reads: Iterator[Loaded]) -> None:
        """Compute what is computed for a batch as a whole."""

    def units(self, index: int) -> Sequence[Unit]:
        """What is read for one tensor when its turn comes."""
        return ()

    def make(self, index: int, reads: Iterator[Loaded], writer: ShardWriter) -> Made:
        """Write one tensor, the next of the output."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What is to be said of where it was computed."""
        return []


@dataclass(frozen=True)
class TensorRules:
    """The rule of every tensor that an op makes. whole: what scope "model" takes over all tensors
    (T7); None without it.
    """

    plan: Plan
    whole: TiesRule | None = None

    def of(self, index: int) -> TiesRule | None:
        """None for what is copied or merged by statistics."""
        tensor = self.plan.tensors[index]
        if tensor.options is None:
            return None
        rule = tensor.options.rule(tensor.elements, tensor.key_name)
        if tensor.options.scope == "model" and self.whole is not None:
            return self.whole.with_known(key=rule.key)
        return rule


def loaded_units(ahead: ReadAhead, count: int) -> Iterator[Loaded]:
    """The next so many units; each is given back when the next one is asked for."""
    for _ in range(count):
        loaded = ahead.next()
        yield loaded
        ahead.give_back(loaded)
