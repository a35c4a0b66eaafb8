"""The launch plan: which kernels run for which tensors, in which order, on which memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pymerge.rules.ties import MERGES
from pymerge.triton_kernels._launch import launch
from pymerge.triton_kernels._load import MIXED
from pymerge.triton_kernels.ties import _merge, _sampled_threshold, _select
from pymerge.triton_kernels.ties import _norms as _norm_kernels
from pymerge.triton_kernels.ties._descriptors import (
    AGAIN,
    CODES,
    HEADER,
    MISSED,
    PER_BRACKET,
    PER_MODEL,
    RANK,
    Job,
    row,
    upload,
)

_TRIMS = ("none", "magnitude", "outliers", "random")
_ELECTS = ("none", "sum", "count")
_RESCALES = {"none": 0, "density": 1, "l1": 2, "l2": 2, "linf": 2}
_NORMS = {"l1": 1, "l2": 2, "linf": 3}
_CHUNK, _WARPS = 4096, 4
_SLOTS = 64
SMALL = 16384  # elements that one program can search in registers
_DIGIT_BLOCK = 2048
DIGIT_CHUNK = 32 * _DIGIT_BLOCK
SAMPLED_FROM = (
    1 << 22
)  # elements from which on one pass with sampled thresholds may beat counting first
_SIGMAS = 3.5  # of the sample's rank, on either side of a bracket
_WIDE = 1 << 31  # elements that 32 bits cannot count
_SHARE = 0.049  # of an input's bytes, for all temporary memory of sampled thresholds


@dataclass(frozen=True)
class Kind:
    """What kernels are specialised for; jobs of one kind can share a launch."""

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
    def of(job: Job) -> Kind:
        rule = job.rule
        dtypes = {x.dtype for x in job.models}
        tensors = [x for x in (*job.models, job.base, job.out) if x is not None]
        majority = rule.zero_sign == "majority" and rule.elect != "none"
        return Kind(
            device=job.models[0].device,
            K=len(job.models),
            XD=CODES[job.models[0].dtype] if len(dtypes) == 1 else MIXED,
            BD=-1 if job.base is None else CODES[job.base.dtype],
            OD=-1 if job.out is None else CODES[job.out.dtype],
            WORK=job.work,
            ALIGNED=all(x.data_ptr() % 16 == 0 for x in tensors),
            TRIM=_TRIMS.index(rule.trim),
            RESCALE=_RESCALES[rule.rescale],
            NORM=0 if rule.factors is not None else _NORMS.get(rule.rescale, 0),
            ELECT=_ELECTS.index(rule.elect),
            MERGE=MERGES.index(rule.merge),
            MAJORITY=majority,
            FIND=majority and rule.majority == 0,
            UNIT=all(w == 1 for w in (*rule.weights, *rule.elect_weights)),
        )

    def inputs(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class JobDescriptors:
    """Descriptors of some jobs on the device, the chunks that the jobs are cut into, and each job's
    first chunk.
    """

    rows: torch.Tensor
    chunks: torch.Tensor
    starts: torch.Tensor
    count: int
    size: int  # of the first job
    table: bool
    needed: bool  # a threshold is to be found
    kind: Kind

    @staticmethod
    def of(jobs: Sequence[Job], chunk: int, total: int | None = None) -> JobDescriptors:
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
        kind = Kind.of(jobs[0])
        memory = upload([*words, *entries, *starts], kind.device)
        end = len(words) + len(entries)
        return JobDescriptors(
            memory[: len(words)].view(len(jobs), width), memory[len(words) : end], memory[end:],
            sum(pieces), jobs[0].models[0].numel(), len(jobs) > 1, needed, kind,
        )  # fmt: skip

    def pieces(self, chunk: int) -> int:
        """The number of programs that covers all chunks. With a table, `chunk` is the size it was
        made for.
        """
        return self.count if self.table else -(-self.size // chunk)


def merge(kind: Kind, jobs: Sequence[Job], small: bool) -> tuple[JobDescriptors, torch.Tensor]:
    """Launch everything for jobs of one kind: many small ones, or a single large one.

    Returns their rows and their counts (jobs, slots, 2 K + 3), both on the device and not yet
        there.
    """
    table = JobDescriptors.of(jobs, _CHUNK)
    slots = 1 if small else _SLOTS
    size = (len(jobs), slots, 2 * kind.K + 3)
    counts = torch.zeros(size, dtype=torch.int64, device=kind.device)
    targets = 2 if kind.TRIM == 2 else 1
    sample = None if small or not table.needed else _sample(kind, jobs[0])
    if sample is not None:
        _merge_sampled(kind, jobs[0], table, counts, *sample)
        select_large({kind: table}, kind.WORK, targets, shared=False, gate=MISSED.value)
        _merge_all(kind, table, counts, gate=MISSED.value, count=True)
    else:
        if table.needed and small:
            _select_small(kind, jobs, table, targets)
        elif table.needed:
            select_large({kind: table}, kind.WORK, targets, shared=False)
        if kind.NORM:
            _norms(kind, table)
        _merge_all(kind, table, counts, gate=-1, count=True)
    if kind.FIND:
        launch(
            _merge.decide_zero_sign, (len(jobs),), kind.device, table.rows, counts,
            SLOTS=slots, K=kind.K, num_warps=1,
        )  # fmt: skip
        _merge_all(kind, table, counts, gate=AGAIN.value, count=False)
    return table, counts


def _merge_all(
    kind: Kind, table: JobDescriptors, counts: torch.Tensor, gate: int, count: bool
) -> None:
    launch(
        _merge.merge_chunks, (table.count,), kind.device, table.rows, table.chunks, counts,
        TABLE=table.table, SLOTS=counts.shape[1], GATE=gate, COUNT=count, FAST=kind.WORK == 32,
        **kind.inputs("WORK", "TRIM"), **_merge_options(kind),
    )  # fmt: skip


def _merge_options(kind: Kind, sampled: bool = False) -> dict[str, Any]:
    names = ("K", "XD", "BD", "OD", "ALIGNED", "RESCALE", "ELECT", "MERGE", "MAJORITY", "UNIT")
    # Elements a thread: eight where they are a load of 16 bytes, of other types four. Four too
    # where eight spill (compiled for sm_80, sm_90, sm_100 and gfx942, not yet timed): records of
    # more than four models, and eight models or more with weights, take more registers than there
    # are.
    roomy = kind.K <= 4 if sampled else kind.K < 8 or kind.UNIT
    wide = _halves(kind) and roomy
    block = 32 * _WARPS * (8 if wide else 4)
    return {"BLOCK": block, "STEPS": _CHUNK // block, "num_warps": _WARPS, **kind.inputs(*names)}


def _halves(kind: Kind) -> bool:
    """Whether all models have one 16-bit type, of which 16 bytes are eight elements."""
    return kind.WORK == 32 and kind.XD in (1, 2)


def _select_small(kind: Kind, jobs: Sequence[Job], table: JobDescriptors, targets: int) -> None:
    length = 1024 if max(job.models[0].numel() for job in jobs) <= 1024 else SMALL
    launch(
        _select.select_small, (len(jobs), kind.K * targets), kind.device, table.rows,
        LENGTH=length, TARGETS=targets, num_warps=4 if length == 1024 else 16,
        **kind.inputs("K", "XD", "BD", "WORK", "ALIGNED"),
    )  # fmt: skip


def _sample(kind: Kind, job: Job) -> tuple[int, int] | None:
    """(size of the sample, record words) for sampled thresholds; None where counting is the better
    way, as where the memory that is as large for any tensor leaves little for records.

    With S sampled elements the rank of a share p is known to sqrt(p (1 - p) / S), so 2 z times that
    share of the elements falls into a bracket. S is what makes the records of all models fill 80 %
    of their room.
    """
    n = job.models[0].numel()
    if kind.WORK == 64 or kind.TRIM != 1 or kind.RESCALE == 2 or kind.K > 8 or n < SAMPLED_FROM:
        return None
    element = _least_width(job)
    room = int(element * n * _SHARE) // 4 - sum(_areas(kind, n, element))
    if room <= 0:
        return None
    shares = [rank / n for rank in job.rule.ranks]
    spread = sum(2 * _SIGMAS * math.sqrt(p * (1 - p)) for p in shares)
    wanted = (spread * n / (0.8 * room)) ** 2
    size = int(max(wanted, min(1 << 18, n // 32), 2 * n ** (2 / 3)))
    return None if size > n // 16 else (size, room)


def _sample_row(job: Job, size: int) -> list[int]:
    """The job's row, with the bracket's ends as ranks within a sample of `size` elements."""
    words, n = row(job), job.models[0].numel()
    for k in range(len(job.models)):
        at = HEADER.value + PER_MODEL.value * k + RANK.value
        rank = words[at]
        if rank == 0:
            continue
        share = rank / n
        middle, margin = share * size, _SIGMAS * math.sqrt(size * share * (1 - share)) + 1
        low, top = math.ceil(middle + margin), math.floor(middle - margin)
        words[at : at + 2] = [low if low <= size else 0, max(top, 0)]  # 0: no limit on that side
    return words


def _merge_sampled(
    kind: Kind, job: Job, table: JobDescriptors, counts: torch.Tensor, sampled: int, room: int
) -> None:
    """One pass with estimated thresholds, then the exact ones and the fix-up."""
    K, device, n, element = kind.K, kind.device, job.models[0].numel(), _least_width(job)
    units = sampled // 32
    sample_row = upload(_sample_row(job, units * 32), device)
    areas = _areas(kind, n, element)
    memory = torch.zeros(sum(areas), dtype=torch.int32, device=device)
    hist, nears, runs, levels, brackets, used = memory.split(areas)
    nears, runs = nears.view(torch.int64), runs.view(torch.int64)
    # Where the histograms were that nothing reads once the brackets are taken.
    finalists, lists = hist[: K * _sampled_threshold.FINALISTS.value], hist.view(torch.int16)
    lists = lists[2 * len(finalists) :]
    records = torch.empty(room, dtype=torch.int32, device=device)
    chunks, slots = -(-n // _CHUNK), counts.shape[1]
    inputs, rows = kind.inputs("K", "XD", "BD"), table.rows
    for level in range(3):
        launch(
            _sampled_threshold.sample_digits, (-(-units * 32 // 8192), K), device, sample_row, hist, units, n // (32 * units),
            LEVEL=level, BLOCK=1024, STEPS=8, num_warps=16, **inputs,
        )  # fmt: skip
    launch(
        _sampled_threshold.take_bracket,
        (K,),
        device,
        rows,
        sample_row,
        brackets,
        hist,
        K=K,
        num_warps=4,
    )
    launch(
        _sampled_threshold.merge_sampled, (_programs(device, chunks),), device,
        rows, brackets, counts, nears, runs, records, room, used, levels, lists,
        SLOTS=slots, LISTS=_listed(element), **_merge_options(kind, sampled=True),
    )  # fmt: skip
    launch(
        _sampled_threshold.prove_brackets, (K,), device, rows, brackets, counts, nears, levels,
        SLOTS=slots, K=K, num_warps=4,
    )  # fmt: skip
    launch(
        _sampled_threshold.gather_finalists, (chunks,), device, rows, brackets, runs, records, finalists,
        ALIGNED=kind.ALIGNED, CHUNK=_CHUNK, num_warps=4, **inputs,
    )  # fmt: skip
    launch(_sampled_threshold.take_finalist, (K,), device, rows, brackets, finalists, num_warps=8)
    options = _merge_options(kind)
    del options["BLOCK"], options["STEPS"], options["num_warps"]
    launch(
        _sampled_threshold.fix_up, (chunks,), device, rows, sample_row, brackets, counts, runs, records,
        SLOTS=slots, CHUNK=_CHUNK, num_warps=4, **options,
    )  # fmt: skip


def _least_width(job: Job) -> int:
    """Bytes per element of the narrowest input."""
    tensors = job.models if job.base is None else (*job.models, job.base)
    return min(x.element_size() for x in tensors)


def _listed(element: int) -> int:
    """How many elements in brackets a chunk may have: 3.5 times what it has where the records fill
    80 % of their room.
    """
    return _CHUNK // 8 if element > 2 else _CHUNK // 16


def _areas(kind: Kind, n: int, element: int) -> list[int]:
    """Temporary memory of sampled thresholds but for the records, in 32-bit words: histograms of
    the sample, then finalists and lists; elements in each bracket; runs; levels; brackets; records
    used. Each begins at a multiple of 16 bytes.
    """
    K, bins, chunks = kind.K, _select.BINS.value, -(-n // _CHUNK)
    lists = _programs(kind.device, chunks) * _listed(element) // 2
    shared = max(6 * bins * K, _sampled_threshold.FINALISTS.value * K + lists)
    words = [shared, 2 * _SLOTS * K, 2 * chunks, bins * K, PER_BRACKET.value * K, 1]
    return [-(-size // 4) * 4 for size in words]


def _programs(device: torch.device, chunks: int) -> int:
    """Programs of merge_sampled: four per multiprocessor."""
    if device.type == "cpu":
        return 1
    return min(chunks, 4 * int(torch.cuda.get_device_properties(device).multi_processor_count))


def select_large(
    tables: dict[Kind, JobDescriptors], work: int, targets: int, shared: bool, gate: int = -1
) -> None:
    """Radix selection: a pass over the inputs a digit. The tables' rows take the thresholds; where
    they share one vector, the first table's first row alone does.
    """
    if not any(table.needed for table in tables.values()):
        return
    kind, first = next(iter(tables.items()))
    levels = 6 if work == 64 else 3
    width = kind.K * targets
    chunk = DIGIT_CHUNK
    wide = sum(table.pieces(chunk) for table in tables.values()) * chunk >= _WIDE
    hist = torch.zeros(
        width * levels * _select.BINS.value,
        dtype=torch.int64 if wide else torch.int32,
        device=kind.device,
    )
    for level in range(levels):
        for kind, table in tables.items():
            # Elements a thread as in _merge_options; eight with 16 warps, of 128 registers a
            # thread, spill.
            launch(
                _select.count_digits, (table.pieces(chunk), width), kind.device, table.rows, table.chunks, hist,
                LEVELS=levels, TABLE=table.table, SHARED=shared, TARGETS=targets, LEVEL=level, CHUNK=chunk,
                BLOCK=_DIGIT_BLOCK, GATE=gate, num_warps=8 if _halves(kind) else 16, **kind.inputs("K", "XD", "BD", "WORK", "ALIGNED"),
            )  # fmt: skip
    launch(
        _select.take_threshold, (width, 1), first.kind.device, first.rows, hist,
        LEVELS=levels, SHARED=shared, K=kind.K, WORK=work, TARGETS=targets, GATE=gate, num_warps=4,
    )  # fmt: skip


def _norms(kind: Kind, table: JobDescriptors) -> None:
    """T9 and the factors of T3r."""
    rows = table.rows
    # Rounded sums of binary64 rarely settle a quotient of that precision.
    summed = kind.WORK == 32 or kind.NORM == _NORMS["linf"]
    if summed:
        sums = torch.empty(table.count, kind.K, 2, dtype=torch.float64, device=kind.device)
        launch(
            _norm_kernels.norm_chunks, (table.pieces(_norm_kernels.CHUNK), kind.K), kind.device,
            rows, table.chunks, sums, table.starts,
            TABLE=table.table, NORM=kind.NORM, num_warps=4, **kind.inputs("K", "XD", "BD", "WORK", "TRIM"),
        )  # fmt: skip
        launch(
            _norm_kernels.finish_norms, (len(rows), kind.K), kind.device, rows, sums, table.starts,
            num_warps=1, **kind.inputs("K", "WORK", "NORM"),
        )  # fmt: skip
    if kind.NORM != _NORMS["linf"]:
        launch(
            _norm_kernels.exact_factors, (len(rows), kind.K), kind.device, rows,
            OPEN=2 if summed else 1, num_warps=8, **kind.inputs("K", "XD", "BD", "WORK", "TRIM", "NORM"),
        )  # fmt: skip
