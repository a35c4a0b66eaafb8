"""Many merges by `ties` of the same inputs, as in a sweep over options (docs/sweeps.md).

What a merge has to know of a whole tensor, its thresholds above all, is found once for all settings
that share it. Then no element depends on another, and the tensor is merged block by block: the
first setting reads a block from memory, the others find it in the caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from pymerge.backends import native, registry
from pymerge.dtypes import item_size, name_of
from pymerge.ops.ties.api import Segment, TensorCall, _zero_like, merge_many, refuse_non_finite
from pymerge.ops.ties.overflow import report_overflow
from pymerge.rules.ties import TiesOptions, TiesRule, TiesStats, model_thresholds

# Tensors that are merged with the same options.
Group = tuple[TiesOptions, Sequence[TensorCall]]

# Elements that a thread merges for all settings before the next ones. 2 cores, AVX-512, 300 MiB of
# third cache, 2026-12-01, K = 4, four settings with known thresholds: 64M elements of fp32 278 ms,
# tensor by tensor 320 (task arithmetic 246 and 307); with blocks of 128K, whose output is not
# written past the caches, 405.
_BLOCK = 1 << 19


@dataclass
class _Job:
    """One tensor of one group: its rule, complete once it is merged, and what was counted."""

    options: TiesOptions
    call: TensorCall
    rule: TiesRule
    non_finite: tuple[int, ...]
    positive: int = 0
    negative: int = 0

    @property
    def elements(self) -> int:
        return self.call[3].numel()

    @property
    def stats(self) -> TiesStats:
        return TiesStats((), 0, self.non_finite, positive=self.positive, negative=self.negative)

    def count(self, stats: TiesStats) -> None:
        if any(stats.non_finite):
            both = zip(self.non_finite, stats.non_finite, strict=True)
            self.non_finite = tuple(a + b for a, b in both)
        self.positive += stats.positive
        self.negative += stats.negative

    def with_minus(self) -> _Job:
        """The job once more, with the other majority sign."""
        rule = self.rule.with_precomputed(majority=-1)
        return _Job(self.options, self.call, rule, (0,) * self.options.models)


@dataclass
class _Inputs:
    """The inputs that several jobs share, contiguous."""

    models: Sequence[torch.Tensor]
    base: torch.Tensor | None
    _held: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        given = [*self.models, *(() if self.base is None else (self.base,))]
        self._held = [x.contiguous() for x in given]

    def buffers(self, first: int = 0) -> tuple[list[tuple[int, str]], tuple[int, str] | None]:
        """(models, base) from an element on."""
        found = [_buffer(x, first) for x in self._held]
        count = len(self.models)
        return found[:count], None if self.base is None else found[count]


class Together:
    """Merges groups of tensors by `ties`, each as `merge_many` does, to the bit.

    settings: the options of all groups that will come. backend: as of `pymerge.ties`; where that is
        not the CPU's, every group is merged by itself.

    Thresholds are kept by the tensor's name, so that the inputs of a name must stay the same.
    """

    def __init__(self, settings: Iterable[TiesOptions], backend: str = "auto") -> None:
        self._settings = [*dict.fromkeys(settings)]
        self._backend = backend
        self._over_all: dict[object, dict[tuple[int, int], float]] = {}
        self._thresholds: dict[object, tuple[float, ...]] = {}
        self._rules: dict[object, TiesRule] = {}

    def merge(self, groups: Sequence[Group], stacklevel: int) -> None:
        """Merge groups into the outputs of their calls. Raises and warns as `merge_many`."""
        shared: list[list[_Job]] = []
        for options, calls in groups:
            if not calls:
                continue
            if self._is_shared(options, calls):
                shared.append(self._jobs(options, calls))
            else:
                merge_many(calls, options, self._backend, stacklevel + 1)
        with ExitStack() as stack:
            pool = None
            if torch.get_num_threads() > 1 and _largest(shared) > _BLOCK:
                pool = stack.enter_context(ThreadPoolExecutor(torch.get_num_threads()))
            self._run([job for jobs in shared for job in jobs], pool)
            again = [jobs for jobs in shared if _elects_minus(jobs)]
            self._run([job.with_minus() for jobs in again for job in jobs], pool)
        for jobs in shared:
            merged = [(job.call[0], job.call[3], job.stats) for job in jobs]
            report_overflow(merged, jobs[0].options.non_finite, stacklevel)

    def _is_shared(self, options: TiesOptions, calls: Sequence[TensorCall]) -> bool:
        """Whether the compiled kernels merge this group, and can do so in parts."""
        on_cpu = all(target.device.type == "cpu" for *_, target in calls)
        by_rows = options.trim == "magprune"
        return on_cpu and not by_rows and registry.choose("cpu", self._backend) == "cpu"

    def _jobs(self, options: TiesOptions, calls: Sequence[TensorCall]) -> list[_Job]:
        rules = [options.rule(target.numel(), name, target.shape) for name, *_, target in calls]
        if options.scope == "model":
            whole = self._whole(options, calls)
            if whole.lacks_majority:  # where it is -, all is merged again
                whole = whole.with_precomputed(majority=1)
            rules = [whole.of_tensor(rule) for rule in rules]
        none = (0,) * options.models
        return [_Job(options, call, r, none) for call, r in zip(calls, rules, strict=True)]

    def _whole(self, options: TiesOptions, calls: Sequence[TensorCall]) -> TiesRule:
        """T7: the rule over all these tensors, the thresholds of all settings from one
        selection.
        """
        names = tuple((name, base is None) for name, _, base, _ in calls)
        total = sum(target.numel() for *_, target in calls)

        def select(ranks: Sequence[int], with_zero: bool) -> Iterator[float]:
            found = self._over_all.setdefault((names, with_zero), {})
            if not found.keys() >= set(enumerate(ranks)):
                segments: list[Segment] = [(models, base) for _, models, base, _ in calls]
                segments += _zero_like(segments[0]) if with_zero else []
                wanted = [ranks, *self._ranks(options.models, total, with_zero)]
                found.update(_magnitudes(segments, wanted))
            return (found[pair] for pair in enumerate(ranks))

        return model_thresholds(options, total, select)

    def _ranks(self, models: int, total: int, of_bounds: bool) -> Iterator[Sequence[int]]:
        """The ranks that `model_thresholds` asks for, of all settings."""
        for options in self._settings:
            if options.scope == "model" and options.models == models:
                whole = options.rule(total)
                if of_bounds and options.trim == "outliers":
                    yield [dropped + 1 for dropped in whole.dropped]
                elif not of_bounds and options.trim in ("magnitude", "outliers"):
                    yield whole.ranks

    def _run(self, jobs: Sequence[_Job], pool: ThreadPoolExecutor | None) -> None:
        """Merge jobs, those with the same inputs together. NonFiniteError (N3)."""
        by_inputs: dict[object, list[_Job]] = {}
        for job in jobs:
            name, models, base, _ = job.call
            place = name, tuple(id(x) for x in models), id(base)
            by_inputs.setdefault(place, []).append(job)
        for same in by_inputs.values():
            inputs = _Inputs(same[0].call[1], same[0].call[2])
            left = [job for job in same if not self._begin(job, inputs)]
            open_ones = [job for job in left if job.rule.lacks_majority]
            for job in open_ones:
                job.rule = job.rule.with_precomputed(majority=1)
            _merge_blocks(left, inputs, pool)
            minus = [job.with_minus() for job in open_ones if job.positive <= job.negative]
            _merge_blocks(minus, inputs, pool)
            for job in same:
                if job.options.non_finite == "error" and any(job.non_finite):
                    refuse_non_finite(job.stats, job.elements, job.call[0])

    def _begin(self, job: _Job, inputs: _Inputs) -> bool:
        """Complete the job's rule but for its majority; whether the tensor is merged already."""
        rule, place = job.rule, (job.call[0], inputs.base is None)
        by_norm = rule.rescale not in ("none", "density")
        unknown = rule.thresholds is None and rule.trim in ("magnitude", "outliers")
        if unknown and rule.trim == "magnitude":
            found = self._thresholds.get((place, rule.ranks))
            if found is not None:
                rule = job.rule = rule.with_precomputed(thresholds=found)
            elif not by_norm:
                # A merge finds its thresholds in passing. Four models of 16M elements of fp32, 2
                # busy cores, 2026-12-01: 26 ms, where known thresholds save 6; to select those of
                # twelve densities beforehand, all together, takes 163.
                stats = _merge_whole(job, inputs)
                self._thresholds[place, rule.ranks] = stats.thresholds
                return True
            unknown = found is None
        if not unknown and not by_norm:
            return False
        of_norms = (rule.key, rule.rescale, rule.densities, job.call[3].dtype) if by_norm else ()
        key = place, rule.trim, rule.ranks, rule.dropped, rule.thresholds, rule.bounds, of_norms
        if key not in self._rules:
            models, base = inputs.buffers()
            dtype, threads = name_of(job.call[3].dtype), torch.get_num_threads()
            self._rules[key] = native.precomputed(models, base, dtype, job.elements, rule, threads)
        whole = self._rules[key]
        job.rule = rule.with_precomputed(
            thresholds=whole.thresholds, bounds=whole.bounds, factors=whole.factors
        )
        return False


