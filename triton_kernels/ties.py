"""`ties` and `select` in Triton (docs/spec/ties.md): what is launched, in which order, on which memory.

Nothing here waits for the device except `select`, which returns numbers, and `DeviceStats.resolve`. Kernels run on the
caller's current stream and can be captured in a CUDA graph. Temporary memory comes from torch's caching allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pymerge.ops._rule import MERGES, TiesRule, TiesStats
from pymerge.triton_kernels import _merge, _select
from pymerge.triton_kernels._launch import launch
from pymerge.triton_kernels._load import MIXED
from pymerge.triton_kernels._table import (
    AGAIN,
    CODES,
    HEADER,
    LOWER,
    PER_MODEL,
    RANK,
    Job,
    row,
    unbits,
    upload,
)

_TRIMS = ("none", "magnitude", "outliers", "random")
_ELECTS = ("none", "sum", "count")
_RESCALES = {"none": 0, "density": 1, "l1": 2, "l2": 2, "linf": 2}
_NORMS = {"l1": 1, "l2": 2, "linf": 3}
_BLOCK, _STEPS, _WARPS = 1024, 8, 8
_SLOTS = 64
_SMALL = 16384  # elements that one program can search in registers
_DIGIT_BLOCK, _DIGIT_STEPS = 2048, 32
_NORM_CHUNK = 16384  # T9

Request = tuple[Sequence[torch.Tensor], "torch.Tensor | None", TiesRule, torch.Tensor]


class DeviceStats:
    """Counts that are still on the device; `resolve` waits for them."""

    def __init__(self, rule: TiesRule, work: int, row: torch.Tensor, counts: torch.Tensor) -> None:
        self._rule, self._work, self._row, self._counts = rule, work, row, counts

    def resolve(self) -> TiesStats:
        """The counts as numbers. One synchronisation with the device."""
        rule, K = self._rule, len(self._rule.weights)
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
            positive=counts[2 * K + 1],
            negative=counts[2 * K + 2],
        )


def ties(
    models: Sequence[torch.Tensor], base: torch.Tensor | None, rule: TiesRule, out: torch.Tensor
) -> DeviceStats:
    """Merge K tensors into `out` by rules T1 to T9, N1 and N2.

    models: K tensors (1 to 64) of out's shape, float32, float16, bfloat16 or float64, each its own, on one GPU; strided
    ones are copied first. base: the same, or None. out: contiguous, overlapping no input. Returns counts that stay on
    the device until asked for. Temporary memory: under 5 % of one input, and 50 KB a model for thresholds.
    """
    return ties_many([(models, base, rule, out)])[0]


def ties_many(requests: Sequence[Request]) -> list[DeviceStats]:
    """`ties` for many tensors: (models, base, rule, out) each. Small ones share their launches.

    Tensors up to 16384 elements of one kind (number of models, dtypes, options, device) are merged together in two or
    three launches, however many they are.
    """
    stats: list[DeviceStats | None] = [None] * len(requests)
    groups: dict[tuple[Any, ...], list[int]] = {}
    jobs = [_job(*request) for request in requests]
    for i, (job, (_, _, rule, out)) in enumerate(zip(jobs, requests, strict=True)):
        if out.numel() == 0:
            counts = torch.zeros(1, 2 * len(job.models) + 3, dtype=torch.int64)
            stats[i] = DeviceStats(rule, job.work, torch.tensor(row(job)), counts)
        else:
            kind = _Kind.of(job)
            groups.setdefault((kind, None if out.numel() <= _SMALL else i), []).append(i)
    for (kind, large), members in groups.items():
        found = _run(kind, [jobs[i] for i in members], large is None)
        for i, one in zip(members, found, strict=True):
            stats[i] = one
    return stats  # type: ignore[return-value]


def select(
    tensors: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor | None]], ranks: Sequence[int]
) -> list[float]:
    """The ranks[k]-th largest magnitude of model k's task vector over all the tensors, as if concatenated (T7).

    tensors: (models, base) pairs on one GPU, each with the same number of models. Rank 0 gives NaN, a rank of all elements
    or more gives 0. Waits for the device once.
    """
    every = [x for models, base in tensors for x in (*models, *([] if base is None else [base]))]
    work = _working_width(every)
    total = sum(models[0].numel() for models, _ in tensors)
    rule = _selection(ranks)
    groups: dict[_Kind, list[Job]] = {}
    for models, base in tensors:
        if models[0].numel():
            job = Job(
                _contiguous(models), None if base is None else base.contiguous(), None, rule, work
            )
            groups.setdefault(_Kind.of(job), []).append(job)
    tables = {
        kind: _Table.of(jobs, _DIGIT_BLOCK * _DIGIT_STEPS, total) for kind, jobs in groups.items()
    }
    if not tables:
        return [float("nan")] * len(ranks)
    _select_large(tables, work, 1, shared=True)
    first = next(iter(tables.values()))
    words = first.rows[0].tolist()
    at = HEADER.value + LOWER.value
    return [unbits(words[at + PER_MODEL.value * k], work) for k in range(len(ranks))]


def _selection(ranks: Sequence[int]) -> TiesRule:
    """A rule of which only trim and ranks matter."""
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


@dataclass(frozen=True)
class _Kind:
    """What kernels are compiled for; jobs of one kind can share a launch."""

    device: torch.device
    K: int
    XD: int
    BD: int
    OD: int
    WORK: int
    ALIGNED: bool
    TRIM: int
    RESCALE: int
    NORM: int
    ELECT: int
    MERGE: int
    MAJORITY: bool
    FIND: bool  # the majority sign
    UNIT: bool

    @staticmethod
    def of(job: Job) -> _Kind:
        rule = job.rule
        dtypes = {x.dtype for x in job.models}
        tensors = [x for x in (*job.models, job.base, job.out) if x is not None]
        majority = rule.zero_sign == "majority" and rule.elect != "none"
        return _Kind(
            device=job.models[0].device,
            K=len(job.models),
            XD=CODES[job.models[0].dtype] if len(dtypes) == 1 else MIXED,
            BD=-1 if job.base is None else CODES[job.base.dtype],
            OD=-1 if job.out is None else CODES[job.out.dtype],
            WORK=job.work,
            ALIGNED=all(x.data_ptr() % 16 == 0 for x in tensors),
            TRIM=_TRIMS.index(rule.trim),
            RESCALE=_RESCALES[rule.rescale],
            NORM=_NORMS.get(rule.rescale, 0),
            ELECT=_ELECTS.index(rule.elect),
            MERGE=MERGES.index(rule.merge),
            MAJORITY=majority,
            FIND=majority and rule.majority == 0,
            UNIT=all(w == 1 for w in (*rule.weights, *rule.elect_weights)),
        )

    def inputs(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Table:
    """The rows of some jobs on the device, the chunks that they are cut into, and each job's first chunk."""

    rows: torch.Tensor
    chunks: torch.Tensor
    starts: torch.Tensor
    count: int
    size: int  # of the first job
    table: bool
    needed: bool  # a threshold is to be found
    kind: _Kind

    @staticmethod
    def of(jobs: Sequence[Job], chunk: int, total: int | None = None) -> _Table:
        words = [word for job in jobs for word in row(job, total)]
        width = len(words) // len(jobs)
        at = HEADER.value + RANK.value
        needed = any(
            words[j * width + at + PER_MODEL.value * k + target]
            for j in range(len(jobs))
            for k in range(len(jobs[0].models))
            for target in range(2)
        )
        pieces = [-(-job.models[0].numel() // chunk) for job in jobs]
        entries: list[int] = []
        if len(jobs) > 1:
            entries = [(j << 40) | c for j, count in enumerate(pieces) for c in range(count)]
        starts = [sum(pieces[:j]) for j in range(len(jobs))]
        kind = _Kind.of(jobs[0])
        memory = upload([*words, *entries, *starts], kind.device)
        end = len(words) + len(entries)
        return _Table(
            memory[: len(words)].view(len(jobs), width), memory[len(words) : end], memory[end:],
            sum(pieces), jobs[0].models[0].numel(), len(jobs) > 1, needed, kind,
        )  # fmt: skip

    def pieces(self, chunk: int) -> int:
        """Programs that cover all the chunks; with a table, `chunk` is what it was made for."""
        return self.count if self.table else -(-self.size // chunk)


def _run(kind: _Kind, jobs: Sequence[Job], small: bool) -> list[DeviceStats]:
    table = _Table.of(jobs, _BLOCK * _STEPS)
    J, K, device = len(jobs), kind.K, kind.device
    slots = 1 if small else _SLOTS
    counts = torch.zeros(J, slots, 2 * K + 3, dtype=torch.int64, device=device)
    if table.needed:
        targets = 2 if kind.TRIM == 2 else 1
        if small:
            length = 1024 if max(job.models[0].numel() for job in jobs) <= 1024 else _SMALL
            launch(
                _select.select_small, (K * targets, J), device, table.rows,
                LENGTH=length, TARGETS=targets, num_warps=4 if length == 1024 else 16,
                **kind.inputs("K", "XD", "BD", "WORK", "ALIGNED"),
            )  # fmt: skip
        else:
            _select_large({kind: table}, kind.WORK, targets, shared=False)
    if kind.RESCALE == 2:
        _norms(kind, table)
    for again in (False, True) if kind.FIND else (False,):
        if again:
            launch(
                _merge.decide_zero_sign,
                (J,),
                device,
                table.rows,
                counts,
                SLOTS=slots,
                K=K,
                num_warps=1,
            )
        launch(
            _merge.merge_chunks, (table.count,), device, table.rows, table.chunks, counts,
            TABLE=table.table, SLOTS=slots, GATE=AGAIN.value if again else -1, COUNT=not again, **_merge_options(kind),
        )  # fmt: skip
    return [DeviceStats(job.rule, job.work, table.rows[j], counts[j]) for j, job in enumerate(jobs)]


def _merge_options(kind: _Kind) -> dict[str, Any]:
    # Four elements a thread, eight where all inputs have 16 bits: loads of 16 bytes.
    halves = all(code in (-1, 1, 2) for code in (kind.XD, kind.BD))
    return {
        "FAST": kind.WORK == 32,
        "num_warps": _WARPS // 2 if halves else _WARPS,
        "BLOCK": _BLOCK,
        "STEPS": _STEPS,
        **kind.inputs(
            "K",
            "XD",
            "BD",
            "OD",
            "WORK",
            "ALIGNED",
            "TRIM",
            "RESCALE",
            "ELECT",
            "MERGE",
            "MAJORITY",
            "UNIT",
        ),
    }


def _select_large(
    tables: dict[_Kind, _Table], work: int, targets: int, shared: bool, gate: int = -1
) -> None:
    """Radix selection: a pass over the inputs a digit. The tables' rows take the thresholds; where they share one
    vector, the first table's first row alone does."""
    if not any(table.needed for table in tables.values()):
        return
    kind, first = next(iter(tables.items()))
    levels = 6 if work == 64 else 3
    width = kind.K * targets
    hist = torch.zeros(width * levels * _select.BINS.value, dtype=torch.int64, device=kind.device)
    chunk = _DIGIT_BLOCK * _DIGIT_STEPS
    for level in range(levels):
        for kind, table in tables.items():
            launch(
                _select.count_digits, (table.pieces(chunk), width), kind.device, table.rows, table.chunks, hist,
                LEVELS=levels, TABLE=table.table, SHARED=shared, TARGETS=targets, LEVEL=level, CHUNK=chunk,
                BLOCK=_DIGIT_BLOCK, GATE=gate, num_warps=_WARPS, **kind.inputs("K", "XD", "BD", "WORK", "ALIGNED"),
            )  # fmt: skip
    launch(
        _select.take_threshold, (width, 1), first.kind.device, first.rows, hist,
        LEVELS=levels, SHARED=shared, K=kind.K, WORK=work, TARGETS=targets, GATE=gate, num_warps=4,
    )  # fmt: skip


def _norms(kind: _Kind, table: _Table) -> None:
    """T9 and the factors of T3r."""
    sums = torch.empty(table.count, kind.K, 2, dtype=torch.float64, device=kind.device)
    launch(
        _select.norm_chunks, (table.count, kind.K), kind.device, table.rows, table.chunks, sums, table.starts,
        TABLE=table.table, NORM=kind.NORM, num_warps=2, **kind.inputs("K", "XD", "BD", "WORK", "TRIM"),
    )  # fmt: skip
    launch(
        _select.finish_norms, (kind.K, len(table.rows)), kind.device, table.rows, sums, table.starts,
        num_warps=1, **kind.inputs("K", "WORK", "NORM"),
    )  # fmt: skip
