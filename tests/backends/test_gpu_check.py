"""The check of a GPU, as far as it goes without one: sections, tables and files, with the reference
in the kernels' place.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from host_device import HostDevice

from pymerge.backends import registry
from pymerge.backends.cg.iteration import VectorUpdates
from pymerge.engine.gpu.sizes import DeviceSizes
from pymerge.ops.mats import small_layers
from pymerge.reference import ties as reference

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MACHINE = {"device": "none", "driver": "1", "torch": "2", "triton": "3", "commit": "c", "date": "d"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def loaded(name: str) -> ModuleType:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return loaded


class Pending:
    def __init__(self, stats: Any) -> None:
        self.stats = stats

    def resolve(self) -> Any:
        return self.stats

    def missed(self) -> bool:
        return False


def ties(*job: Any) -> Pending:
    return Pending(reference.ties(*job))


KERNELS = SimpleNamespace(
    __name__="kernels",
    ties=ties,
    ties_many=lambda jobs: [ties(*job) for job in jobs],
    select=reference.select,
    scratch_bytes=lambda *_: 0,
)


@pytest.fixture
def on_the_host(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    correctness, speed = load("gpu_correctness"), load("gpu_speed")
    monkeypatch.setattr(correctness, "DEVICE", "cpu")
    for module in (correctness, speed):
        monkeypatch.setattr(module, "backends", lambda: {"cuda": KERNELS, "triton": "not here"})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 20, 1 << 20))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


def test_cases_and_large_tensors(load: Any, on_the_host: Any, monkeypatch: Any) -> None:
    correctness = load("gpu_correctness")
    monkeypatch.setattr(correctness, "GUESSED", [100, 101])
    monkeypatch.setattr(correctness, "SMALL", [0, 1, 70])
    found = correctness.cases(3.0)
    assert found["failures"] == ["triton: not here"] and found["summary"]["cuda cases"] > 24
    drawn = correctness.tensors
    monkeypatch.setattr(correctness, "tensors", lambda kind, n, *more: drawn(kind, n & 1023, *more))
    monkeypatch.setattr(correctness, "_expected", lambda models, base, rule: _wanted(models, base, rule))  # fmt: skip
    monkeypatch.setattr(torch, "full", _cut(torch.full))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 36, 1 << 36))
    found = correctness.large(3.0)
    assert found["failures"] == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 20, 1 << 20))
    monkeypatch.setattr(correctness, "plans", lambda: iter(correctness.fixed_plans()))
    found = correctness.large(60.0)
    assert found["summary"] | {"guesses": 0} == {
        "comparisons": 0, "too large": correctness.FIXED, "guesses": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_the_case_at_hand_is_kept(load: Any, on_the_host: Any, monkeypatch: Any) -> None:
    """Of a kernel that does not come to its end only that would be known."""
    correctness = load("gpu_correctness")
    monkeypatch.setattr(correctness, "GUESSED", [100, 101])
    monkeypatch.setattr(correctness, "SMALL", [5])
    monkeypatch.setattr(correctness, "plans", lambda: iter([("gaussian", 70, 2, torch.float32)]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 36, 1 << 36))
    monkeypatch.setattr(correctness, "_graph", lambda module: "")
    for check, words in (
        (correctness.cases, ("cuda: ", "'n': 101, 'K': 1", "float32")),
        (correctness.large, ("cuda, gaussian, n=70, K=2, torch.float32",)),
        (correctness.graph, ("cuda graph",)),
    ):
        kept: list[str] = []
        found = check(0.5, lambda result, kept=kept: kept.append(json.dumps(result)))
        assert all(word in json.loads(kept[0])["summary"]["at hand"] for word in words)
        assert "at hand" not in found["summary"] and len(kept) >= 1


def test_random_sizes_follow_the_fixed_ones(load: Any) -> None:
    correctness = load("gpu_correctness")
    made = list(itertools.islice(correctness.plans(), 400))
    assert made[: correctness.FIXED] == correctness.fixed_plans()
    sizes = [n for _, n, _, _ in made[correctness.FIXED :]]
    assert min(sizes) < 1 << 18 and 1 << 27 < max(sizes) <= 1 << 28 and len(set(sizes)) > 300


@pytest.mark.slow
def test_the_spec_suite(load: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Its frame, with the reference in the kernels' place: shares of the tests, counts, failures,
    time.
    """
    spec = load("gpu_spec")
    monkeypatch.setattr(spec, "CHOSEN", "reference and test_t2")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    shares = [spec.share(number, 2, 60.0) for number in range(2)]
    assert [one["failures"] for one in shares] == [[], []]
    assert sum(one["summary"]["passed"] for one in shares) == 12
    assert {one["summary"]["left out for want of time"] for one in shares} == {0}
    late = spec.share(0, 1, 0.0)["summary"]
    assert late == {"passed": 1, "left out for want of time": 11}
    (tmp_path / "test_wrong.py").write_text("def test_t2_reference(): assert 1 + 1 == 3")
    monkeypatch.setattr(spec, "SUITE", tmp_path / "test_wrong.py")
    (failure,) = spec.share(0, 1, 60.0)["failures"]
    assert "test_t2_reference" in failure and "1 + 1" in failure
    (tmp_path / "test_wrong.py").write_text("import no_such_module")
    (failure,) = spec.share(0, 1, 60.0)["failures"]
    assert "no_such_module" in failure


