"""What a merge of folders did, counted while it ran."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pymerge.messages.html import STYLE, escaped, table
from pymerge.messages.words import counted
from pymerge.rules.options import Counts

_LOG = logging.getLogger("pymerge.merge")


@dataclass
class MethodSummary:
    """Counts over all tensors that one method made.

    elements: of the outputs. considered: of the task vectors, elements times models. kept: of
    those, after trimming. conflicts: output elements for which kept task vectors of both signs met.
    non_finite: elements of task vectors that are NaN or infinite; of tensors merged by statistics,
        elements of the models and of their statistics.
    non_finite_out: of the outputs. solved: tensors that were merged by statistics.
    """

    tensors: int = 0
    elements: int = 0
    considered: int = 0
    kept: int = 0
    conflicts: int = 0
    non_finite: int = 0
    non_finite_out: int = 0
    solved: int = 0

    @property
    def kept_fraction(self) -> float:
        return self.kept / self.considered if self.considered else 1.0

    @property
    def conflict_fraction(self) -> float:
        return self.conflicts / self.elements if self.elements else 0.0

    def add(self, elements: int, stats: Counts | None) -> None:
        """Count one more tensor; without stats it was copied."""
        self.tensors += 1
        self.elements += elements
        if stats is not None:
            self.considered += elements * len(stats.kept)
            self.kept += sum(stats.kept)
            self.conflicts += stats.conflicts
            self.non_finite += sum(stats.non_finite)

    def include(self, other: dict[str, int]) -> None:
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class MergeSummary:
    """The result of `merge_checkpoints`.

    out: the folder. files: its weight files. bytes_read, bytes_written: of tensor data, without
        what was resumed.
    seconds: from the call on. resumed: weight files taken over from an interrupted merge. notes:
    what a person may want to know and need not act on.
    """

    out: Path
    files: tuple[str, ...]
    tensors: int
    parameters: int
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    resumed: int = 0
    methods: dict[str, MethodSummary] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def gb_per_s(self) -> float:
        """Tensor bytes read and written per second, in units of 1e9."""
        moved = self.bytes_read + self.bytes_written
        return moved / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def log_start(self, models: int, method: str, dry_run: bool) -> None:
        """Log what is to be done."""
        _LOG.info(
            "%s %s by %s: %s, %s in %s",
            "planned: merging" if dry_run else "merging",
            counted(models, "model"),
            method,
            counted(self.tensors, "tensor"),
            counted(len(self.files), "file"),
            self.out,
        )

    def log_end(self, dry_run: bool) -> None:
        """Log the notes and what was done."""
        for note in self.notes:
            _LOG.info("%s", note)
        if not dry_run:
            _LOG.info(
                "%s is complete: read %d bytes, wrote %d, resumed %s, in %.2f s",
                self.out,
                self.bytes_read,
                self.bytes_written,
                counted(self.resumed, "file"),
                self.seconds,
            )

    def _repr_html_(self) -> str:
        """For notebooks."""
        rows = []
        for method, made in self.methods.items():
            known = made.considered > 0
            kept = f"{100 * made.kept_fraction:.1f} %" if known else "copied"
            conflicts = f"{100 * made.conflict_fraction:.1f} %" if known else ""
            words = "solved" if made.solved else kept
            rows.append((method, f"{made.tensors:,}", f"{made.elements:,}", words, conflicts))
        headings = ("method", "tensors", "parameters", "kept", "sign conflicts")
        done = (
            f"{counted(self.parameters, 'parameter')}, {counted(len(self.files), 'file')},"
            f" {self.seconds:.2f} s, {self.gb_per_s:.2f} GB/s"
        )
        notes = "".join(f"<li>{escaped(note)}</li>" for note in self.notes)
        return (
            f'<div class="pymerge"><style>{STYLE}</style><p><b>{escaped(self.out)}</b></p>'
            f"<p>{escaped(done)}</p>{table(headings, rows)}"
            f"{f'<ul>{notes}</ul>' if notes else ''}</div>"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out), "gb_per_s": self.gb_per_s}


def merged_stats(parts: Sequence[Counts]) -> Counts:
    """The counts of a tensor from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    return Counts(
        kept=tuple(map(sum, zip(*(p.kept for p in parts), strict=True))),
        conflicts=sum(p.conflicts for p in parts),
        non_finite=tuple(map(sum, zip(*(p.non_finite for p in parts), strict=True))),
    )
