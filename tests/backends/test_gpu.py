"""The check of a GPU, benchmarks/gpu.py, without one: processes that crash, hang and run out of time,
what is kept of them, files and bars.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SUITE = """
import os, signal, time
import pytest
pytestmark = pytest.mark.gpu

def test_a_pass(): pass
def test_b_fails(): assert 1 + 1 == 3
def test_c_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_d_behind_it(): pass
def test_e_poisons(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_f_behind_it(): pass
@pytest.mark.slow
def test_g_slow(): assert False
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (8 << 30, 8 << 30))
    import gpu as module

    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)  # one process
    return module


@pytest.fixture
def check(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A check whose tests are those of a file."""
    made = gpu.Check(tmp_path / "out", 600.0)
    suite = tmp_path / "test_suite.py"

    def command(number: int, count: int, end: float, log: Path) -> list[str]:
        script = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from pathlib import Path\n"
        script += f"import gpu_tests; left = {max(0.0, end - time.monotonic())}\n"
        script += f"gpu_tests.share({number}, {count}, left, Path({str(log)!r}), [{str(suite)!r}])"
        return [sys.executable, "-c", script]

    monkeypatch.setattr(made, "share_command", command)
    made.suite = suite
    return made


def test_a_crash_leaves_the_tests_behind_it(check: Any) -> None:
    check.suite.write_text(SUITE)
    found = check.tests(time.monotonic() + 300)
    assert found == {"passed": 3, "processes": 1}
    failures = check.report["failures"]
    assert len(failures) == 3
    for name, said in (
        ("b_fails", "1 + 1"),
        ("c_crashes", "did not come"),
        ("e_poisons", "illegal"),
    ):
        assert any(name in line and said in line for line in failures), name
    assert not list(check.out.glob("*.jsonl"))


def test_too_little_time_is_no_failure(check: Any) -> None:
    check.suite.write_text(
        SUITE.replace("def test_a_pass(): pass", "def test_a_pass(): time.sleep(1)")
    )
    found = check.tests(time.monotonic())
    assert found["passed"] == 1 and check.report["failures"] == []
    (line,) = check.report["left out"]
    assert "5 tests of process 0" in line


def test_what_is_missing_is_left_out_and_what_is_broken_a_failure(check: Any) -> None:
    check.suite.write_text("import no_such_module_at_all")
    check.tests(time.monotonic() + 100)
    (line,) = check.report["left out"]
    assert "no_such_module_at_all" in line and check.report["failures"] == []
    check.suite.write_text("import pymerge.no_such_module")
    check.tests(time.monotonic() + 100)
    assert any("pymerge.no_such_module" in line for line in check.report["failures"])


def test_a_test_that_was_ended(gpu: Any, tmp_path: Path) -> None:
    """For want of time it says nothing; after minutes it hangs."""
    log = tmp_path / "log"
    for since, kept in ((5, "left out"), (500, "failures")):
        at = str(time.time() - since)
        log.write_text(json.dumps({"outcome": "begun", "test": "t", "at": at}) + "\n" + '{"outc')
        gpu.ended(log)
        _, failures, left_out = gpu.outcomes([log])
        assert {"failures": failures, "left out": left_out}[kept] == [f"t: ended after {since} s"]
        assert len(failures) + len(left_out) == 1


class Process:
    """A run of `pymerge bench` that has ended, or does not."""

    pid = 2**22 + 1  # of nobody

    def __init__(self, code: int | None) -> None:
        self.code = code

    def wait(self, seconds: float | None = None) -> int:
        if self.code is None and seconds is not None:
            raise subprocess.TimeoutExpired("bench", seconds)
        return self.code or 0


def test_speed(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu.Check(tmp_path, 600.0)
    machine = {"gpu": "Fake", "commit": "c"}

    def start(command: list[str], **_: Any) -> Process:
        given = dict(zip(command[3::2], command[4::2], strict=True))
        family, backend = given["--family"], given["--backend"]
        if family == "bf16-ulps":
            return Process(-11 if backend == "cuda" else None)
        n = {"64M": 1 << 26, "16M": 1 << 24}[given["--size"]]
        rows = [("ties", k, n, share) for k, share in (("2", 71), ("4", 69), ("8", 60))]
        rows += [("thresholds known", "2", n, 90), ("cg updates", "1", 7, 50)]
        with Path(given["--out"] + ".csv").open("w") as handle:
            writer = csv.writer(handle)
            writer.writerow(["op", "merge", "family", "models", "n", "ms_p50", "percent_of_copy", "backend"])  # fmt: skip
            for op, models, size, share in rows:
                of = "fp32" if op == "cg updates" else family
                writer.writerow([op, "ties", of, models, size, 1.5, share, backend])
        Path(given["--out"] + ".json").write_text(json.dumps({"machine": machine}))
        return Process(0)

    monkeypatch.setattr(check, "start", start)
    found = check.speed(time.monotonic() + 100)
    # Of 3 families, 2 sizes and 2 backends 4 rows each, and one that each run repeats.
    assert found["rows"] == 3 * 2 * 2 * 4 + 2
    assert found["bars met"] == "12 of 16"
    table = list(csv.DictReader((tmp_path / "speed.csv").open()))
    bars = {(r["op"], r["models"]): (r["bar"], r["met"]) for r in table if r["bar"]}
    assert bars == {
        ("ties", "2"): ("70", "yes"),
        ("ties", "4"): ("70", "no"),
        ("ties", "8"): ("60", "yes"),
        ("thresholds known", "2"): ("90", "yes"),
    }
    assert {r["family"] for r in table if r["bar"]} == {"fp32", "bf16-spread"}
    assert check.report["machine"] == machine
    failures, left_out = check.report["failures"], check.report["left out"]
    assert len(failures) == 2 and all(
        "cuda bf16-ulps" in line and "-11" in line for line in failures
    )
    assert left_out == [f"speed: triton bf16-ulps {n} did not end in time" for n in ("64M", "16M")]
    check.report["left out"].clear()
    check.speed(time.monotonic() - 1)
    assert len(check.report["left out"]) == 16 and len(check.report["failures"]) == 2


def test_sections_and_files(gpu: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Each step is kept; one that fails decides the exit status, and what is missing does not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake")
    commands: list[tuple[list[str], dict[str, Any]]] = []
    codes = {"setup.py": 1}

    def start(self: Any, command: list[str], **options: Any) -> Process:
        commands.append((command, options))
        return Process(next((c for name, c in codes.items() if name in " ".join(command)), 0))

    monkeypatch.setattr(gpu.Check, "start", start)
    monkeypatch.setattr(gpu.Check, "tests", lambda self, end: {"passed": 5})
    monkeypatch.setattr(gpu.Check, "speed", lambda self, end: {"rows": 0})
    assert gpu.Check(tmp_path, 60.0).run(["build", "tests", "speed", "mats"]) == 1
    report = json.loads((tmp_path / "check.json").read_text())
    assert list(report["sections"]) == ["build", "tests", "speed", "mats"]
    assert report["failures"] == ["build: ended with 1, see check.log"]
    assert report["sections"]["build"]["arch"] == "sm_90" and report["machine"]["gpu"] == "Fake"
    command, options = commands[0]
    assert options["env"] == {"PYMERGE_CUDA": "1", "PYMERGE_CUDA_ARCHS": "90"}
    assert options["cwd"] == tmp_path and "--build-lib" in command
    assert "FAILED build" in capsys.readouterr().out
    codes.clear()
    assert gpu.Check(tmp_path, 60.0).run(["build", "mats"]) == 0
    assert (tmp_path / "check.log").exists() and (tmp_path / "speed.csv").exists()


def test_the_marker_is_of_cases_that_a_device_runs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (conftest,) = (
        p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "runs_on_gpu")
    )
    monkeypatch.setattr(conftest, "usable_on_gpu", lambda name: name == "cuda")

    def marked(**params: Any) -> bool:
        item = SimpleNamespace(callspec=SimpleNamespace(params=params))
        return bool(conftest.runs_on_gpu(item))

    assert marked(fast="cuda") and marked(n=3, backend="cuda")
    assert not marked(fast="triton") and not marked(fast="emulated") and not marked(n=3)
    assert not marked(fast="cpu-avx2-2") and not conftest.runs_on_gpu(SimpleNamespace())


def test_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True, check=False
    )
    if not torch.cuda.is_available():
        assert done.returncode == 2 and "nothing was checked" in done.stdout
