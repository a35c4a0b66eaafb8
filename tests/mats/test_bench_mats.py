"""benchmarks/bench_mats.py at toy size: it runs, and rows of several parts come together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("scipy")


def test_runs_at_toy_size(tmp_path: Path) -> None:
    for part in (1, 2):
        done = subprocess.run(
            [sys.executable, "benchmarks/bench_mats.py", "--toy", "--repeats", "1", "--part", f"{part}/2"]
            + ["--out", str(tmp_path / "result")] + (["--only", "solve"] if part == 1 else []),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    held = json.loads((tmp_path / "result.json").read_text())
    assert [row["layer"] for row in held["solve"]] == ["synthetic 24x16", "synthetic 16x48"]
    assert all(row["within_bar"] and row["ours_ms"] > 0 for row in held["solve"])
    assert [row["models"] for row in held["iteration"]] == [8, 8]
    assert (tmp_path / "result.csv").read_text().count("\n") == 5