def test_the_processes_of_the_spec_suite(load: Any, monkeypatch: Any) -> None:
    """What they found is added up, and one that ends without a word is a failure."""
    spec = load("gpu_spec")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3 * spec.MEMORY_EACH, 0))
    monkeypatch.setattr(spec.os, "cpu_count", lambda: 16)

    class Process:
        def __init__(self, command: list[str], env: Any) -> None:
            name, folder = (command[command.index(f"--{of}") + 1] for of in ("part", "out"))
            assert command[command.index("--seconds") + 1] == "9"
            self.code = -11 if name == "spec-1-3" else 0
            if not self.code:
                result = {"failures": [name], "summary": {"passed": 2}}
                Path(folder, f"{name}.part.json").write_text(json.dumps(result))

        def wait(self) -> int:
            return self.code

    monkeypatch.setattr(spec.subprocess, "Popen", Process)
    found = spec.spec(9.0)
    assert found["failures"] == ["spec-0-3", "spec-1-3 ended with -11", "spec-2-3"]
    assert found["summary"] == {"passed": 4}


def _wanted(models: Any, base: torch.Tensor, rule: Any) -> Any:
    out = torch.empty_like(base)
    return out, reference.ties(models, base, rule, out)


def _cut(full: Any) -> Any:
    return lambda shape, *more, **options: full((shape[0] & 1023,), *more, **options)


def test_too_little_time_is_no_failure(load: Any, on_the_host: Any, monkeypatch: Any) -> None:
    """It is said which comparisons and rows are missing."""
    correctness, speed = load("gpu_correctness"), load("gpu_speed")
    found = correctness.large(-1.0)
    assert found["failures"] == [] and "out of time before gaussian" in found["summary"]["stopped"]
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(speed, "ELEMENTS", 1 << 10)
    run = speed.Speed(-1.0, lambda result: None)
    speed._merges(run, {"cuda": KERNELS}, 1 << 8)
    assert run.result()["failures"] == []
    assert "out of time before float32, K=2" in run.result()["summary"]["stopped"]


def test_a_difference_is_a_failure(load: Any, on_the_host: Any, monkeypatch: Any) -> None:
    correctness = load("gpu_correctness")

    def wrong(models: Any, base: Any, rule: Any, out: torch.Tensor) -> Pending:
        found = ties(models, base, rule, out)
        out.view(-1)[:1] += 1
        return found

    failures: list[str] = []
    case = correctness.plain(100, 2, torch.float32)
    correctness.compare("cuda", SimpleNamespace(ties=wrong), case, failures)
    assert len(failures) == 1 and "1 of 100 elements" in failures[0]


