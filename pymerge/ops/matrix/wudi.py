"""`wudi` of one matrix: a few steps of the solver of `mats` from the sum of the task vectors (X4,
X5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from pymerge.ops.mats.api import mats_many
from pymerge.ops.mats.layer import MatsLayer
from pymerge.ops.mats.report import told_by_reports
from pymerge.ops.mats.system import full_products
from pymerge.rules.matrix import MatrixOptions
from pymerge.rules.report import MatsReport
from pymerge.rules.types import Backend


def merge(
    deltas: Sequence[torch.Tensor], options: MatrixOptions, backend: Backend
) -> tuple[torch.Tensor, MatsReport]:
    """T of task vectors in the working precision, and what the solver did."""
    total = _sum(deltas)
    norms = [float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in deltas]
    others = [k for k, norm in enumerate(norms) if norm > 0]
    if not others:
        message = "no model differs from the base"
        nothing = MatsReport("", "converged", "cg", message=message)
        return total, replace(nothing, objective_start=0.0, growth=1.0)
    columns = total.shape[1]
    grams = total.new_empty(len(others), columns, columns)
    with full_products(total.device):
        for place, k in enumerate(others):
            unit = deltas[k] / norms[k]
            torch.mm(unit.T, unit, out=grams[place])
        before = _objective(total, [deltas[k] for k in others], grams)
    layer = MatsLayer([deltas[k] for k in others], grams, init=total)
    with told_by_reports():
        [(merged, report)] = mats_many(
            [layer], iterations=options.iterations, damping=options.damping, backend=backend
        )
    length = float(torch.linalg.vector_norm(total, dtype=torch.float64))
    made = float(torch.linalg.vector_norm(merged, dtype=torch.float64))
    report = replace(
        report,
        # The solver's f has a factor of 1/2 (M1).
        objective_start=before,
        objective_decrease=min(before, 2 * report.objective_decrease),
        growth=made / length if length > 0 else math.inf if made > 0 else 1.0,
    )
    return merged, report


def _sum(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """In model order."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    return total


def _objective(start: torch.Tensor, deltas: Sequence[torch.Tensor], grams: torch.Tensor) -> float:
    """X4: f(T)."""
    found = 0.0
    for delta, gram in zip(deltas, grams, strict=True):
        apart = start - delta
        found += float((apart @ gram).mul_(apart).sum(dtype=torch.float64))
    return max(0.0, found)
