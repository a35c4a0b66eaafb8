"""Tensors on several devices, and counts that are read on another stream than the kernels'."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ties_cases import family

import pymerge
from pymerge.backends import cpu, cuda, registry
from pymerge.backends.placement import Passed, device_of
from pymerge.rules.ties import resolve_options


def there(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
@pytest.mark.parametrize("others", [("cuda:0", "cuda:1"), ("cpu", "cuda:0")])
def test_thresholds_over_several_devices_are_refused(backend: str, others: Any) -> None:
    """As of a state dict that is split over two: no kernel gets addresses of both."""
    if backend == "triton":
        pytest.importorskip("triton")
    select = registry.load("select", backend)
    one, two = others
    segments = [([there(one)], there(one)), ([there(two)], there(two))]
    with pytest.raises(
        ValueError, match=f"are on {one} and {two}, .*move them to one, or pass scope"
    ):
        select(segments, [1])
    with pytest.raises(ValueError, match=f"are on {one} and {two}"):
        select([([there(one), there(two)], None)], [1, 1])


class Elsewhere(torch.Tensor):
    """A tensor that says that it lies on another device."""

    device = torch.device("cuda:1")


def test_state_dicts_on_two_devices_say_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which would refuse it for what it says of itself.
    monkeypatch.setattr("pymerge.ops.memory._why_misleading", lambda *_: "")
    here = {"a": torch.ones(3), "b": torch.ones(3).as_subclass(Elsewhere)}
    with pytest.raises(ValueError, match=r"are on cpu and cuda:1, .*pass scope='tensor'"):
        pymerge.select([here], here, scope="model")


def test_the_one_device() -> None:
    assert (
        device_of([([there("cuda:1")] * 2, None), ([there("cuda:1")], there("cuda:1"))]).index == 1
    )
    assert device_of([]).type == "cpu"


class Stream:
    """Says what is put on it, in `order`."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def wait_event(self, event: Any) -> None:
        self.order.append(f"{self.name} waits for {event.of}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.cuda with a current stream for each device, and what was put there."""
    made = SimpleNamespace(order=[], capturing=False, current={}, entered=[])

    class Event:
        of = ""

        def record(self, stream: Stream) -> None:
            self.of = stream.name
            made.order.append(f"event on {stream.name}")

    @contextlib.contextmanager
    def entered(device: torch.device) -> Any:
        made.entered.append(device)
        yield

    def current(device: torch.device) -> Stream:
        return Stream(made.current[device.index], made.order)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    return made


def test_what_is_read_waits_for_the_stream_of_the_call(gpu: Any) -> None:
    gpu.current = {0: "other", 1: "first"}
    device = torch.device("cuda", 1)
    passed = Passed(device)
    gpu.current = {0: "other", 1: "second"}
    passed.hold()
    assert gpu.order == ["event on first", "second waits for first"]
    assert gpu.entered == [device]  # what is captured there counts, not on the current device


def test_a_capture_takes_no_event(gpu: Any) -> None:
    gpu.current, gpu.capturing = {0: "first"}, True
    Passed(torch.device("cuda", 0)).hold()
    Passed(torch.device("cpu")).hold()
    assert gpu.order == []


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_counts_are_read_behind_the_kernels(backend: str) -> None:
    rule = resolve_options(1, trim="none").rule(4)
    words = torch.zeros(1, 7, dtype=torch.int64)
    written = SimpleNamespace(hold=lambda: words.add_(3))  # what the kernels do meanwhile
    if backend == "cuda":
        pending: Any = cuda.PendingStats(cuda._Counts(words, written), 0, rule)
    else:
        pytest.importorskip("triton")
        from pymerge.triton_kernels.ties import _api

        row = torch.zeros(0, dtype=torch.int64)
        pending = _api.DeviceStats(rule, 32, row, words[:, :5], written)
    stats = pending.resolve()
    assert stats.kept == (3,) and stats.conflicts == 3


def test_the_event_is_behind_the_launches(
    emulated: Any, emulated_cuda: None, monkeypatch: Any
) -> None:
    launched: list[int] = []
    monkeypatch.setattr(cuda, "Passed", lambda device: launched.append(emulated.launches()))
    models, base = family(3000, 2)
    emulated.launches()
    cuda.ties(models, base, resolve_options(2).rule(3000), torch.empty_like(base))
    assert len(launched) == 1 and launched[0] > 0


def test_a_list_without_tensors() -> None:
    assert cpu.select([], []) == []
