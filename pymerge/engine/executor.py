"""The interface of executors, which compute the planned tensors of a merge of folders, and what
they report of each tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pymerge.checkpoint.ahead import Loaded, ReadAhead, Unit
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.writer import ShardWriter
from pymerge.engine.sizes import Sizes
from pymerge.planning.plan import Plan
from pymerge.rules.options import Buffer as Buffer
from pymerge.rules.options import Counts
from pymerge.rules.report import MatsReport
from pymerge.rules.ties import TiesOptions, TiesRule


@dataclass
class Made:
    """What was found while a tensor was made.

    stats: the counts of its parts, where an op made it.
    different: references of the models whose duplicates differ from what was copied.
    non_finite: NaN and infinite elements of the models and their statistics, in a merge by
        statistics.
    report: what happened to the tensor in a merge by statistics.
    """

    stats: list[Counts] = field(default_factory=list)
    different: set[str] = field(default_factory=set)
    non_finite: int = 0
    report: MatsReport | None = None


class Executor:
    """Computes some of a plan's tensors into the output.

    A run asks its executors in order: the first that takes a tensor makes it. What an executor
    wants read is read ahead, in the order in which it is asked for it; `reads` give just that.
    """

    def takes(self, index: int) -> bool:
        """Whether this executor makes the tensor."""
        raise NotImplementedError

    def running(self, indices: Sequence[int]) -> contextlib.AbstractContextManager[object]:
        """A context that is open while these tensors, all that this executor takes, are made in
        this order.
        """
        return contextlib.nullcontext()

    def together(self, batch: Sequence[int]) -> Sequence[Unit]:
        """What is read before the first tensor of a batch is made."""
        return ()

    def begin(self, batch: Sequence[int], reads: Iterator[Loaded]) -> None:
        """Compute what a batch needs as a whole."""

    def units(self, index: int) -> Sequence[Unit]:
        """What is read for one tensor when its turn comes."""
        return ()

    def make(self, index: int, reads: Iterator[Loaded], writer: ShardWriter) -> Made:
        """Write one tensor, the next of the output. reads: the units that `units` asked for,
        loaded.
        """
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Notes for the summary on where tensors were computed."""
        return []


@dataclass(frozen=True)
class TensorRules:
    """The rule of every tensor that `ties` makes. whole: the rule over all tensors for scope
    "model" (T7), else None.
    """

    plan: Plan
    whole: TiesRule | None = None
    _made: dict[int, TiesRule | None] = field(default_factory=dict, compare=False, repr=False)

    def of(self, index: int) -> TiesRule | None:
        """The rule of a tensor; None for one that `ties` does not make."""
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def _make(self, index: int) -> TiesRule | None:
        tensor = self.plan.tensors[index]
        if not isinstance(tensor.options, TiesOptions):
            return None
        rule = tensor.options.rule(tensor.elements, tensor.key_name, tensor.shape)
        if tensor.options.scope == "model" and self.whole is not None:
            return self.whole.of_tensor(rule)
        return rule


def read_ahead(units: Sequence[Unit], large: Callable[[int], Region], sizes: Sizes) -> ReadAhead:
    """Reads units ahead, as many as `sizes` allows."""
    return ReadAhead(units, large, ahead=sizes.ahead, ring=sizes.ring, piece=sizes.piece)


def loaded_units(ahead: ReadAhead, count: int) -> Iterator[Loaded]:
    """The next `count` units; each is given back when the next one is requested."""
    for _ in range(count):
        loaded = ahead.next()
        yield loaded
        ahead.give_back(loaded)
