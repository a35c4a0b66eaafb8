"""The backend "cuda": passes torch tensors on an NVIDIA GPU to the compiled kernels as addresses.

Everything is enqueued on the current stream and nothing waits for the device, so a call can be
captured in a CUDA graph. Counts are returned as `PendingStats`, whose `resolve()` waits. Scratch
memory comes from torch's caching allocator.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch

from pymerge.backends import native
from pymerge.backends.placement import Passed, device_of
from pymerge.dtypes import name_of
from pymerge.messages.arguments import argument, takes
from pymerge.rules.ties import TiesRule, TiesStats

Job = tuple[Sequence[torch.Tensor], torch.Tensor | None, TiesRule, torch.Tensor]


class PendingStats:
    """Counts on the device. They are kept once read: after another replay of a captured graph they
    are still those of the first reading.
    """

    def __init__(self, counts: _Counts, row: int, rule: TiesRule) -> None:
        self._counts, self._row, self._rule = counts, row, rule

    def missed(self) -> bool:
        """Whether a sampled threshold missed, so that the exact passes ran; waits as `resolve`
        does.
        """
        return bool(self._counts.row(self._row)[3 * len(self._rule.weights) + 3])

    def resolve(self) -> TiesStats:
        """The counts; waits for the call's own stream, once for all its tensors."""
        words, count = self._counts.row(self._row), len(self._rule.weights)
        thresholds = struct.unpack(
            f"{count}d", struct.pack(f"{count}q", *words[2 * count : 3 * count])
        )
        counted = self._rule.zero_sign == "majority"
        return TiesStats(
            kept=tuple(words[:count]),
            conflicts=words[3 * count],
            non_finite=tuple(words[count : 2 * count]),
            thresholds=thresholds if self._rule.trim in ("magnitude", "outliers") else (),
            positive=words[3 * count + 1] if counted else 0,
            negative=words[3 * count + 2] if counted else 0,
        )


class _Counts:
    """The counts of one call, one row per tensor, copied to the host on first use."""

    def __init__(self, rows: torch.Tensor, written: Passed) -> None:
        self._rows: torch.Tensor | None = rows
        self._written = written
        self._host: list[list[int]] = []

    def row(self, row: int) -> list[int]:
        if self._rows is not None:
            self._written.hold()
            self._host = self._rows.tolist()
            self._rows = None
        return self._host[row]


def ties(
    models: Sequence[torch.Tensor], base: torch.Tensor | None, rule: TiesRule, out: torch.Tensor
) -> PendingStats:
    """docs/spec/ties.md for one tensor; `out` is contiguous. Only strided inputs are copied."""
    return ties_many([(models, base, rule, out)])[0]


def ties_many(jobs: Sequence[Job]) -> list[PendingStats]:
    """`ties` for any number of tensors in a handful of launches: (models, base, rule, out) each.

    Tensors of up to 32768 elements go many to a launch, larger ones share the launches of each
    step. Returns the counts in the order of the jobs.
    """
    stats: list[PendingStats | None] = [None] * len(jobs)
    kinds: dict[tuple[int, torch.device], list[int]] = {}
    for j, (models, _, _, out) in enumerate(jobs):
        if not out.is_contiguous():
            raise ValueError(
                f"out has strides {out.stride()} for shape {tuple(out.shape)}; pass a contiguous"
                " tensor"
            )
        kinds.setdefault((len(models), out.device), []).append(j)
    for (count, device), indices in kinds.items():
        if not 1 <= count <= 64:
            raise ValueError(
                f"{argument('models')} has {count} tensors; the CUDA backend takes 1 to 64, "
                + ("pass backend='reference'" if takes("backend") else "move them to the CPU")
            )
        # Copies of strided inputs, until the kernels are on the stream.
        held: list[torch.Tensor] = []
        table = []
        for j in indices:
            models, base, rule, out = jobs[j]
            table.append(
                (
                    [_buffer(x, held) for x in models],
                    None if base is None else _buffer(base, held),
                    _buffer(out, held),
                    out.numel(),
                    rule,
                )
            )
        call = native.cuda().Ties(table)
        scratch = torch.empty(call.scratch_bytes, dtype=torch.uint8, device=device)
        rows = torch.empty((len(indices), call.stats_words), dtype=torch.int64, device=device)
        call.run(scratch.data_ptr(), scratch.numel(), rows.data_ptr(), *place(device))
        counts = _Counts(rows, Passed(device))
        for row, j in enumerate(indices):
            stats[j] = PendingStats(counts, row, jobs[j][2])
    return [one for one in stats if one is not None]


def select(
    tensors: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor | None]], ranks: Sequence[int]
) -> torch.Tensor:
    """The ranks[k]-th largest magnitude of model k over all the tensors, as if concatenated (T3,
    T7).

    Returns a float64 tensor (K,) on the tensors' device, written when the stream has passed.
    ValueError for tensors on several devices.
    """
    device = device_of(tensors)
    held: list[torch.Tensor] = []
    table = []
    for models, base in tensors:
        table.append(
            (
                [_buffer(x, held) for x in models],
                None if base is None else _buffer(base, held),
                models[0].numel(),
            )
        )
    call = native.cuda().Select(table, list(ranks))
    scratch = torch.empty(call.scratch_bytes, dtype=torch.uint8, device=device)
    thresholds = torch.empty(len(ranks), dtype=torch.float64, device=device)
    call.run(scratch.data_ptr(), scratch.numel(), thresholds.data_ptr(), *place(device))
    return thresholds


def scratch_bytes(n: int, count: int, dtype: torch.dtype, rule: TiesRule) -> int:
    """Device memory that `ties` takes beside its operands, for `count` models of n elements."""
    buffer = (0, name_of(dtype))
    size: int = native.cuda().Ties([([buffer] * count, buffer, buffer, n, rule)]).scratch_bytes
    return size


def place(device: torch.device) -> tuple[int, int, int]:
    """Device number, number of multiprocessors, and the current stream as an integer."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, _processors(index), torch.cuda.current_stream(index).cuda_stream


@lru_cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _buffer(tensor: torch.Tensor, held: list[torch.Tensor]) -> tuple[int, str]:
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        held.append(tensor)
    return tensor.data_ptr(), name_of(tensor.dtype)
