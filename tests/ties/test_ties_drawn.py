"""`ties` with any options on any tensors, drawn by hypothesis, against the reference."""

from __future__ import annotations

import pytest
from ties_backends import FAST, Backend, check_equal
from ties_cases import DISTRIBUTIONS, DTYPES, family

from pymerge.rules.ties import FLAVORS, MERGES

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_options(data):
    draw = data.draw
    n, count = draw(st.integers(0, 3000)), draw(st.integers(1, 9))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    models, base = family(
        n, count, draw(st.sampled_from(list(DISTRIBUTIONS))), dtypes, draw(st.integers(0, 99))
    )
    unit = st.floats(0, 1) | st.sampled_from([0.0, 0.2, 0.5, 1.0])
    options = {
        "density": draw(st.lists(unit, min_size=count, max_size=count)),
        "weights": draw(st.lists(st.floats(-2, 2, width=32), min_size=count, max_size=count)),
        "scaling": draw(st.floats(-2, 2)),
        "flavor": draw(st.sampled_from(list(FLAVORS))),
        "trim": draw(st.sampled_from(["magnitude", "outliers", "random", "none"])),
        "elect": draw(st.sampled_from(["sum", "count", "none"])),
        "merge": draw(st.sampled_from(MERGES)),
        "zero_sign": draw(st.sampled_from(["positive", "majority"])),
        "rescale": draw(st.sampled_from(["none", "density", "l1", "l2", "linf"])),
        "gamma": draw(unit),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "name": draw(st.text(max_size=5)),
    }
    offset = draw(st.integers(0, min(n, 3)))
    views = [m[offset:] for m in models]
    for name in _fast_names():
        check_equal(Backend(name), views, draw(st.sampled_from([None, base[offset:]])), **options)


def _fast_names():
    return [name for name in FAST if name.startswith("cpu-") and name.endswith("-2")][-1:] + [
        name for name in FAST if not name.startswith("cpu-") and name != "emulated"
    ]
