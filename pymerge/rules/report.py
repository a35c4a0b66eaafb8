"""The report of a layer that is solved. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class MatsReport:
    """What happened to one layer.

    status: "iterations", "converged", "step_limit", "exact", "singular", "breakdown",
        "initialisation", "no_statistics", "not_positive" or "non_finite" (M4, M8 to M11, M14, N1 to
        N5).
    residual_start, residual_exit: Frobenius norm of R - A(X) at the initialisation and of the
        result.
    objective_decrease: f(X0) - f(X), in the units of the statistics.
    damping: the one in force at the end. breakdowns: how often it was raised (M9).
    step: ||X - X0|| / max_k ||W_k - mean W||. A step far above 1 leaves the region that the models
        span.
    trace_shares: w_k tr A_k tr B_k as shares of their sum (M3).
    objective_start: f(X0), of `wudi` (docs/spec/matrix.md, X5), as the decrease is there.
    growth: ||T|| / ||sum of the task vectors||, of `wudi`.
    """

    name: str
    status: str
    solver: str
    iterations: int = 0
    residual_start: float = math.nan
    residual_exit: float = math.nan
    objective_decrease: float = 0.0
    damping: float = 0.0
    breakdowns: int = 0
    step: float = 0.0
    trace_shares: tuple[float, ...] = ()
    precision: str = ""
    message: str = ""
    objective_start: float = math.nan
    growth: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON; non-finite numbers become None."""

        def plain(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {key: plain(value) for key, value in asdict(self).items()}


def report_from(held: Mapping[str, Any]) -> MatsReport:
    """The inverse of `MatsReport.as_dict`; None becomes NaN."""
    values: dict[str, Any] = {}
    for each in fields(MatsReport):
        value = held[each.name]
        if each.name == "trace_shares":
            value = tuple(value)
        values[each.name] = math.nan if value is None else value
    return MatsReport(**values)


def without_statistics(name: str, fallback: str) -> MatsReport:
    """The report of a tensor without statistics, in a merge by statistics. fallback: what it
    becomes.
    """
    message = f"the initialisation's value: {fallback}"
    return MatsReport(name, "no_statistics", "none", message=message)
