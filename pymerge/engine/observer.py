"""The interface of what looks at the inputs of a merge of folders while they are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from pymerge.checkpoint.ahead import Loaded
from pymerge.checkpoint.inputs import Inputs
from pymerge.checkpoint.reader import OpenModel
from pymerge.engine.executor import TensorRules
from pymerge.engine.sizes import Sizes
from pymerge.messages.words import type_of
from pymerge.planning.plan import Plan


class Observer(Protocol):
    """An observer of one merge; it changes nothing of the result. What it raises ends the merge."""

    def begin(
        self,
        plan: Plan,
        models: Sequence[OpenModel],
        stored: Inputs,
        rules: TensorRules,
        sizes: Sizes,
    ) -> None:
        """Called before the first tensor is made."""

    def watch(self, index: int, reads: Iterator[Loaded]) -> Iterator[Loaded]:
        """The reads of one tensor, which must be given on unchanged. Not every executor makes a
        tensor from reads of its own.
        """

    def finish(self) -> None:
        """Called after the last tensor, while the inputs are open."""


def check_observer(observer: Observer | None) -> Observer | None:
    """TypeError for what observes nothing."""
    for name in ("begin", "watch", "finish") if observer is not None else ():
        if not callable(getattr(observer, name, None)):
            raise TypeError(
                f"observer is {type_of(observer)} without {name!r}; pass pymerge.AnalysisObserver()"
            )
    return observer
