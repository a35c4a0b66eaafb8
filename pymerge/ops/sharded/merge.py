"""`ties` on DTensors: every rank merges its shards by rules that all ranks found together
(docs/distributed.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pymerge.messages.words import some_names
from pymerge.ops.sharded.layout import (
    Ranks,
    Run,
    cut_dims,
    is_dtensor,
    local,
    ranks_of,
    runs,
    total_share,
)
from pymerge.ops.sharded.norms import NormJob, factors
from pymerge.ops.sharded.parts import parts
from pymerge.ops.sharded.selection import Piece, Unit, order_statistics
from pymerge.ops.sharded.sums import added
from pymerge.ops.ties.run import Job, TensorCall, pick, refuse_non_finite, run_jobs
from pymerge.reference.ties import working_dtype
from pymerge.rules.ties import TiesOptions, TiesRule, TiesStats, model_rule

# Elements of the shards that are merged together: enough that rounds of collectives do not count,
# while what is kept of them stays small beside the models.
_TOGETHER = 1 << 26


@dataclass(frozen=True)
class _Shards:
    """A call as this process has it: flat shards.

    runs: where they are in the whole tensor. total: its elements.
    """

    name: str
    models: Sequence[torch.Tensor]
    base: torch.Tensor | None
    out: torch.Tensor
    runs: Sequence[Run]
    ranks: Ranks
    total: int

    @property
    def work(self) -> torch.dtype:
        return working_dtype([*self.models, *([] if self.base is None else [self.base]), self.out])

    @property
    def piece(self) -> Piece:
        return Piece(self.models, self.base, self.total, self.ranks)


def is_sharded(calls: Sequence[TensorCall]) -> bool:
    """Whether any of these tensors is a DTensor."""
    return any(is_dtensor(target) for *_, target in calls)


def check_rows(calls: Sequence[TensorCall], options: TiesOptions) -> None:
    """TypeError where trim `magprune` needs rows that are spread over ranks."""
    if options.trim != "magprune":
        return
    for name, *_, target in calls:
        cut = cut_dims(target)
        if cut and (target.dim() < 2 or cut != {0}):
            where = f"tensor {name!r}" if name else "the models' tensor"
            raise TypeError(
                f"{where} is a DTensor whose shards cut rows (shape {tuple(target.shape)}, along"
                f" {some_names(f'dimension {dim}' for dim in sorted(cut))}), and trim 'magprune'"
                " (della) ranks the elements of whole rows; shard matrices along their first"
                " dimension, replicate vectors, or pass the .full_tensor() of each, on every rank"
            )


def merge_sharded(
    calls: Sequence[TensorCall], options: TiesOptions, backend: str
) -> list[TiesStats]:
    """Merge tensors of which some are DTensors, into the shards of their outputs. Returns the
    counts of whole tensors, equal on all ranks. NonFiniteError on all ranks alike (N3).
    """
    check_rows(calls, options)
    for kind in {target.device.type for *_, target in calls}:
        pick(options, kind, backend)  # or an error before the first collective
    shards = [_shards(call) for call in calls]
    rules = [options.rule(target.numel(), name, target.shape) for name, *_, target in calls]
    if options.scope != "model":
        found: list[TiesStats] = []
        for batch in _batches(calls):
            found += _merge_batch(shards[batch], rules[batch], options, backend)
        return found
    counted: list[TiesStats] = []

    def merge_all(whole: TiesRule) -> int:
        own = [whole.of_tensor(rule) for rule in rules]
        counted.clear()
        for batch in _batches(calls):
            counted.extend(_merge_rules(shards[batch], own[batch], options, backend))
        return sum(each.positive - each.negative for each in counted)

    select = partial(_over_all, shards)
    whole = model_rule(options, sum(each.total for each in shards), select, merge_all)
    # Not after a counting pass with the same sign: its outputs are the result.
    if not counted or whole.majority == -1:
        merge_all(whole)
    return counted


def _shards(call: TensorCall) -> _Shards:
    name, models, base, target = call
    out = local(target)
    return _Shards(
        name,
        [local(x).detach().reshape(-1) for x in models],
        None if base is None else local(base).detach().reshape(-1),
        out.detach().view(-1),
        runs(target),
        ranks_of(target),
        target.numel(),
    )


def _batches(calls: Sequence[TensorCall]) -> Iterator[slice]:
    """Calls whose rounds of collectives are made together, the same on all ranks."""
    begin = held = 0
    for end, (*_, target) in enumerate(calls, 1):
        held += total_share([target])
        if held >= _TOGETHER or end == len(calls):
            yield slice(begin, end)
            begin, held = end, 0


def _merge_batch(
    shards: Sequence[_Shards], rules: Sequence[TiesRule], options: TiesOptions, backend: str
) -> list[TiesStats]:
    """Scope `tensor`: the thresholds of each tensor, then its merge, twice where its majority sign
    is -.
    """
    rules = _with_thresholds(shards, rules)
    first = [rule.with_precomputed(majority=1) if rule.lacks_majority else rule for rule in rules]
    stats = _merge_rules(shards, first, options, backend)
    minus = [
        at
        for at, rule in enumerate(rules)
        if rule.lacks_majority and stats[at].positive <= stats[at].negative
    ]
    if minus:
        again = [rules[at].with_precomputed(majority=-1) for at in minus]
        _merge_rules([shards[at] for at in minus], again, options, backend)
    return stats


def _with_thresholds(shards: Sequence[_Shards], rules: Sequence[TiesRule]) -> list[TiesRule]:
    """T3: the rules with the exact thresholds of the whole tensors."""
    places: list[int] = []
    units: list[Unit] = []
    for at, (each, rule) in enumerate(zip(shards, rules, strict=True)):
        if rule.trim in ("magnitude", "outliers"):
            places.append(at)
            units.append(Unit([each.piece], _wanted(rule, each.total), each.work))
    found = list(rules)
    for at, unit, values in zip(places, units, order_statistics(units), strict=True):
        rule, known = rules[at], dict(zip(unit.wanted, values, strict=True))
        ends = {
            "thresholds": tuple(
                _threshold(known, k, rank, shards[at].total) for k, rank in enumerate(rule.ranks)
            )
        }
        if rule.trim == "outliers":
            ends["bounds"] = tuple(
                known[k, dropped + 1] if dropped else float("inf")
                for k, dropped in enumerate(rule.dropped)
            )
        found[at] = rule.with_precomputed(**ends)
    return found


def _wanted(rule: TiesRule, total: int) -> list[tuple[int, int]]:
    """The order statistics that are not known beforehand."""
    wanted = [(k, rank) for k, rank in enumerate(rule.ranks) if 0 < rank < total]
    if rule.trim == "outliers":
        wanted += [(k, dropped + 1) for k, dropped in enumerate(rule.dropped) if dropped]
    return sorted(set(wanted))


def _threshold(known: dict[tuple[int, int], float], k: int, rank: int, total: int) -> float:
    """T3: NaN keeps nothing, 0 everything."""
    if rank <= 0 or total == 0:
        return float("nan")
    return known[k, rank] if rank < total else 0.0


def _over_all(shards: Sequence[_Shards], ranks: Sequence[int], with_zero: bool) -> Iterable[float]:
    """T7: as `select` of a backend, over all tensors, and with_zero over one more element, 0."""
    total = sum(each.total for each in shards)
    wanted = [(k, rank) for k, rank in enumerate(ranks) if 0 < rank < total + with_zero]
    work = torch.float64 if any(each.work == torch.float64 for each in shards) else torch.float32
    unit = Unit([each.piece for each in shards], wanted, work)
    known = dict(zip(wanted, order_statistics([unit])[0], strict=True))
    return [_threshold(known, k, rank, total + with_zero) for k, rank in enumerate(ranks)]


def _merge_rules(
    shards: Sequence[_Shards], rules: Sequence[TiesRule], options: TiesOptions, backend: str
) -> list[TiesStats]:
    """Merge the shards by rules that lack nothing but factors of norms. Returns the sums of the
    counts over all ranks.
    """
    rules = _with_factors(shards, rules, options, backend)
    jobs: list[Job] = []
    owners: list[int] = []
    copies: list[Callable[[], Any]] = []
    for at, (each, rule) in enumerate(zip(shards, rules, strict=True)):
        for part in parts(each.runs, rule):
            out = each.out[part.begin : part.end]
            target = out
            if part.before:
                target = out.new_empty(part.before + out.numel())
                copies.append(partial(out.copy_, target[part.before :]))
            models = [part.of(x) for x in each.models]
            base = None if each.base is None else part.of(each.base)
            jobs.append((models, base, part.rule(rule), target))
            owners.append(at)
    count = len(options.weights)
    counts = torch.zeros((len(shards), count + 2), dtype=torch.int64, device="cpu")
    for at, stats in zip(owners, [*run_jobs(jobs, options, backend)], strict=True):
        own = stats if isinstance(stats, TiesStats) else stats.resolve()
        counts[at] += torch.tensor(
            [*own.non_finite, own.positive, own.negative], dtype=torch.int64, device="cpu"
        )
    for copy in copies:
        copy()
    ranks = [each.ranks for each in shards]
    found: list[TiesStats] = []
    for each, row in zip(shards, added([*zip(ranks, counts, strict=True)]), strict=True):
        *non_finite, positive, negative = row.tolist()
        stats = TiesStats((), 0, tuple(non_finite), positive=positive, negative=negative)
        if options.non_finite == "error" and any(non_finite):
            refuse_non_finite(stats, each.total, each.name)
        found.append(stats)
    return found


def _with_factors(
    shards: Sequence[_Shards], rules: Sequence[TiesRule], options: TiesOptions, backend: str
) -> list[TiesRule]:
    """T3r: the rules with the quotients of the whole tensors' norms."""
    if options.rescale not in ("l1", "l2", "linf"):
        return list(rules)
    plain = replace(options, non_finite="allow")

    def kernel(models: Sequence[torch.Tensor], rule: TiesRule, out: torch.Tensor) -> None:
        for _ in run_jobs([(models, None, rule, out)], plain, backend):
            pass

    jobs = [
        NormJob(each.models, each.base, each.runs, rule, each.work, each.ranks)
        for each, rule in zip(shards, rules, strict=True)
    ]
    return [
        rule.with_precomputed(factors=values)
        for rule, values in zip(rules, factors(jobs, kernel), strict=True)
    ]
