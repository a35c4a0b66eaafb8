"""Exact order statistics of magnitudes that are spread over ranks, by counts alone.

Magnitudes are compared as keys: the bits of |delta| as an integer, in the order of the magnitudes
(N1: NaN is 0). A sample gives every order statistic a bracket; one read of the shard counts what is
above, at either end of and below it, and keeps the few keys inside; the sums of these counts over
the ranks prove the bracket, and the key inside is found digit by digit. Where a bracket is
disproved, the digits are counted in the shard itself (docs/distributed.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pymerge.ops.sharded.layout import Ranks
from pymerge.ops.sharded.sums import added

_KEYS = {torch.float32: torch.int32, torch.float64: torch.int64}
_BITS = {torch.float32: 32, torch.float64: 64}
_DIGIT = 8  # bits

# Elements of a read of a shard at a time: on a CPU what its caches hold, on a GPU what fills it.
_PIECE = {"cpu": 1 << 18}
_PIECE_ELSEWHERE = 1 << 22
# Up to so many elements in all, every key is kept, and no sample is taken.
_WHOLE = 1 << 13
# Half the width of a bracket in standard deviations of the sample's rank. 3 miss once in 400, which
# costs four more reads; a wider bracket keeps more keys each time.
_SIGMAS = 3.0
_MOST_SAMPLED = 1 << 22
# Keys inside of a bracket that a rank keeps, as a share of its elements: far more than the sample
# says.
_MOST_KEPT = 16


@dataclass(frozen=True)
class Piece:
    """The shards of a tensor's models in this process, and the ranks that have the others.

    models, base: flat. total: elements of all shards.
    """

    models: Sequence[torch.Tensor]
    base: torch.Tensor | None
    total: int
    ranks: Ranks


@dataclass(frozen=True)
class Unit:
    """Tensors whose magnitudes are taken together, and the order statistics that are asked for:
    (model, rank from the largest, at least 1 and at most the number of elements).
    """

    pieces: Sequence[Piece]
    wanted: Sequence[tuple[int, int]]
    work: torch.dtype

    @property
    def total(self) -> int:
        return sum(piece.total for piece in self.pieces)


class _Keys(Protocol):
    """Keys in this process, of which digits are counted."""

    def digits(self, prefix: int, shift: int) -> torch.Tensor:
        """How many keys begin with each of the digits prefix * 256 + 0 to 255, as int64 (256,)."""
        ...


class _Sorted:
    """Keys that are kept. often: (key, how many of it there are besides)."""

    def __init__(
        self,
        keys: Sequence[torch.Tensor],
        dtype: torch.dtype,
        often: Sequence[tuple[int, int]] = (),
    ) -> None:
        held = torch.empty(0, dtype=_KEYS[dtype], device="cpu")
        if keys:
            held = keys[0] if len(keys) == 1 else torch.cat([*keys])
        if held.device.type == "cpu":
            held.numpy().sort()  # in place, where torch makes indices besides
        else:
            held = held.sort().values
        self._keys = held
        self._last = torch.iinfo(_KEYS[dtype]).max
        self._often = often

    def digits(self, prefix: int, shift: int) -> torch.Tensor:
        first = (prefix << _DIGIT) << shift
        edges = [min(first + (digit << shift), self._last) for digit in range(257)]
        at = torch.searchsorted(
            self._keys, torch.tensor(edges, dtype=self._keys.dtype, device=self._keys.device)
        )
        counts = at.diff().cpu()
        for key, count in self._often:
            if count and (key >> shift) >> _DIGIT == prefix:
                counts[(key >> shift) & 255] += count
        return counts


class _Streamed:
    """The keys of one model in a shard, read anew for every digit."""

    def __init__(self, piece: Piece, model: int, work: torch.dtype) -> None:
        self._piece, self._model, self._work = piece, model, work

    def digits(self, prefix: int, shift: int) -> torch.Tensor:
        found = torch.zeros(256, dtype=torch.int64, device=_device(self._piece))
        for _, keys in _blocks(self._piece, [self._model], self._work):
            head = keys >> shift
            own = head[(head >> _DIGIT) == prefix] & 255
            found += torch.bincount(own, minlength=256)
        return found


@dataclass
class _Search:
    """An order statistic that is looked for: rank, from the largest, among these keys."""

    keys: Sequence[tuple[Ranks, _Keys]]
    rank: int
    share: float | None = None  # of all keys, which the first count gives; then `rank` is an offset


def order_statistics(units: Sequence[Unit]) -> list[list[float]]:
    """The magnitudes of these ranks, of every unit in the order of `wanted`; the same on all
    ranks.
    """
    brackets = _sampled(units)
    passed = [_read(unit, own) for unit, own in zip(units, brackets, strict=True)]
    sums = iter(
        added(
            [
                (ranks, counts)
                for unit_passes in passed
                for ranks, (counts, _) in unit_passes.items()
            ]
        )
    )
    found: list[list[int]] = []
    searches: list[tuple[int, int, _Search]] = []
    for place, (unit, unit_passes) in enumerate(zip(units, passed, strict=True)):
        counts = sum((next(sums) for _ in unit_passes), _zeros(len(unit.wanted), 3))
        found.append([0] * len(unit.wanted))
        for at, (model, rank) in enumerate(unit.wanted):
            above, within, lost = counts[at].tolist()
            low, high = brackets[place][at]
            if above < rank <= above + within and low == high:
                found[place][at] = high
            elif above < rank <= above + within and not lost:
                held = [(ranks, lists[at]) for ranks, (_, lists) in unit_passes.items()]
                searches.append((place, at, _Search(held, rank - above)))
            else:
                streams = [(p.ranks, _Streamed(p, model, unit.work)) for p in unit.pieces]
                searches.append((place, at, _Search(streams, rank)))
    for work in _KEYS:
        own = [each for each in searches if units[each[0]].work == work]
        keys = _nth_largest([search for *_, search in own], work)
        for (place, at, _), key in zip(own, keys, strict=True):
            found[place][at] = key
    return [_magnitudes(keys, unit.work) for keys, unit in zip(found, units, strict=True)]


def _nth_largest(searches: Sequence[_Search], work: torch.dtype) -> list[int]:
    """The key of each, one digit after the other: in each round the digits' counts are added up
    over the ranks.
    """
    prefixes = [0] * len(searches)
    left = [search.rank for search in searches]
    for shift in range(_BITS[work] - _DIGIT, -1, -_DIGIT):
        tables = [
            (ranks, keys.digits(prefix, shift))
            for search, prefix in zip(searches, prefixes, strict=True)
            for ranks, keys in search.keys
        ]
        sums = iter(added(tables))
        for place, search in enumerate(searches):
            counts = sum((next(sums) for _ in search.keys), _zeros(256))
            above = counts.flip(0).cumsum(0)  # of the largest digits
            total = int(above[-1])
            if search.share is not None and shift == _BITS[work] - _DIGIT:
                left[place] = _rank_in_sample(search, total)
            digit = int(torch.searchsorted(above, left[place]))
            left[place] -= int(above[digit - 1]) if digit else 0
            prefixes[place] = (prefixes[place] << _DIGIT) + 255 - digit
    return prefixes


# The sample and its brackets.


def _sampled(units: Sequence[Unit]) -> list[list[tuple[int, int]]]:
    """For every order statistic (low, high): it is probably one of them, or between them."""
    found: list[list[tuple[int, int]]] = []
    searches: dict[torch.dtype, list[_Search]] = {work: [] for work in _KEYS}
    for unit in units:
        found.append([(-1, torch.iinfo(_KEYS[unit.work]).max)] * len(unit.wanted))
        if unit.total <= _WHOLE:
            continue
        samples = _sample(unit)
        for model, rank in unit.wanted:
            share = rank / unit.total
            searches[unit.work] += [_Search(samples[model], side, share) for side in (1, -1)]
    for work, own in searches.items():
        keys = iter(_nth_largest(own, work))
        for unit, brackets in zip(units, found, strict=True):
            if unit.work == work and unit.total > _WHOLE:
                brackets[:] = [(next(keys), next(keys)) for _ in unit.wanted]
    return found


def _sample(unit: Unit) -> dict[int, list[tuple[Ranks, _Keys]]]:
    """Sorted keys of each model at random places, equally dense in all shards."""
    # Balances the sample against what falls into brackets of its width.
    size = min((1.4 * unit.total) ** (2 / 3), _MOST_SAMPLED)
    models = sorted({model for model, _ in unit.wanted})
    keys: dict[tuple[int, Ranks], list[torch.Tensor]] = {}
    for number, piece in enumerate(unit.pieces):
        n = piece.models[0].numel()
        count = math.ceil(size * n / unit.total)
        generator = torch.Generator(device="cpu").manual_seed(number)
        at = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
        at.add_(torch.arange(count, dtype=torch.int64, device="cpu")).mul_(n / max(count, 1))
        places = at.long().clamp_(max=max(n - 1, 0)).to(_device(piece))
        base = None if piece.base is None else piece.base[places].to(unit.work)
        for model in models:
            made = torch.empty(count, dtype=unit.work, device=_device(piece))
            own = _keys(piece.models[model][places], base, made)
            keys.setdefault((model, piece.ranks), []).append(own)
    found: dict[int, list[tuple[Ranks, _Keys]]] = {model: [] for model in models}
    for (model, ranks), held in keys.items():
        found[model].append((ranks, _Sorted(held, unit.work)))
    return found


def _rank_in_sample(search: _Search, size: int) -> int:
    """The rank in a sample of so many keys of an end of the bracket. search.rank: 1 for the lower,
    -1 for the upper end.
    """
    assert search.share is not None
    middle = size * search.share
    half = _SIGMAS * math.sqrt(size * search.share * (1 - search.share)) + 2
    return min(max(1, round(middle + search.rank * half)), size)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="cpu")


# One read of a shard.


class _Passed:
    """What a read of the shards finds about one bracket: keys from `low` to `high`."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.above = self.within = 0
        self.lost = False  # whether there were too many to keep
        self._held: torch.Tensor | None = None
        self._often = {low: 0, high: 0}
        self._kept = 0

    def add(self, keys: torch.Tensor, room: int) -> None:
        """Count these keys, and keep those inside: at most `room` in all."""
        # NumPy compares several times as fast on a CPU: 0.1 ns an element, not 0.6.
        on_cpu = keys.device.type == "cpu"
        held: Any = keys.numpy() if on_cpu else keys
        count: Any = np.count_nonzero if on_cpu else torch.count_nonzero
        from_low, beyond = held >= self.low, held > self.high
        above = int(count(beyond))
        within = int(count(from_low)) - above
        self.above += above
        self.within += within
        if self.low == self.high or not within or self.lost:
            return
        from_low ^= beyond
        inside = torch.from_numpy(held[from_low]) if on_cpu else held[from_low]
        if within * _MOST_KEPT > keys.numel():  # many are equal to an end: such are counted
            for key in self._often:
                self._often[key] += int((inside == key).count_nonzero())
            inside = inside[(inside != self.low) & (inside != self.high)]
        self._keep(inside, room)

    def _keep(self, keys: torch.Tensor, room: int) -> None:
        """Into memory that doubles: many small pieces between the large blocks that are freed
        would leave holes of their size.
        """
        end = self._kept + keys.numel()
        if end > room:
            self.lost, self._held, end = True, None, 0
        elif self._held is None or end > self._held.numel():
            larger = keys.new_empty(min(max(2 * end, 1 << 12), room))
            if self._held is not None:
                larger[: self._kept] = self._held[: self._kept]
            self._held = larger
        if self._held is not None:
            self._held[self._kept : end] = keys
        self._kept = end

    def kept(self, work: torch.dtype) -> _Keys:
        """The keys inside."""
        held = [] if self._held is None else [self._held[: self._kept]]
        return _Sorted(held, work, [*self._often.items()])


