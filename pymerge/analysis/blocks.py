"""A tensor in blocks, with what T1 to T4 of docs/spec/ties.md say of their elements.

A block's memory is that of the next one too: blocks are small enough to stay in a core's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch

from pymerge.backends import registry
from pymerge.engine.views import threads_of_torch
from pymerge.reference import ties as reference
from pymerge.reference.exact import LEAST_NORM, add_sums, exact_sum, rounded_quotient
from pymerge.rules.ties import TiesRule, resolve_options

# Elements of all models together in one block: its buffers, which every block uses again, stay in
# a core's cache. Fresh memory for blocks of a million took longer than the arithmetic.
_BLOCK = 1 << 16
_LEAST = 1 << 14
# The same where exact sums are taken, each of which has a cost of its own.
_SUMMED = 1 << 20

Tensors = Sequence[torch.Tensor]
Segment = tuple[Tensors, "torch.Tensor | None"]


def keeps_all(models: int) -> TiesRule:
    """The rule of a tensor that another op merges, and of one whose task vectors are only added:
    nothing is trimmed, and every model votes with its sign.
    """
    plain = resolve_options(models, trim="none", elect="none", density=1.0, merge="sum")
    return plain.rule(0)


def select(segments: Sequence[Segment], ranks: Sequence[int]) -> tuple[float, ...]:
    """The op `select`, of checked tensors on one device."""
    _, function = registry.pick("select", segments[0][0][0].device.type, "auto")
    found = function(segments, ranks)
    return tuple(found.tolist() if isinstance(found, torch.Tensor) else found)


def zero_like(segment: Segment) -> Segment:
    """A segment of one element, 0: what `model_thresholds` adds for upper bounds."""
    models, base = segment
    return [x.new_zeros(1) for x in models], None if base is None else base.new_zeros(1)


@torch.no_grad()
def resolved(rule: TiesRule, models: Tensors, base: torch.Tensor | None) -> TiesRule:
    """The rule of a whole tensor with its thresholds, bounds, factors and majority sign."""
    whole = (models, base)
    if rule.trim in ("magnitude", "outliers") and rule.thresholds is None:
        rule = rule.with_precomputed(thresholds=select([whole], rule.ranks))
    if rule.trim == "outliers" and rule.bounds is None:
        above = [dropped + 1 for dropped in rule.dropped]
        rule = rule.with_precomputed(bounds=select([whole, zero_like(whole)], above))
    if rule.rescale in ("l1", "l2", "linf") and rule.factors is None:
        rule = rule.with_precomputed(factors=_factors(rule, models, base))
    if rule.lacks_majority:
        balance = vote_balance(rule, models, base)
        rule = rule.with_precomputed(majority=1 if balance > 0 else -1)
    return rule


@torch.no_grad()
def vote_balance(rule: TiesRule, models: Tensors, base: torch.Tensor | None) -> int:
    """How many more elements have S > 0 than S < 0 (T4)."""
    balance = 0
    for block in blocks_of(rule, models, base):
        total = elected(block.votes(block.trimmed()), rule)
        balance += int((total > 0).sum()) - int((total < 0).sum())
    return balance


def _factors(rule: TiesRule, models: Tensors, base: torch.Tensor | None) -> tuple[float, ...]:
    """T3r's f_k: quotients of T9's exact sums, which are the same in any parts."""
    kind = rule.rescale
    sums: list[list[Fraction | float]] = [[Fraction(0), Fraction(0)] for _ in models]
    work = torch.float32
    for block in blocks_of(rule, models, base, _SUMMED):
        work = block.deltas.dtype
        for own, delta, mask in zip(sums, block.deltas, block.masks, strict=True):
            for place, values in enumerate((delta, torch.where(mask, delta, 0))):
                if kind == "linf":
                    own[place] = max(own[place], float(values.abs().max()))
                else:
                    own[place] = add_sums(own[place], exact_sum(values, kind == "l2"))
    factors = []
    for density, (before, after) in zip(rule.densities, sums, strict=True):
        if density >= 1 or density == 0:
            factors.append(1.0)
        elif kind != "linf":
            factors.append(rounded_quotient(before, after, work, kind == "l2"))
        elif before >= LEAST_NORM and after >= LEAST_NORM:
            factors.append(float(before) / float(after))
        else:
            factors.append(1.0)
    return tuple(factors)


class Block:
    """Some elements of a tensor, in memory that the next block takes over.

    deltas, sizes, masks: (K, count). sizes: |delta|, with NaN as 0 (N1). largest: (K,). bad: which
    are not finite; None where all are finite.
    """

    def __init__(self, rule: TiesRule, count: int, step: int, like: torch.Tensor) -> None:
        self.rule = rule
        self._like = like
        self._buffers: dict[str, torch.Tensor] = {}
        self._count, self._most, self._here = count, step, step
        self.bad: torch.Tensor | None = None
        self._weights = column(rule.elect_weights, like)
        self._weighted = any(weight != 1 for weight in rule.elect_weights)
        self._thresholds = None
        if rule.thresholds is not None and rule.trim != "none":
            self._thresholds = column(rule.thresholds, like)

    def buffer(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """(K, elements of this block), of memory that belongs to this name."""
        if name not in self._buffers:
            size = self._count * self._most
            self._buffers[name] = torch.empty(size, dtype=dtype, device=self._like.device)
        return self._buffers[name][: self._count * self._here].view(self._count, self._here)

    def load(self, models: Tensors, base: torch.Tensor | None, begin: int, end: int) -> None:
        """Take the elements from begin to end of the flat tensors."""
        self._here = end - begin
        work = self._like.dtype
        self.deltas = self.buffer("deltas", work)
        for row, x in zip(self.deltas, models, strict=True):
            row.copy_(x[begin:end])
        if base is not None:
            self.deltas -= base[begin:end].to(work)
        self.sizes = torch.abs(self.deltas, out=self.buffer("sizes", work))
        self.largest = self.sizes.amax(1)  # NaN where there is one
        self.bad = None
        if not bool(self.largest.isfinite().all()):
            self.bad = ~self.deltas.isfinite()
            self.sizes.masked_fill_(self.deltas.isnan(), 0)
            self.largest = self.sizes.masked_fill(self.bad, 0).amax(1)
        self.masks = self._masks(begin)

    def _masks(self, begin: int) -> torch.Tensor:
        """T3."""
        rule, masks = self.rule, self.buffer("masks", torch.bool)
        if rule.trim == "none":
            return masks.fill_(True)
        if rule.trim in ("random", "magprune"):
            own = rule.with_precomputed(first=rule.first + begin)
            for k, delta in enumerate(self.deltas):
                masks[k] = reference.trim_mask(delta, own, k)[0]
            return masks
        assert self._thresholds is not None
        torch.ge(self.sizes, self._thresholds, out=masks)
        for k, dropped in enumerate(rule.dropped):
            if rule.trim == "outliers" and dropped:
                assert rule.bounds is not None
                masks[k] &= self.sizes[k] <= reference.scalar(rule.bounds[k], self.sizes)
        return masks

    def trimmed(self) -> torch.Tensor:
        """T3r; what is not kept is as it was."""
        rule = self.rule
        if rule.rescale == "none":
            return self.deltas
        made = self.buffer("trimmed", self._like.dtype)
        if rule.rescale == "density":
            divisors = [d if 0 < d < 1 else 1.0 for d in rule.densities]
            return torch.div(self.deltas, column(divisors, made), out=made)
        assert rule.factors is not None
        return torch.mul(self.deltas, column(rule.factors, made), out=made)

    def votes(self, trimmed: torch.Tensor) -> torch.Tensor:
        """T4's v_k, 0 where nothing is kept."""
        made = self.buffer("votes", trimmed.dtype)
        if self._weighted:
            torch.mul(trimmed, self._weights, out=made)
        else:
            made.copy_(trimmed)
        return self.only(made, self.masks)

    def only(self, values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Set `values` to 0 where they are not chosen."""
        if self.bad is not None:
            return values.masked_fill_(~chosen, 0)
        # Faster than filling; and infinity, for which it is not the same, is no finite value.
        return values.mul_(self.numbers(chosen))

    def numbers(self, chosen: torch.Tensor) -> torch.Tensor:
        """1 where they are chosen, 0 elsewhere."""
        return self.buffer("numbers", self._like.dtype).copy_(chosen)


def blocks_of(
    rule: TiesRule, models: Tensors, base: torch.Tensor | None, together: int = _BLOCK
) -> Iterator[Block]:
    """A tensor, or the part of it that begins at rule.first, in order. Thresholds are known."""
    count = len(models)
    flat = [x.reshape(-1) for x in models]
    flat_base = None if base is None else base.reshape(-1)
    work = reference.working_dtype([*models] if base is None else [*models, base])
    elements = flat[0].numel()
    step = max(_LEAST, together // count // _LEAST * _LEAST)
    if rule.trim == "magprune":  # whole rows, and groups of four elements (T8)
        rows = 4 * rule.row_length * rule.row_step
        step = rows * max(1, step // rows)
    block = Block(rule, count, min(step, elements), flat[0].new_empty(0, dtype=work))
    for begin in range(0, elements, step):
        block.load(flat, flat_base, begin, min(begin + step, elements))
        yield block


def column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A number per model, rounded once to the working precision."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def elected(votes: torch.Tensor, rule: TiesRule) -> torch.Tensor:
    """S of T4, added up in the order of the models."""
    if rule.elect == "count":
        return (votes > 0).sum(0) - (votes < 0).sum(0)
    total = torch.zeros_like(votes[0])
    for vote in votes:
        total += vote
    return total


def single_thread() -> contextlib.AbstractContextManager[None]:
    """Inside, torch computes on the calling thread alone: to share out the operations on one block
    takes longer than they do.
    """
    return threads_of_torch(1)