def test_speed(load: Any, on_the_host: Any, monkeypatch: Any, tmp_path: Path) -> None:
    speed = load("gpu_speed")

    def once(call: Any, *_: Any) -> list[float]:
        call()
        return [2.0, 1.0, 3.0]

    monkeypatch.setattr(speed, "ELEMENTS", 1 << 10)
    monkeypatch.setattr(speed, "SMALL_TENSORS", 3)
    monkeypatch.setattr(speed, "device_times", once)
    monkeypatch.setattr(speed, "called", once)
    monkeypatch.setattr(speed, "captured", lambda call: call)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 0.005)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    kept: list[str] = []
    found = speed.speed(600.0, lambda result: kept.append(json.dumps(result)))
    assert found["failures"] == []
    assert json.loads(kept[0])["rows"]  # what there is is kept from the first row on
    check = load("gpu_check")
    check.write(tmp_path, {"machine": MACHINE, "sections": {"speed": found}, "failures": []})
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert len(rows) == len(found["rows"]) <= len(kept)
    assert {row["copy_gb_per_s"] for row in rows} == {"0.005"} and rows[0]["commit"] == "c"
    bars = {row["what"]: row["bar"] for row in rows if row["bar"]}
    for dtype in ("float32", "bfloat16"):
        for count, bar in ((2, 70), (4, 70), (8, 60)):
            assert bars[f"ties {dtype} K={count}"] == f"{bar} % of copy"
            assert bars[f"known {dtype} K={count}"] == "90 % of copy"
    assert bars["3 small as called"] == "10 times"
    assert bars["rivals: torch.compile"] == "5 times"
    for name in ("peft", "mergekit"):
        if importlib.util.find_spec(name) is not None:
            assert bars[f"rivals: {name}"] == "20 times"
    judged = [row["met"] for row in rows if row["bar"]]
    assert found["summary"]["bars met"] == f"{judged.count('True')} of {len(judged)}"


def test_a_step_that_fails_leaves_the_others(load: Any, on_the_host: Any, monkeypatch: Any) -> None:  # fmt: skip
    speed = load("gpu_speed")
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1.0)

    def fails(run: Any, usable: Any, n: int) -> None:
        raise RuntimeError("an illegal memory access")

    for step in ("_small", "_merges", "_rivals"):
        monkeypatch.setattr(speed, step, fails if step != "_merges" else _one_row)
    found = speed.speed(5.0, lambda result: None)
    assert len(found["failures"]) == 2 and len(found["rows"]) == 1
    assert "illegal memory access" in found["failures"][0]


def _one_row(run: Any, usable: Any, n: int) -> None:
    run.add("one", "cuda", [1.0], 100)


