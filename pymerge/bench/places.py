"""Where `pymerge bench` runs: tensors, the copy that a kernel is measured against, and clocks.

On a GPU a call is recorded as a CUDA graph and its replays are timed by events while the device is
held busy, so that neither Python nor a launch from the host counts.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from pymerge.backends import native
from pymerge.bench import timing
from pymerge.bench.cases import Tensors
from pymerge.bench.timing import Timing

# Cycles that the device is held while the host puts an event and a call behind them: 0.1 ms at 2
# GHz, some ten launches of a graph.
HELD = 200_000
WARM = 0.05  # seconds of calls before the first that counts: an idle device runs at a low clock


class Place(Protocol):
    device: torch.device

    def copy(self, tensors: Tensors) -> Callable[[], object]:
        """Moving the bytes that a merge of the tensors moves, as fast as we know how."""

    def alternate(
        self,
        function: Callable[[], object],
        copy: Callable[[], object],
        repeats: int,
        budget_s: float = 20.0,
        *,
        out: torch.Tensor | None = None,
    ) -> Timing:
        """Times of `function`, with those of `copy` measured in turn. out: what it writes, where it
        may be recorded.
        """

    def describe(self) -> dict[str, Any]:
        """The columns of the results that say what it is, beside those of the machine."""


class Host:
    """The CPU, by the wall clock."""

    device = torch.device("cpu")

    def copy(self, tensors: Tensors) -> Callable[[], object]:
        """K + 1 reads to one write."""
        everything = (*tensors.models, tensors.base)
        narrow = tensors.n * min(t.element_size() for t in (*everything, tensors.out))
        out, rest = tensors.out.data_ptr(), tensors.n * tensors.out.element_size() - narrow
        wide = [t.data_ptr() + narrow for t in everything if t.nbytes > narrow]

        def copy() -> None:
            native.copy([t.data_ptr() for t in everything], out, narrow, torch.get_num_threads())
            if rest:  # of a base and an output that are wider than the models
                native.copy(wide, out + narrow, rest, torch.get_num_threads())

        return copy

    def alternate(
        self,
        function: Callable[[], object],
        copy: Callable[[], object],
        repeats: int,
        budget_s: float = 20.0,
        *,
        out: torch.Tensor | None = None,
    ) -> Timing:
        return timing.alternate(function, copy, repeats, budget_s)

    def describe(self) -> dict[str, Any]:
        return {}


class Gpu:
    """A GPU as torch sees it, by events on the current stream."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)

    def copy(self, tensors: Tensors) -> Callable[[], object]:
        """Half of the bytes read, half written."""
        return self.copy_of(tensors.bytes)

    def copy_of(self, nbytes: int) -> Callable[[], object]:
        source = torch.zeros(max(nbytes // 2, 1), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def alternate(
        self,
        function: Callable[[], object],
        copy: Callable[[], object],
        repeats: int,
        budget_s: float = 20.0,
        *,
        out: torch.Tensor | None = None,
    ) -> Timing:
        call = function if out is None else recorded(function, out)
        begin = time.monotonic()
        for done in itertools.count():
            if done >= 2 and time.monotonic() - begin >= WARM:
                break
            for each in (call, copy):
                each()
            torch.cuda.synchronize()
        times: list[list[float]] = [[], []]
        begin = time.monotonic()
        while len(times[0]) < repeats and (
            len(times[0]) < 3 or time.monotonic() - begin < budget_s
        ):
            for target, each in zip(times, (call, copy), strict=True):
                target.append(milliseconds(each))
        p20, p50, p80 = np.percentile(times[0], [20, 50, 80])
        return Timing(float(p20), float(p50), float(p80), float(np.median(times[1])))

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call on the device. On an idle stream the host's own time for it would lie between the
    events.
    """
    event: Any = torch.cuda.Event
    before, after = event(enable_timing=True), event(enable_timing=True)
    torch.cuda._sleep(HELD)  # type: ignore[no-untyped-call]
    before.record()
    call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def recorded(call: Callable[[], object], out: torch.Tensor) -> Callable[[], None]:
    """The call as a replay of its CUDA graph; RuntimeError unless that leaves the bits in `out`
    that the call does.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # what is compiled or allocated at first is no part of the graph
            call()
    torch.cuda.current_stream().wait_stream(side)
    want = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    out.fill_(float("nan"))
    graph.replay()
    if not torch.equal(out, want):
        raise RuntimeError(
            f"a replay leaves {int((out != want).sum())} elements other than the call does; nothing"
            " is timed"
        )

    def replay() -> None:
        graph.replay()
        _ = held  # what the capture returned keeps the graph's memory

    return replay


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0]
