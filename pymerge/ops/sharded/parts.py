"""How the kernels are called on a shard.

Where an element's fate depends on its place in the whole tensor (T8, and the rows of T3's
`magprune`), a kernel takes parts of the shard that are neighbours there and begin at a multiple of
four elements, or of four rows. Zeros are put before a part that begins elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from pymerge.ops.sharded.layout import Run
from pymerge.rules.ties import TiesRule


@dataclass(frozen=True)
class Part:
    """Elements begin to end of the shard. first: the index in the whole tensor where the kernel is
    to begin; before: so many zeros go before the part.
    """

    begin: int
    end: int
    first: int = 0
    before: int = 0

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This part of a flat tensor."""
        part = flat[self.begin : self.end]
        return torch.cat([part.new_zeros(self.before), part]) if self.before else part

    def rule(self, rule: TiesRule) -> TiesRule:
        """The whole tensor's rule for this part."""
        return rule.part(self.first, self.before + self.end - self.begin)


def by_place(rule: TiesRule) -> bool:
    """Whether what is kept depends on the elements' places."""
    return rule.trim in ("random", "magprune")


def unit_of(rule: TiesRule) -> int:
    """Elements that a kernel has to see together."""
    return rule.row_length * rule.row_step if rule.trim == "magprune" else 1


def parts(runs: Sequence[Run], rule: TiesRule, most: int = 0) -> Iterator[Part]:
    """The parts of a shard that has these runs of the whole tensor. most: elements of a part, where
    units allow it; 0 for any number.
    """
    if not by_place(rule):
        count = sum(count for _, count in runs)
        for begin in range(0, count, most or max(count, 1)):
            yield Part(begin, min(begin + (most or count), count))
        return
    unit = unit_of(rule)
    block = unit * (4 // math.gcd(unit, 4))
    step = max(block, most // block * block)
    at = 0  # in the shard
    for first, count in runs:
        if first % unit or count % unit:
            raise AssertionError("a shard with parts of rows")  # refused before
        end = at + count
        before = first % block
        if before:
            taken = min(count, block - before)
            yield Part(at, at + taken, first - before, before)
            at, first = at + taken, first + taken
        while at < end:
            taken = min(end - at, step) if most else end - at
            yield Part(at, at + taken, first)
            at, first = at + taken, first + taken


def keeping(rule: TiesRule, k: int) -> tuple[TiesRule, int]:
    """(a rule, K) that gives model k's kept task vector as it is, where model k is the last of K
    tensors, all the task vector itself, without a base.
    """
    # T8: a model's random words depend on its number.
    count = k + 1 if by_place(rule) else 1
    others = (1.0,) * (count - 1)

    def own(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if values is None else (*others, values[k])

    alone = replace(
        rule,
        elect="none",
        merge="sum",
        zero_sign="positive",
        rescale="none",
        weights=(*(0.0 for _ in others), 1.0),
        elect_weights=(1.0,) * count,
        densities=(*others, rule.densities[k]),
        ranks=(rule.ranks[k],) * count,
        dropped=(rule.dropped[k],) * count,
        thresholds=own(rule.thresholds),
        bounds=own(rule.bounds),
        epsilons=(0.0,) * (count - 1) + (rule.epsilons[k],),
        factors=None,
        scaling=1.0,
        majority=0,
    )
    return alone, count
