"""The report of a layer that is solved. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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


# Statuses of layers that are not what was asked for, the worst first.
_WORST = ("non_finite", "not_positive", "breakdown", "initialisation")


def of_slices(name: str, reports: Sequence[MatsReport]) -> MatsReport:
    """The report of a tensor whose matrices were solved one by one: sums of decreases, norms of
    residuals, the largest step; the worst status that is not what was asked for, else the most
    frequent one.
    """
    counts = Counter(report.status for report in reports)
    status = next((each for each in _WORST if each in counts), counts.most_common(1)[0][0])
    first = next(report for report in reports if report.status == status)
    if len(reports) == 1:
        return replace(first, name=name)
    solved = [report for report in reports if report.status != "no_statistics"]
    shares = [report.trace_shares for report in solved if report.trace_shares]
    listed = ", ".join(f"{number} {each}" for each, number in counts.most_common())
    messages = dict.fromkeys(report.message for report in reports if report.message)
    return replace(
        first,
        name=name,
        iterations=max(report.iterations for report in reports),
        residual_start=math.hypot(*(report.residual_start for report in solved)),
        residual_exit=math.hypot(*(report.residual_exit for report in solved)),
        objective_decrease=sum(report.objective_decrease for report in reports),
        damping=max(report.damping for report in reports),
        breakdowns=sum(report.breakdowns for report in reports),
        step=max(report.step for report in reports),
        trace_shares=tuple(sum(each) / len(shares) for each in zip(*shares, strict=True)),
        message="; ".join((f"{len(reports)} matrices: {listed}", *messages)),
    )


def without_statistics(name: str, fallback: str) -> MatsReport:
    """The report of a tensor without statistics, in a merge by statistics. fallback: what it
    becomes.
    """
    message = f"the initialisation's value: {fallback}"
    return MatsReport(name, "no_statistics", "none", message=message)
