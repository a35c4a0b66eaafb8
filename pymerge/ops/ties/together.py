"""Many merges by `ties` of the same inputs, as in a sweep over options (docs/sweeps.md).

What a merge has to know of a whole tensor, its thresholds above all, is found once for all settings
that share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pymerge.backends import native, registry
from pymerge.dtypes import name_of
from pymerge.ops.ties.api import merge_many
from pymerge.ops.ties.overflow import report_overflow
from pymerge.ops.ties.run import Segment, TensorCall, refuse_non_finite, zero_like
from pymerge.rules.ties import TiesOptions, TiesRule, TiesStats, model_thresholds

# Tensors that are merged with the same options.
Group = tuple[TiesOptions, Sequence[TensorCall]]
Buffers = tuple[list[tuple[int, str]], "tuple[int, str] | None"]


@dataclass
class _Job:
    """One tensor of one group: its rule, complete once it is merged, and what was counted."""

    options: TiesOptions
    call: TensorCall
    rule: TiesRule
    stats: TiesStats | None = None

    @property
    def elements(self) -> int:
        return self.call[3].numel()


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
        self._run([job for jobs in shared for job in jobs])
        for jobs in shared:
            if _elects_minus(jobs):
                for job in jobs:
                    job.rule = job.rule.with_precomputed(majority=-1)
                self._run(jobs)
        for jobs in shared:
            merged = [(job.call[0], job.call[3], job.stats) for job in jobs]
            report_overflow(merged, jobs[0].options.non_finite, stacklevel)

    def _is_shared(self, options: TiesOptions, calls: Sequence[TensorCall]) -> bool:
        """Whether the compiled kernels merge this group, by what can be kept for the next."""
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
        return [_Job(options, call, rule) for call, rule in zip(calls, rules, strict=True)]

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
                segments += zero_like(segments[0]) if with_zero else []
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

    def _run(self, jobs: Sequence[_Job]) -> None:
        """Merge jobs, those with the same inputs one behind the other. NonFiniteError (N3)."""
        by_inputs: dict[object, list[_Job]] = {}
        for job in jobs:
            name, models, base, _ = job.call
            place = name, tuple(id(x) for x in models), id(base)
            by_inputs.setdefault(place, []).append(job)
        for same in by_inputs.values():
            _, models, base, _ = same[0].call
            held = [x.contiguous() for x in models]
            held_base = None if base is None else base.contiguous()
            first = None if held_base is None else _buffer(held_base)
            for job in same:
                self._merge(job, ([_buffer(x) for x in held], first))

    def _merge(self, job: _Job, inputs: Buffers) -> None:
        rule = job.rule = self._known(job, inputs)
        threads = torch.get_num_threads()
        stats = native.ties(*inputs, _buffer(job.call[3]), job.elements, rule, threads)
        job.stats = stats
        if rule.trim == "magnitude" and rule.thresholds is None:
            self._thresholds[_place(job), rule.ranks] = stats.thresholds
        if job.options.non_finite == "error" and any(stats.non_finite):
            refuse_non_finite(stats, job.elements, job.call[0])

    def _known(self, job: _Job, inputs: Buffers) -> TiesRule:
        """The job's rule with what is known of its tensor, or what takes a read of its own anyway.

        Thresholds by magnitude alone do not: a merge finds them in passing. Four models of 16M
        elements of fp32, 2 busy cores, 2026-12-01: 26 ms, where known thresholds save 6; to select
        those of twelve densities beforehand, all together, takes 163.
        """
        rule, place = job.rule, _place(job)
        by_norm = rule.rescale not in ("none", "density")
        if rule.trim == "magnitude" and rule.thresholds is None:
            found = self._thresholds.get((place, rule.ranks))
            rule = rule.with_precomputed(thresholds=found)
        bands = rule.trim == "outliers" and rule.thresholds is None
        if not bands and not by_norm:
            return rule
        of_norms = (rule.key, rule.rescale, rule.densities, job.call[3].dtype) if by_norm else ()
        key = place, rule.trim, rule.ranks, rule.dropped, rule.thresholds, rule.bounds, of_norms
        if key not in self._rules:
            dtype, threads = name_of(job.call[3].dtype), torch.get_num_threads()
            self._rules[key] = native.precomputed(*inputs, dtype, job.elements, rule, threads)
        whole = self._rules[key]
        return rule.with_precomputed(
            thresholds=whole.thresholds, bounds=whole.bounds, factors=whole.factors
        )


def _place(job: _Job) -> tuple[str, bool]:
    """What thresholds are kept by: the tensor's name, and whether task vectors are from a base."""
    name, _, base, _ = job.call
    return name, base is None


def _elects_minus(jobs: Sequence[_Job]) -> bool:
    """Whether the majority sign over all tensors of a group, first taken as +, is - (T4)."""
    options = jobs[0].options
    by_majority = options.elect != "none" and options.zero_sign == "majority"
    balance = sum(job.stats.positive - job.stats.negative for job in jobs if job.stats)
    return options.scope == "model" and by_majority and balance <= 0


def _magnitudes(
    segments: Sequence[Segment], wanted: Iterable[Sequence[int]]
) -> dict[tuple[int, int], float]:
    """(model, rank) -> the magnitude of that rank over all segments, for all ranks at once."""
    pairs = sorted({pair for ranks in wanted for pair in enumerate(ranks)})
    _, select = registry.pick("select", "cpu", "cpu")
    repeated = [([models[k] for k, _ in pairs], base) for models, base in segments]
    return dict(zip(pairs, select(repeated, [rank for _, rank in pairs]), strict=True))


def _buffer(tensor: torch.Tensor) -> tuple[int, str]:
    return tensor.data_ptr(), name_of(tensor.dtype)
