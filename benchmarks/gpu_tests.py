"""The part of gpu.py that runs inside its processes: the tree made importable, and a share of
`pytest -m gpu`, with every test's begin and end on a line of a file, should the process not come to
its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("ties/test_gpu.py", "ties/test_ties.py", "mats/test_mats_gpu.py", "mats/test_mats_vectors.py", "mats/test_mats_small.py", "engine/test_on_gpu.py")  # fmt: skip
HANGS = 90  # seconds after which a test does not come to its end
# What a kernel leaves behind after which nothing else works in the process.
FATAL = ("illegal memory", "misaligned", "launch failure", "device-side assert", "illegal instruction")  # fmt: skip


def use_tree() -> None:
    """Have this tree imported, which need not be installed: the folder triton_kernels is
    pymerge.triton_kernels.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    name, folder = "pymerge.triton_kernels", ROOT / "triton_kernels"
    import pymerge

    if importlib.util.find_spec(name) is None:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        vars(pymerge)["triton_kernels"] = module


def lines_of(log: Path) -> list[dict[str, str]]:
    """What a share wrote: {"outcome": ..., "test": ..., "said": ...} each."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]


def ended(log: Path) -> None:
    """Note that the process was ended from outside, and for how long it had its last test."""
    lines = [line for line in lines_of(log) if line["outcome"] == "begun"]
    if lines:
        since = time.time() - float(lines[-1]["at"])
        with log.open("a") as handle:
            line = {"outcome": "ended", "test": lines[-1]["test"], "said": f"{since:.0f}"}
            handle.write("\n" + json.dumps(line) + "\n")


def begun(log: Path) -> set[str]:
    return {line["test"] for line in lines_of(log) if line["outcome"] == "begun"}


class Watch:
    """A plugin of pytest. Of every `count` tests it takes one, but for those that were begun before;
    it ends on time, and at once where nothing more can work.
    """

    def __init__(self, number: int, count: int, seconds: float, log: Path) -> None:
        self._number, self._count, self._log = number, count, log
        self._end = time.monotonic() + seconds
        self._done = begun(log)
        self._left = 0

    def _say(self, outcome: str, **said: str) -> None:
        with self._log.open("a") as handle:
            handle.write(json.dumps({"outcome": outcome, **said}) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            said = f"{report.nodeid}: {report.longreprtext[-800:]}"
            missing = "No module named" in said and "pymerge" not in said.rpartition("named")[2]
            if missing:
                self._say("missing", said=said)
            else:
                self._say("failed", test=report.nodeid, said=said)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        mine = (x for x in items if zlib.crc32(x.nodeid.encode()) % self._count == self._number)
        items[:] = [x for x in mine if x.nodeid not in self._done]

    def pytest_collection_finish(self, session: Any) -> None:
        self._left = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._left -= 1
        self._say("begun", test=nodeid, at=str(time.time()))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            said = report.longreprtext
            self._say("failed", test=report.nodeid, said=said[-800:])
            if any(words in said for words in FATAL):
                os._exit(3)
        elif report.when == "teardown" or report.skipped:
            self._say("passed" if not report.skipped else "skipped", test=report.nodeid)

    def pytest_runtest_teardown(self, item: Any) -> None:
        if time.monotonic() > self._end and self._left:
            self._say("out of time", said=f"{self._left} tests of process {self._number}")
            item.session.shouldstop = "out of time"


def share(number: int, count: int, seconds: float, log: Path, tests: Any = TESTS) -> int:
    """0 where it came to its end, whatever the tests say."""
    import pytest
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (2 * count)))
    # Not the project's configuration, which names plugins that need not be here.
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib", "-v"]
    options += [
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "-m",
        "gpu and not slow",
    ]
    paths = [str(ROOT / "tests" / name) for name in tests]
    pytest.main([*options, *paths], plugins=[Watch(number, count, seconds, log)])
    return 0


def outcomes(logs: list[Path]) -> tuple[dict[str, str], list[str], list[str]]:
    """(test -> outcome, failures, what was left out) of all shares. A test that took its process
    with it is a failure; one that was ended with it for want of time only where it seemed to hang.
    """
    found: dict[str, str] = {}
    failures, left_out = [], []
    for log in logs:
        for line in lines_of(log):
            what, test, said = line["outcome"], line.get("test", ""), line.get("said", "")
            if what in ("missing", "out of time"):
                left_out.append(said)
            elif what == "ended" and found.get(test) == "begun":
                found[test] = "ended"
                hung = float(said) > HANGS
                (failures if hung else left_out).append(f"{test}: ended after {said} s")
            elif what != "ended" and found.get(test) != "failed":
                found[test] = what
            if what == "failed":
                failures.append(f"{test}: {said}")
    failures += [f"{t}: did not come to its end" for t, what in found.items() if what == "begun"]
    return found, list(dict.fromkeys(failures)), list(dict.fromkeys(left_out))
