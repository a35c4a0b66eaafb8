"""pytest-benchmark rows for `ties`: `pytest benchmarks/bench_ties.py`; PYMERGE_BENCH_SIZE sets the
elements (2**20).
"""

from __future__ import annotations

import os

import pytest

from pymerge.backends import registry
from pymerge.bench import cases

SIZE = int(os.environ.get("PYMERGE_BENCH_SIZE", 1 << 20))


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("op", ["thresholds known", "ties"])
def bench_ties(benchmark, family, count, op):
    tensors = cases.make(cases.FAMILIES[family], SIZE, count)
    name, ties = registry.pick("ties", "cpu")
    cases.gate(tensors, name)
    rule = cases.rule_for(tensors) if op == "ties" else cases.known_rule(tensors)
    benchmark.extra_info["bytes"] = tensors.bytes
    benchmark(ties, tensors.models, tensors.base, rule, tensors.out)