def test_times_leave_out_what_the_host_takes(load: Any, monkeypatch: Any) -> None:
    """The device is held while an event and the call are put behind each other; before, it is kept
    busy for a while.
    """
    speed = load("gpu_speed")
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, after: Any) -> float:
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("held"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    begin = time.monotonic()
    assert speed.device_times(lambda: order.append("call"), 2, 1.0, warm=0.2) == [0.5, 0.5]
    assert time.monotonic() - begin >= 0.2
    one = ["held", "event", "call", "event", "wait"]
    assert order[-10:] == one * 2 and order[:-10] == ["call"] * (len(order) - 10)
    assert order.count("call") >= 3 + 2


def test_a_replay_that_differs_and_what_fails_are_said_and_not_timed(load: Any, on_the_host: Any, monkeypatch: Any) -> None:  # fmt: skip
    speed = load("gpu_speed")

    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    def graph(call: Any) -> Any:
        held = call.args[3] if call.func is ties else None
        return lambda: (call(), held is not None and held[:1].add_(1))

    fails = SimpleNamespace(__name__="fails", ties=out_of_memory, ties_many=out_of_memory)
    monkeypatch.setattr(speed, "backends", lambda: {"fails": fails, "cuda": KERNELS})
    monkeypatch.setattr(speed, "ELEMENTS", 1 << 10)
    monkeypatch.setattr(speed, "SMALL_TENSORS", 3)
    monkeypatch.setattr(speed, "device_times", lambda *_: [1.0])
    monkeypatch.setattr(speed, "called", lambda call, *_: (call(), [1.0])[1])
    monkeypatch.setattr(speed, "captured", graph)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = speed.speed(600.0, lambda result: None)
    assert "fails, float32 K=2: RuntimeError: out of memory" in found["failures"]
    replay = "RuntimeError: a replay leaves 1 elements other than the call does"
    assert f"cuda, bfloat16 K=8: {replay}" in found["failures"]
    measured = {(row["what"], row["backend"]) for row in found["rows"]}
    assert ("3 small", "cuda") in measured and ("rivals: ties 2^8", "cuda") in measured
    assert not any(what.startswith(("ties", "known", "linear")) for what, _ in measured)


def test_peft_merges_where_the_tensors_are(monkeypatch: Any) -> None:
    from pymerge.bench import cases, peers

    utils = pytest.importorskip("peft.utils.merge_utils")
    seen: list[Any] = []

    def merge(deltas: Any, weights: torch.Tensor, density: float) -> torch.Tensor:
        seen.append((weights.device.type, weights.dtype))
        return deltas[0]

    monkeypatch.setattr(utils, "ties", merge)
    tensors = [torch.ones(4, dtype=torch.bfloat16, device="meta") for _ in range(4)]
    peers.available("ties")["peft"](cases.Tensors(tensors[:2], tensors[2], tensors[3]))
    assert seen == [("meta", torch.bfloat16)]


@pytest.mark.slow
def test_merges_of_folders(load: Any, on_the_host: Any, monkeypatch: Any, tmp_path: Path) -> None:
    engine = load("gpu_engine")
    made = SimpleNamespace(total_memory=1 << 30)
    monkeypatch.setattr(engine, "SIZES", [50, 3, 700, 20_001])
    monkeypatch.setattr(engine, "SPEED_ELEMENTS", 1000)
    monkeypatch.setattr(engine, "SOLVED", [(24, 16), (16, 24)])
    monkeypatch.setattr(engine, "bus_bandwidth", lambda: (10.0, 9.0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: made)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    sizes = DeviceSizes(in_buffer=1 << 16, out_buffer=1 << 16)
    gpu = HostDevice("any", sizes=sizes)
    monkeypatch.setattr("pymerge.engine.merge.open_device", lambda index: gpu)
    found = engine.engine(300.0, lambda result: None)
    # The host's memory does not run out.
    assert len(found["failures"]) == 1 and "memory did not run out" in found["failures"][0]
    assert found["summary"]["compared"] == 2 * len(engine.OPTIONS) * 3
    assert found["summary"]["solved"] == 2 * 3
    assert [row["backend"] for row in found["rows"]] == ["cuda", "cuda", "cpu"]
    assert found["bus_gb_per_s"] == {"to the device": 10.0, "to the host": 9.0}


def test_mats(load: Any, on_the_host: Any, monkeypatch: Any) -> None:
    mats = load("gpu_mats")
    monkeypatch.setattr(mats, "LARGE", [(24, 16)])
    monkeypatch.setattr(mats, "SMALL", [(16, 48)])
    monkeypatch.setattr(mats, "STACKS", [(2, 4, 3), (1, 1, 8)])
    found = mats.mats(60.0, lambda result: None)
    assert found["failures"] == []
    bars = [row["bar"] for row in found["rows"] if "bar" in row]
    assert bars == ["80 % of the rate", "10 times", "50 times"]
    updates = [row["backend"] for row in found["rows"] if "updates" in row["what"]]
    assert updates == [x for x in ("cpu", "reference") if registry.why_not(x) is None]
    small = [(row["what"], row["backend"]) for row in found["rows"] if "small" in row["what"]]
    assert small == [(f"cg small {x}", "by launches") for x in ("2 of 4x3", "1 of 1x8")]


def test_small_layers_by_cuda(load: Any, on_the_host: Any, emulated_cuda: Any, monkeypatch: Any) -> None:  # fmt: skip
    mats, correctness = load("gpu_mats"), load("gpu_correctness")
    for name in ("LARGE", "SMALL"):
        monkeypatch.setattr(mats, name, [])
    monkeypatch.setattr(mats, "STACKS", [(2, 6, 5)])
    found = mats.mats(60.0, lambda result: None)
    assert [row["backend"] for row in found["rows"]] == ["cuda", "by launches"]
    # The sanitizer's run goes over such layers too.
    sanitizer = load("gpu_sanitizer")
    monkeypatch.setattr(correctness, "compare", lambda *_: None)
    monkeypatch.setattr(correctness, "GUESSED", [0, 0])
    monkeypatch.setattr(sanitizer, "LAYERS", [(2, 2, 5), (1, 6, 5)])
    assert sanitizer.sanitized(0.0)["failures"] == []

    plain = small_layers.solve

    def wrong(*given: Any) -> Any:
        state = plain(*given)
        state.step[-1, -1, -1] *= 1.01
        return state

    monkeypatch.setattr(small_layers, "solve", wrong)
    (failure,) = mats.mats(60.0, lambda result: None)["failures"]
    assert "small (2, 6, 5)" in failure and "nothing was timed" in failure
    assert len(sanitizer.sanitized(0.0)["failures"]) == 2


def test_updates_that_are_wrong_are_not_timed(load: Any, on_the_host: Any, monkeypatch: Any) -> None:  # fmt: skip
    mats = load("gpu_mats")
    monkeypatch.setattr(mats, "LARGE", [(24, 16)])
    monkeypatch.setattr(mats, "SMALL", [])
    monkeypatch.setattr(mats, "STACKS", [])

    class Wrong(VectorUpdates):
        def turn(self, z: torch.Tensor) -> None:
            super().turn(z * 1.01)

    monkeypatch.setattr(mats, "vector_updates", lambda *_: Wrong)
    (failure,) = mats.mats(60.0, lambda result: None)["failures"]
    assert "updates (24, 16)" in failure and "nothing was timed" in failure


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_are_compiled_by_several_processes(load: Any, monkeypatch: Any, tmp_path: Path) -> None:  # fmt: skip
    from triton.backends.compiler import GPUTarget

    from pymerge.triton_kernels import aot

    ahead = load("gpu_compile")
    # Of what the sections ask for, the first recorded requests; then a small one alone, which two
    # processes share.
    first = list(itertools.islice(ahead._mine(0, 1), 30))
    assert {"merge_sampled", "merge_chunks", "count_digits"} <= {one.kernel.__name__ for one in first}  # fmt: skip
    assert len({aot.variant(one) for one in first}) == 30
    _draws_are_recorded_without_their_numbers(ahead, monkeypatch)
    small = [ahead._request(1000, 2, torch.float32)]
    monkeypatch.setattr(ahead, "requests", lambda: iter([small, small]))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert ahead.run(GPUTarget("cuda", 90, 32), 132, 60.0, 2) == 2
    made = sorted(path.stem for path in tmp_path.glob("*/*.cubin"))
    assert made == ["merge_chunks", "select_small"]


def _draws_are_recorded_without_their_numbers(ahead: Any, monkeypatch: Any) -> None:
    from pymerge.triton_kernels import aot
    from pymerge.triton_kernels import ties as kernels

    def variants() -> list[Any]:
        cases = [ahead._of(ahead.draw(seed, [0, 3, 777, 40_001], [1, 3, 8])) for seed in range(60)]
        calls = [aot.launches(lambda case=case: kernels.ties_many([case])) for case in cases]
        return [[aot.variant(launch) for launch in call] for call in calls]

    wanted = variants()
    with monkeypatch.context() as patched:
        patched.setattr(ahead.gpu_cases, "_tensors", ahead.blank)
        assert variants() == wanted and sum(map(len, wanted)) > 100


# The frame: processes, files, the table.


def test_a_process_that_does_not_end_is_ended_with_its_children(load: Any, tmp_path: Path) -> None:
    check = load("gpu_check")
    child = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c',"
        f" {child!r}])"
    )
    begin = time.monotonic()
    command = [sys.executable, "-c", code]
    assert check.run_process("one", command, tmp_path, 2.0) == (124, "begun\n")
    assert time.monotonic() - begin < 30
    assert check.run_process("two", [sys.executable, "-c", "print(2)"], tmp_path, 60) == (0, "2\n")
    assert (tmp_path / "check.log").read_text() == "--- one\nbegun\n--- two\n2\n"


@pytest.mark.parametrize("status", [0, 1, -11, 124])
def test_what_a_section_had_is_kept(load: Any, monkeypatch: Any, tmp_path: Path, status: int) -> None:  # fmt: skip
    check = load("gpu_check")

    def run(name: str, command: list[str], out: Path, seconds: float, **_: Any) -> tuple[int, str]:
        (tmp_path / "speed.part.json").write_text(json.dumps({"failures": [], "rows": [{"a": 1}]}))
        return status, "what it printed"

    monkeypatch.setattr(check, "run_process", run)
    found = check.run_section("speed", 5.0, tmp_path)
    assert found["rows"] == [{"a": 1}] and len(found["failures"]) == (status != 0)
    assert not status or "what it printed" in found["failures"][0]
    assert not (tmp_path / "speed.part.json").exists()


def test_the_commit_of_a_tree_without_history(load: Any, monkeypatch: Any) -> None:
    check = load("gpu_check")
    made = SimpleNamespace(name="any", major=9, minor=0, multi_processor_count=1, total_memory=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: made)
    monkeypatch.setenv("COMMIT", "abcdef0")
    for printed, commit in (("1234567\n", "1234567"), ("", "abcdef0")):
        monkeypatch.setattr(check, "output", lambda command, printed=printed: printed)
        assert check.describe()["commit"] == commit


def test_the_table(load: Any, capsys: Any, tmp_path: Path) -> None:
    check = load("gpu_check")
    rows = [
        {"what": "known", "backend": "cuda", "ms_p50": 1.5, "gb_per_s": 3000.0, "percent_of_copy": 88.8,
         "bar": "90 % of copy", "met": False, "note": "held"},
        {"what": "rivals: peft", "backend": "peft", "ms_p50": None, "note": "not installed"},
    ]  # fmt: skip
    sections = {
        "build": {"ok": True, "seconds": 5.0, "arch": "sm_90"},
        "speed": {"rows": rows, "copy_gb_per_s": 4300.0, "summary": {"rows": 2}, "seconds": 9.0},
        "engine": {"bus_gb_per_s": {"to the device": 55.0}, "summary": {}},
    }
    report = {"machine": MACHINE, "sections": sections, "failures": ["speed: one"], "seconds": 20.0}
    check.write(tmp_path, report)
    assert json.loads((tmp_path / "check.json").read_text())["sections"]["speed"]["rows"][0]["met"] is False  # fmt: skip
    check.show(report)
    printed = capsys.readouterr().out
    for text in ("4300 GB/s", "55.0 GB/s", "90 % of copy: MISSED; held", "FAILED speed: one", "not installed"):  # fmt: skip
        assert text in printed
    assert printed.splitlines()[-1] == "1 failures"


def test_the_build_needs_no_recent_setuptools(load: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """It is run where no pyproject.toml is, and puts the extension into the tree."""
    check = load("gpu_check")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    (tmp_path / "out").mkdir()
    setup = (BENCHMARKS.parent / "setup.py").read_text().split("class NinjaBuild")[0]
    setup += """
class NinjaBuild(build_ext):
    def build_extension(self, ext):
        print("target", self.get_ext_fullpath(ext.name), arch_flags())

setup(name="x", ext_modules=[Extension("pymerge._C", ["a.cu"])], cmdclass={"build_ext": NinjaBuild})
"""
    (tmp_path / "setup.py").write_text(setup)
    (tmp_path / "pyproject.toml").write_text("[project]\nlicense = 3\n")  # not valid in any version
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.build(tmp_path / "out", 60.0)["ok"]
    log = (tmp_path / "out/check.log").read_text()
    assert f"target {tmp_path}/pymerge/_C." in log and "arch=compute_90,code=sm_90" in log


@pytest.mark.slow
def test_the_build_needs_no_ninja(tmp_path: Path) -> None:
    """Everything is compiled, then linked; a compiler that fails ends the build."""
    setup = (BENCHMARKS.parent / "setup.py").read_text().replace("import ninja", "import no_such_ninja")  # fmt: skip
    (tmp_path / "setup.py").write_text(setup)
    (tmp_path / "README.md").write_bytes((BENCHMARKS.parent / "README.md").read_bytes())
    for name in ("csrc/cpu/two", "pymerge", "bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "csrc/cpu/two/two.cpp").write_text("int two() { return 2; }\n")
    body = "#include <pybind11/pybind11.h>\nint two();\nPYBIND11_MODULE(_C, m) { m.attr(\"two\") = two(); }\n"  # fmt: skip
    (tmp_path / "csrc/bindings.cpp").write_text(body)
    for tool in ("c++", "g++", "as", "ld"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    env = {**os.environ, "PATH": str(tmp_path / "bin"), "PYMERGE_CUDA": "0", "PYTHONPATH": str(tmp_path)}  # fmt: skip
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import pymerge._C as c; assert c.two == 2"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    (tmp_path / "csrc/cpu/two/two.cpp").write_text("int two() {")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "building pymerge._C failed" in done.stderr


def test_without_a_gpu_or_with_a_section_unknown(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", "speeed"], capture_output=True, text=True)
    assert done.returncode == 2 and "speeed: not among build,compile" in done.stderr
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "no CUDA device is visible" in done.stdout


def test_the_tree_need_not_be_installed() -> None:
    """On a bare machine pymerge.triton_kernels is the folder beside the package."""
    code = f"""
import sys
sys.meta_path = [m for m in sys.meta_path if "editable" not in repr(m).lower()]
sys.path = [p for p in sys.path if "editable" not in p and p]
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_check
gpu_check.use_tree()
import pymerge.triton_kernels.aot, gpu_compile, gpu_correctness, gpu_speed, gpu_spec, gpu_engine, gpu_mats
import pathlib
assert pathlib.Path(pymerge.triton_kernels.aot.__file__).is_relative_to({str(BENCHMARKS.parent)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=BENCHMARKS)
