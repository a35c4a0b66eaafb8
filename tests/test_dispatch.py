"""Which backend "auto" takes: what can run, and on a GPU what the committed measurements show to be faster."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from pymerge.backends import registry
from pymerge.backends.cg.cuda import CudaRun
from pymerge.backends.cg.run import Run
from pymerge.ops.mats.cg import run_type

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import prefer

Rows = list[tuple[str, str, float | str]]

# Merges as called: CUDA is faster by 2 and slower by 1.5; what has one backend only or is of a graph does not count.
ROWS: Rows = [
    ("ties float32 K=2 as called", "cuda", 1.0),
    ("ties float32 K=2 as called", "triton", 2.0),
    ("300 small as called", "cuda", 3.0),
    ("300 small as called", "triton", 2.0),
    ("ties float32 K=4 as called", "triton", 0.001),
    ("known float32 K=4", "cuda", 9.0),
    ("known float32 K=4", "triton", 1.0),
    ("rivals: peft", "peft", ""),
    ("cg updates 4096x4096", "cuda", 1.1),
    ("cg updates 4096x4096", "triton", 1.0),
    ("cg updates 4096x4096", "reference", 0.1),
]


def write(path: Path, device: str, rows: Rows, date: str = "2027-01-01 10:00 UTC") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "backend", "ms_p50", "device", "date"])
        writer.writerows([*row, device, date] for row in rows)


def test_what_is_taken_is_what_the_committed_results_say() -> None:
    assert prefer.MODULE.read_text() == prefer.module(prefer.faster(prefer.RESULTS))


def test_the_faster_backend_of_a_table(tmp_path: Path) -> None:
    write(tmp_path / "some gpu/speed.csv", "Some GPU", ROWS)
    write(tmp_path / "other.csv", "Other", [(w, b, t) for w, b, t in ROWS if b != "cuda"])
    (tmp_path / "cpu.csv").write_text("case,ms\nx,1\n")
    found = prefer.faster(tmp_path)
    assert found == {"Some GPU": {"ties": "cuda", "cg": "triton"}}
    scope: dict[str, object] = {}
    exec(prefer.module(found), scope)
    assert scope["FASTER"] == found


def test_a_newer_table_replaces_an_older_one(tmp_path: Path) -> None:
    turned: Rows = [(w, {"cuda": "triton", "triton": "cuda"}.get(b, b), t) for w, b, t in ROWS]
    write(tmp_path / "z.csv", "Some GPU", ROWS)
    write(tmp_path / "a.csv", "Some GPU", turned, "2027-01-02 09:00 UTC")
    assert prefer.faster(tmp_path) == {"Some GPU": {"ties": "triton", "cg": "cuda"}}


def test_every_row_that_counts_is_one_that_gpu_check_writes() -> None:
    """The two go by the same names."""
    sources = [
        (prefer.ROOT / f"benchmarks/gpu_{name}.py").read_text() for name in ("speed", "mats")
    ]
    assert ' as called"' in sources[0] and "cg updates " in sources[1]


def test_auto_on_a_measured_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    there = ["cuda", "triton"]
    monkeypatch.setattr(registry, "why_not", lambda name: None if name in there else "not here")
    monkeypatch.setattr(registry, "FASTER", {"Some GPU": {"ties": "triton", "cg": "cuda"}})
    monkeypatch.setattr(registry, "_gpu_name", lambda: "Other GPU")
    assert [registry.pick(op, "cuda")[0] for op in registry.OPS] == ["cuda", "cuda"]
    monkeypatch.setattr(registry, "_gpu_name", lambda: "Some GPU")
    assert [registry.pick(op, "cuda")[0] for op in registry.OPS] == ["triton", "triton"]
    assert registry.pick_many()[0] == "triton"
    assert run_type("cuda") is CudaRun
    assert registry.order("ties", "cuda") == ("triton", "cuda", "reference")
    assert registry.order("ties", "cpu") == registry.ORDER["cpu"]
    monkeypatch.setattr(registry, "FASTER", {"Some GPU": {"cg": "triton"}})
    assert run_type("cuda").__name__ == "TritonRun"
    there.clear()
    assert run_type("cuda") is Run
