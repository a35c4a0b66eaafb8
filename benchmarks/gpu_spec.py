"""The part of gpu_check.py that runs the spec suite, tests/ties/test_ties.py, on the device with
both backends.

Several processes share its tests, since a Triton kernel is compiled when it is first launched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SUITE, CHOSEN = ROOT / "tests/ties/test_ties.py", "cuda or triton"
MOST, MEMORY_EACH = 8, 2 << 30


def spec(seconds: float) -> dict[str, Any]:
    """The tests in the file's order, worked examples first, until all are done or time is up."""
    try:
        import pytest  # noqa: F401
    except ImportError as error:
        return {"failures": [], "summary": f"not run: {error}"}
    free, _ = torch.cuda.mem_get_info()
    count = max(1, min(MOST, (os.cpu_count() or 1) // 2, free // MEMORY_EACH))
    script = Path(__file__).with_name("gpu_check.py")
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    with tempfile.TemporaryDirectory() as folder:
        names = [f"spec-{number}-{count}" for number in range(count)]
        processes = []
        for name in names:
            command = [sys.executable, str(script), "--part", name, "--out", folder]
            command += ["--seconds", f"{seconds:.0f}"]
            processes.append(subprocess.Popen(command, env=env))
        codes = [process.wait() for process in processes]
        results = []
        for name, code in zip(names, codes, strict=True):
            path = Path(folder, f"{name}.part.json")
            if path.exists():
                results.append(json.loads(path.read_text()))
            else:
                results.append({"failures": [f"{name} ended with {code}"], "summary": {}})
    summary: dict[str, int] = {}
    for result in results:
        for what, number in result["summary"].items():
            summary[what] = summary.get(what, 0) + number
    return {"failures": [f for result in results for f in result["failures"]], "summary": summary}


class Watch:
    """A plugin of pytest: takes one share of the tests, counts what passes, keeps what fails, and
    ends the run on time.
    """

    def __init__(self, number: int, count: int, seconds: float) -> None:
        self._number, self._count = number, count
        self._end = time.monotonic() + seconds
        self.failures: list[str] = []
        self.summary = {"passed": 0, "left out for want of time": 0}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longreprtext[-1500:]}")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [x for x in items if zlib.crc32(x.nodeid.encode()) % self._count == self._number]

    def pytest_collection_finish(self, session: Any) -> None:
        self.summary["left out for want of time"] = len(session.items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longreprtext[-800:]}")
        elif report.when == "call" and report.passed:
            self.summary["passed"] += 1

    def pytest_runtest_teardown(self, item: Any) -> None:
        self.summary["left out for want of time"] -= 1
        if time.monotonic() > self._end:
            item.session.shouldstop = "out of time"


def share(number: int, count: int, seconds: float) -> dict[str, Any]:
    """One process's tests."""
    import pytest

    torch.set_num_threads(1)
    watch = Watch(number, count, seconds)
    # Not the project's configuration, which names plugins that need not be here.
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib", "-v"]
    options += ["-p", "no:cacheprovider", "--maxfail=5", "-m", "not slow", "-k", CHOSEN]
    pytest.main([*options, str(SUITE)], plugins=[watch])
    return {"failures": watch.failures, "summary": watch.summary}
