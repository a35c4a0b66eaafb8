"""`pymerge bench --device cuda` without a device: emulated kernels, and a clock and graphs of the
test's own.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pymerge import bench
from pymerge.backends import cuda, registry
from pymerge.bench import device_ops, places


class Fake:
    """torch.cuda as far as `places` asks: a clock that the test sets, graphs that run their call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.took = 1.0
        self.spoils: torch.Tensor | None = None  # what a replay leaves other than the call
        self.graph: Any = None
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.order.append("event")

            def synchronize(self) -> None:
                fake.order.append("wait")

            def elapsed_time(self, after: Any) -> float:
                return fake.took

        class Graph:
            call: Callable[[], object]

            def replay(self) -> None:
                self.call()
                if fake.spoils is not None:
                    fake.spoils.view(-1)[:1] += 1

        @contextlib.contextmanager
        def graph(made: Graph) -> Any:
            fake.graph = made
            yield
            fake.graph = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        properties = SimpleNamespace(name="Fake 1", major=9, minor=0, total_memory=1 << 30)
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "Stream": lambda *_: stream,
            "current_stream": lambda *_: stream,
            "stream": lambda *_: contextlib.nullcontext(),
            "synchronize": lambda *_: None,
            "set_device": lambda *_: None,
            "_sleep": lambda cycles: fake.order.append("held"),
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "mem_get_info": lambda *_: (1 << 30, 1 << 30),
            "get_device_properties": lambda *_: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def capturing(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call, which a graph that is being captured keeps."""

        def called() -> object:
            if self.graph is not None:
                self.graph.call = call
            return call()

        return called


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(monkeypatch)
    plain = places.recorded
    monkeypatch.setattr(places, "recorded", lambda call, out: plain(made.capturing(call), out))
    monkeypatch.setattr(places, "WARM", 0.0)
    return made


class OnHost(places.Gpu):
    def __init__(self, index: int) -> None:
        assert index == 0
        self.device = torch.device("cpu")


@pytest.fixture
def gpu(fake: Fake, emulated_cuda: None, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(places, "Gpu", OnHost)
    monkeypatch.setattr(device_ops, "SMALL_TENSORS", 4)
    monkeypatch.setattr(device_ops, "SMALL_SIZES", (7, 100))
    monkeypatch.setattr(device_ops, "LAYER", (24, 40))
    return fake


COMMAND = ["--device", "cuda", "--backend", "cuda", "--repeats", "3", "--size", "3000"]


def test_rows_of_a_gpu(gpu: Fake, tmp_path: Path) -> None:
    out = str(tmp_path / "speed")
    bench.main([*COMMAND, "--models", "2,3", "--family", "fp32,bf16-light", "--out", out])
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    found = {(r["op"], r["merge"], r["family"], r["models"], r["n"]) for r in rows}
    large = {
        (op, "ties", family, count, "3000")
        for op in ("ties", "thresholds known")
        for family in ("fp32", "bf16-light")
        for count in "23"
    }
    others = {("4 small", "ties", "bf16-spread", "4", "214"), ("cg updates", "mats", "fp32", "1", "960")}  # fmt: skip
    assert found == large | others and len(rows) == 10
    first = rows[0]
    assert (first["gpu"], first["compute_capability"], first["backend"]) == (
        "Fake 1",
        "9.0",
        "cuda",
    )
    assert float(first["ms_p50"]) == 1 and float(first["percent_of_copy"]) == 100
    assert json.loads((tmp_path / "speed.json").read_text())["machine"]["gpu"] == "Fake 1"


def test_columns_of_the_cpu_are_the_same_but_for_the_device(gpu: Fake, tmp_path: Path) -> None:
    options = ["--models", "2", "--family", "fp32", "--repeats", "1", "--size", "3000"]
    bench.main([*options, "--out", str(tmp_path / "cpu")])
    bench.main([*options, "--device", "cuda", "--backend", "cuda", "--out", str(tmp_path / "gpu")])
    cpu, on_gpu = (next(csv.reader((tmp_path / f"{k}.csv").open())) for k in ("cpu", "gpu"))
    assert on_gpu[: len(cpu)] == cpu
    assert on_gpu[len(cpu) :] == ["gpu", "compute_capability", "gpu_gib", "driver", "cuda"]


@pytest.mark.parametrize("op", ["ties", "ties_many"])
def test_what_differs_from_the_reference_is_not_timed(gpu: Fake, monkeypatch: Any, op: str) -> None:
    plain = getattr(cuda, op)

    def wrong(*jobs: Any) -> Any:
        stats = plain(*jobs)
        out = jobs[3] if op == "ties" else jobs[0][-1][3]
        out.view(-1)[-1:] += 1
        return stats

    monkeypatch.setattr(cuda, op, wrong)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' differs from the reference .* nothing"):
        bench.run([3000], [2], ["fp32"], ["ties"], 1, "cuda", place=OnHost(0))


def test_vector_updates_that_differ_are_not_timed(gpu: Fake, monkeypatch: Any) -> None:
    class Wrong(registry.load("cg", "cuda")):
        def advance(self, q: torch.Tensor) -> None:
            super().advance(q * 1.01)

    monkeypatch.setattr(registry, "vector_updates", lambda device, backend: Wrong)
    with pytest.raises(RuntimeError, match="differs from plain torch by"):
        list(device_ops._updates(OnHost(0), "cuda", 1))


def test_a_replay_that_differs_is_not_timed(fake: Fake) -> None:
    out = torch.zeros(5)
    fake.spoils = out
    with pytest.raises(RuntimeError, match="a replay leaves 1 elements other than the call does"):
        OnHost(0).alternate(lambda: out.fill_(2), lambda: None, 3, out=out)


def test_the_clock_is_that_of_the_device(fake: Fake) -> None:
    """It is held while an event and the call are put behind each other; the copy in turn."""
    calls = fake.order.append
    timing = OnHost(0).alternate(lambda: calls("call"), lambda: calls("copy"), 3)
    one = [["held", "event", what, "event", "wait"] for what in ("call", "copy")]
    assert fake.order[-30:] == [*one[0], *one[1]] * 3
    assert (timing.p50, timing.copy_ms) == (1.0, 1.0)
    assert fake.order[:-30] == ["call", "copy"] * 2  # warm


def test_the_copy_moves_as_many_bytes() -> None:
    moved = OnHost(0).copy_of(1000)()
    assert isinstance(moved, torch.Tensor) and 2 * moved.nbytes == 1000


def test_devices_that_are_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    for device, words in (
        ("cuda:3", "--device cuda:3 is not there: torch sees 0 CUDA devices"),
        ("gpu", "'gpu' is not one of 'cpu', 'cuda', 'cuda:1'"),
        ("auto", "'auto' is not one of"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            bench.main(["--device", device])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda", "--cache"])
    assert "is for a core of the CPU" in capsys.readouterr().err


def test_memory_is_that_of_the_gpu(gpu: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda", "--size", "16M", "--models", "8"])
    assert "take 2 GB and this GPU has 1 GB of memory" in capsys.readouterr().err


def test_measurements_are_not_lost_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr("subprocess.run", missing)
    monkeypatch.setenv("COMMIT", "abc")
    assert bench.describe_machine()["commit"] == "abc"
