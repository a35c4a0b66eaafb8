"""`ties` and `select` in Triton (docs/spec/ties.md): which kernels run, in which order, on which
memory.

Nothing here waits for the device except `select`, which returns numbers, and `DeviceStats.resolve`.
Kernels run on the caller's current stream. A call can be captured in a CUDA graph once a similar
call has compiled and loaded its kernels. Temporary memory comes from torch's caching allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pymerge.backends.placement import Passed, device_of
from pymerge.rules.ties import TiesRule, TiesStats
from pymerge.triton_kernels.ties import _launch_plan
from pymerge.triton_kernels.ties._descriptors import (
    CODES,
    HEADER,
    LOWER,
    PER_MODEL,
    Job,
    row,
    unbits,
)

Request = tuple[Sequence[torch.Tensor], "torch.Tensor | None", TiesRule, torch.Tensor]


class DeviceStats:
    """Counts on the device; `resolve` waits for them."""

    def __init__(
        self, rule: TiesRule, work: int, row: torch.Tensor, counts: torch.Tensor, written: Passed
    ) -> None:
        self._rule, self._work, self._row, self._counts = rule, work, row, counts
        self._written = written

    def resolve(self) -> TiesStats:
        """The counts as numbers. Synchronises with the device once."""
        rule, K = self._rule, len(self._rule.weights)
        self._written.hold()
        words = torch.cat([self._counts.sum(0), self._row]).tolist()
        counts, words = words[: 2 * K + 3], words[2 * K + 3 :]
        thresholds: tuple[float, ...] = ()
        if rule.trim in ("magnitude", "outliers"):
            lower = HEADER.value + LOWER.value
            thresholds = rule.thresholds or tuple(
                unbits(words[lower + PER_MODEL.value * k], self._work) for k in range(K)
            )
        return TiesStats(
            kept=tuple(counts[:K]),
            conflicts=counts[2 * K],
            non_finite=tuple(counts[K : 2 * K]),
            thresholds=thresholds,
            positive=counts[2 * K + 1] if rule.zero_sign == "majority" else 0,
            negative=counts[2 * K + 2] if rule.zero_sign == "majority" else 0,
        )


def ties(
    models: Sequence[torch.Tensor], base: torch.Tensor | None, rule: TiesRule, out: torch.Tensor
) -> DeviceStats:
    """Merge K tensors into `out` by rules T1 to T9, N1 and N2.

    models: K tensors (1 to 64) of out's shape, float32, float16, bfloat16 or float64, each its own,
    on one GPU; strided ones are copied first. base: the same, or None. out: contiguous, overlapping
    no input. Returns counts that stay on the device until asked for. Temporary memory: under 5 % of
    one input where thresholds are sampled (2^22 elements or more); where they are counted, 25 KB a
    model, and twice that for each of: two-sided trims, float64, 2^31 elements or more.
    """
    return ties_many([(models, base, rule, out)])[0]


def ties_many(requests: Sequence[Request]) -> list[DeviceStats]:
    """`ties` for many tensors: (models, base, rule, out) each. Small ones share their launches.

    Tensors up to 16384 elements of one kind (number of models, dtypes, options, device) are merged
    together in two or three launches, however many they are.
    """
    stats: list[DeviceStats | None] = [None] * len(requests)
    groups: dict[tuple[Any, ...], list[int]] = {}
    jobs = [_job(*request) for request in requests]
    for i, (job, (_, _, rule, out)) in enumerate(zip(jobs, requests, strict=True)):
        if out.numel() == 0:
            counts = torch.zeros(1, 2 * len(job.models) + 3, dtype=torch.int64)
            words = torch.tensor(row(job))
            stats[i] = DeviceStats(rule, job.work, words, counts, Passed(counts.device))
        else:
            kind = _launch_plan.Kind.of(job)
            groups.setdefault((kind, None if out.numel() <= _launch_plan.SMALL else i), []).append(
                i
            )
    for (kind, large), members in groups.items():
        table, counts = _launch_plan.merge(kind, [jobs[i] for i in members], large is None)
        written = Passed(kind.device)
        for j, i in enumerate(members):
            stats[i] = DeviceStats(jobs[i].rule, jobs[i].work, table.rows[j], counts[j], written)
    return stats  # type: ignore[return-value]


def select(
    tensors: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor | None]], ranks: Sequence[int]
) -> list[float]:
    """The ranks[k]-th largest magnitude of model k's task vector over the concatenation of all
    tensors (T7).

    tensors: (models, base) pairs on one GPU, each with the same number of models. Rank 0 gives NaN,
    a rank of all elements or more gives 0. Waits for the device once. ValueError for tensors on
    several devices.
    """
    device_of(tensors)
    every = [x for models, base in tensors for x in (*models, *([] if base is None else [base]))]
    work = _working_width(every)
    total = sum(models[0].numel() for models, _ in tensors)
    rule = _selection(ranks)
    groups: dict[_launch_plan.Kind, list[Job]] = {}
    for models, base in tensors:
        if models[0].numel():
            job = Job(
                _contiguous(models), None if base is None else base.contiguous(), None, rule, work
            )
            groups.setdefault(_launch_plan.Kind.of(job), []).append(job)
    tables = {
        kind: _launch_plan.JobDescriptors.of(jobs, _launch_plan.DIGIT_CHUNK, total)
        for kind, jobs in groups.items()
    }
    if not tables:
        return [float("nan")] * len(ranks)
    _launch_plan.select_large(tables, work, 1, shared=True)
    first = next(iter(tables.values()))
    words = first.rows[0].tolist()
    at = HEADER.value + LOWER.value
    return [unbits(words[at + PER_MODEL.value * k], work) for k in range(len(ranks))]


def _selection(ranks: Sequence[int]) -> TiesRule:
    """A rule in which only trim and ranks matter."""
    ones = (1.0,) * len(ranks)
    return TiesRule(
        trim="magnitude", elect="none", merge="sum", zero_sign="positive", rescale="none", weights=ones,
        elect_weights=ones, densities=ones, ranks=tuple(ranks), dropped=(0,) * len(ranks), scaling=1.0, key=0,
    )  # fmt: skip


def _job(
    models: Sequence[torch.Tensor], base: torch.Tensor | None, rule: TiesRule, out: torch.Tensor
) -> Job:
    if not out.is_contiguous():
        raise ValueError(f"out is strided {tuple(out.stride())}; pass a contiguous tensor")
    if not 1 <= len(models) <= 64:
        raise ValueError(f"models has {len(models)} tensors; the Triton kernels take 1 to 64")
    tensors = [*models, out] if base is None else [*models, base, out]
    for tensor in tensors:
        if tensor.dtype not in CODES:
            raise TypeError(f"a tensor is {tensor.dtype}; allowed are {', '.join(map(str, CODES))}")
    return Job(
        _contiguous(models),
        None if base is None else base.contiguous(),
        out,
        rule,
        _working_width(tensors),
    )


def _contiguous(models: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(x.contiguous() for x in models)


def _working_width(tensors: Sequence[torch.Tensor]) -> int:
    return 64 if any(t.dtype == torch.float64 for t in tensors) else 32