def _read(
    unit: Unit, brackets: Sequence[tuple[int, int]]
) -> dict[Ranks, tuple[torch.Tensor, list[_Keys]]]:
    """For the pieces on the same ranks: (order statistics, 3) counts of the keys above each bracket
    and inside, and whether those inside were too many to keep; and those inside.
    """
    models = sorted({model for model, _ in unit.wanted})
    found: dict[Ranks, list[_Passed]] = {}
    for piece in unit.pieces:
        own = found.setdefault(piece.ranks, [_Passed(*bracket) for bracket in brackets])
        room = max(_WHOLE, piece.models[0].numel() // _MOST_KEPT)
        for of_model, keys in _blocks(piece, models, unit.work):
            for passed, (model, _) in zip(own, unit.wanted, strict=True):
                if model == of_model:
                    passed.add(keys, room)
    return {
        ranks: (
            torch.tensor(
                [[each.above, each.within, each.lost] for each in own],
                dtype=torch.int64,
                device="cpu",
            ).view(-1, 3),
            [each.kept(unit.work) for each in own],
        )
        for ranks, own in found.items()
    }


def _blocks(
    piece: Piece, models: Sequence[int], work: torch.dtype
) -> Iterator[tuple[int, torch.Tensor]]:
    """(model, keys) of a few elements at a time; keys are overwritten by the next ones."""
    device = _device(piece)
    n, step = piece.models[0].numel(), _PIECE.get(device.type, _PIECE_ELSEWHERE)
    room = torch.empty((2, min(n, step)), dtype=work, device=device)
    for begin in range(0, n, step):
        base, size = None, min(step, n - begin)
        if piece.base is not None:
            base = piece.base[begin : begin + size]
            if base.dtype != work:
                base = room[1, :size].copy_(base)
        for model in models:
            yield model, _keys(piece.models[model][begin : begin + size], base, room[0, :size])


def _keys(x: torch.Tensor, base: torch.Tensor | None, made: torch.Tensor) -> torch.Tensor:
    """T1 and N1: the magnitudes of the task vector, as integers in their order, in the memory of
    `made`, whose dtype is the working precision.
    """
    if base is None:
        made.copy_(x)
    elif x.dtype == base.dtype == made.dtype:
        torch.sub(x, base, out=made)
    else:
        made.copy_(x).sub_(base)
    keys = made.abs_().view(_KEYS[made.dtype])
    if keys.numel():
        infinite = torch.tensor(math.inf, dtype=made.dtype, device="cpu").view(keys.dtype).item()
        if bool(keys.max() > infinite):
            keys.masked_fill_(keys > infinite, 0)
    return keys


def _magnitudes(keys: Sequence[int], work: torch.dtype) -> list[float]:
    found: list[float] = (
        torch.tensor(keys, dtype=_KEYS[work], device="cpu").view(work).double().tolist()
    )
    return found


def _device(piece: Piece) -> torch.device:
    return piece.models[0].device