def _largest(groups: Sequence[Sequence[_Job]]) -> int:
    return max((job.elements for jobs in groups for job in jobs), default=0)


def _elects_minus(jobs: Sequence[_Job]) -> bool:
    """Whether the majority sign over all tensors of a group, first taken as +, is - (T4)."""
    options = jobs[0].options
    by_majority = options.elect != "none" and options.zero_sign == "majority"
    balance = sum(job.positive - job.negative for job in jobs)
    return options.scope == "model" and by_majority and balance <= 0


def _merge_whole(job: _Job, inputs: _Inputs) -> TiesStats:
    models, base = inputs.buffers()
    out, threads = _buffer(job.call[3]), torch.get_num_threads()
    stats = native.ties(models, base, out, job.elements, job.rule, threads)
    job.count(stats)
    return stats


def _merge_blocks(jobs: Sequence[_Job], inputs: _Inputs, pool: ThreadPoolExecutor | None) -> None:
    """Merge jobs whose rules are complete, each block for all of them before the next."""
    if not jobs:
        return
    n = jobs[0].elements
    if len(jobs) == 1 or n < _BLOCK * torch.get_num_threads():
        for job in jobs:
            _merge_whole(job, inputs)
        return

    @functools.cache
    def rule_of(place: int, first: int, count: int) -> TiesRule:
        return jobs[place].rule.part(first, count)

    def merge(first: int) -> list[TiesStats]:
        count = min(_BLOCK, n - first)
        models, base = inputs.buffers(first)
        made = []
        for place, job in enumerate(jobs):
            rule = rule_of(place, first if job.rule.trim == "random" else 0, count)
            out = _buffer(job.call[3], first)
            made.append(native.ties(models, base, out, count, rule, 1))
        return made

    run: Callable[..., Iterable[list[TiesStats]]] = map if pool is None else pool.map
    for made in run(merge, range(0, n, _BLOCK)):
        for job, stats in zip(jobs, made, strict=True):
            job.count(stats)


def _magnitudes(
    segments: Sequence[Segment], wanted: Iterable[Sequence[int]]
) -> dict[tuple[int, int], float]:
    """(model, rank) -> the magnitude of that rank over all segments, for all ranks at once."""
    pairs = sorted({pair for ranks in wanted for pair in enumerate(ranks)})
    _, select = registry.pick("select", "cpu", "cpu")
    repeated = [([models[k] for k, _ in pairs], base) for models, base in segments]
    return dict(zip(pairs, select(repeated, [rank for _, rank in pairs]), strict=True))


def _buffer(tensor: torch.Tensor, first: int = 0) -> tuple[int, str]:
    name = name_of(tensor.dtype)
    return tensor.data_ptr() + first * item_size(name), name
