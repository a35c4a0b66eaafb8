"""The op `matrix` on tensors: one matrix after the other, by its method (docs/spec/matrix.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from pymerge.backends import registry
from pymerge.interrupt import check
from pymerge.ops.matrix import spectral, wudi
from pymerge.reference import matrix as reference
from pymerge.reference.ties import cast
from pymerge.rules.matrix import MatrixOptions
from pymerge.rules.options import Counts
from pymerge.rules.report import MatsReport
from pymerge.rules.types import Backend

Parts = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


def merge_tensor(
    models: Sequence[torch.Tensor],
    base: torch.Tensor,
    options: MatrixOptions,
    out: torch.Tensor,
    name: str,
    backend: Backend,
) -> Counts:
    """Merge checked matrices, or stacks of them, into `out`. name: has no effect, nothing is drawn.

    backend: "reference", or any that serves the tensors' device; it chooses the solver's vector
    updates (M6), and matrix products and factorisations are torch's.
    """
    registry.choose(out.device.type, backend)
    if registry.asked_for(backend) == "reference":
        return reference.matrix(models, base, options, out)
    bad = [0] * options.count
    reports = []
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        for parts, from_base, to in _matrices(models, base, out):
            check()
            deltas, own = _task_vectors(parts, from_base)
            bad = [total + count for total, count in zip(bad, own, strict=True)]
            if any(bad) and options.non_finite == "error":
                continue  # the caller refuses, and says how many
            # X8: a task vector that is not finite is left out of its matrix.
            kept = [k for k in range(options.count) if not own[k]]
            if not kept:
                to.copy_(from_base)
                continue
            merged, report = _merged(
                [deltas[k] for k in kept], [parts[k] for k in kept], options, backend
            )
            del deltas
            total = from_base.to(merged.dtype) + merged.mul_(options.scaling)
            to.copy_(cast(total, to.dtype))
            if report is not None:
                reports.append(report)
    return Counts((out.numel(),) * options.count, 0, tuple(bad), report=_of_stack(reports))


def _merged(
    deltas: list[torch.Tensor],
    models: list[torch.Tensor],
    options: MatrixOptions,
    backend: Backend,
) -> tuple[torch.Tensor, MatsReport | None]:
    """T of one matrix, in the working precision, and what the solver did."""
    if options.method == "wudi":
        return wudi.merge(deltas, options, backend)
    merge = spectral.tsv if options.method == "tsv" else spectral.iso_c
    return merge(deltas, models, options), None


def _matrices(
    models: Sequence[torch.Tensor], base: torch.Tensor, out: torch.Tensor
) -> Iterator[Parts]:
    """The matrices of tensors with two or three dimensions."""
    if out.numel() == 0:
        return
    if out.ndim == 2:
        yield list(models), base, out
        return
    for i in range(out.shape[0]):
        yield [model[i] for model in models], base[i], out[i]


def _task_vectors(
    models: Sequence[torch.Tensor], base: torch.Tensor
) -> tuple[list[torch.Tensor], list[int]]:
    """X1: T_k in the working precision, in memory of their own, and the elements of each that are
    not finite.
    """
    wide = any(x.dtype == torch.float64 for x in (*models, base))
    work = torch.float64 if wide else torch.float32
    start = base.detach().to(work)
    found = []
    for model in models:
        delta = torch.empty(model.shape, dtype=work, device=model.device)
        found.append(delta.copy_(model.detach()).sub_(start))
    return found, [int(each.numel() - each.isfinite().sum()) for each in found]


def _of_stack(reports: Sequence[MatsReport]) -> MatsReport | None:
    """One report for a stack of matrices: sums of objectives, and the worst of the rest."""
    if not reports:
        return None
    first = next((r for r in reports if r.status not in ("iterations", "converged")), reports[0])
    if len(reports) == 1:
        return first
    return replace(
        first,
        iterations=max(r.iterations for r in reports),
        residual_start=sum(r.residual_start**2 for r in reports) ** 0.5,
        residual_exit=sum(r.residual_exit**2 for r in reports) ** 0.5,
        objective_start=sum(r.objective_start for r in reports),
        objective_decrease=sum(r.objective_decrease for r in reports),
        damping=max(r.damping for r in reports),
        breakdowns=sum(r.breakdowns for r in reports),
        step=max(r.step for r in reports),
        growth=max((r.growth for r in reports if r.growth == r.growth), default=first.growth),
        trace_shares=(),
    )
