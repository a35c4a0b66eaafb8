"""Times in milliseconds, each beside the copy of the same bytes measured in turn with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Percentiles of one function's times in ms, and of the copy that was measured in turn with
    it.
    """

    p20: float
    p50: float
    p80: float
    copy_ms: float

    @property
    def percent_of_copy(self) -> float:
        """Share of the copy bandwidth: 100 is as fast as moving the same bytes."""
        return 100 * self.copy_ms / self.p50


def alternate(
    function: Callable[[], object], copy: Callable[[], object], repeats: int, budget_s: float = 20.0
) -> Timing:
    """Run function, copy, function, copy, ... after one warm-up of each; stops early past the time
    budget.
    """
    function()
    copy()
    times: list[list[float]] = [[], []]
    started = time.perf_counter()
    while len(times[0]) < repeats and (
        len(times[0]) < 3 or time.perf_counter() - started < budget_s
    ):
        for target, call in zip(times, (function, copy), strict=True):
            begin = time.perf_counter()
            call()
            target.append(1e3 * (time.perf_counter() - begin))
    p20, p50, p80 = np.percentile(times[0], [20, 50, 80])
    return Timing(float(p20), float(p50), float(p80), float(np.median(times[1])))
