"""The part of gpu_check.py that measures: shares of the copy bandwidth of the same run, and other
implementations.

Device time is that of replays of a CUDA graph, each put on the stream while the device is held
busy, so that neither Python nor the launch of the graph counts; rows "as called" are calls in a row
from Python. Every row is gated on the bits of the reference first, and what a graph leaves on those
of a call.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gpu_correctness
import torch
from gpu_cases import same_bits
from gpu_correctness import backends, tensors

from pymerge.reference import ties as reference
from pymerge.rules.ties import resolve_options

DENSITY = 0.2
ELEMENTS = 1 << 26
SMALL_TENSORS = 300


# What is asked of the kernels at n = 2^26 on an H100 or H200: percent of the copy bandwidth, or
# times as fast as another.
KNOWN_BAR, WHOLE_BAR = 90.0, {2: 70.0, 4: 70.0, 8: 60.0}
SMALL_BAR, COMPILE_BAR, PEER_BAR = 10.0, 5.0, 20.0

Keep = Callable[[dict[str, Any]], None]


class Speed:
    """The rows measured so far, and the copy bandwidth that they are measured against. keep: told
    after every row.
    """

    def __init__(self, seconds: float, keep: Keep) -> None:
        self.end = time.monotonic() + seconds
        self._keep = keep
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.stopped = ""  # what the time did not suffice for, which is no failure
        self.copy_gb_per_s = copy_bandwidth()

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(
        self,
        what: str,
        backend: str,
        times: Sequence[float],
        nbytes: int | None = None,
        note: str = "",
        bar: float | None = None,
    ) -> float:
        """Enter a row; times in ms, bar in percent of the copy bandwidth. Returns the median."""
        ordered = sorted(times)
        p20, p50, p80 = (
            ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8)
        )
        row: dict[str, Any] = {
            "what": what,
            "backend": backend,
            "ms_p20": p20,
            "ms_p50": p50,
            "ms_p80": p80,
        }
        if nbytes:
            row["gb_per_s"] = nbytes / p50 / 1e6
            row["percent_of_copy"] = 100 * row["gb_per_s"] / self.copy_gb_per_s
        if bar is not None:
            row |= {"bar": f"{bar:.0f} % of copy", "met": row["percent_of_copy"] >= bar}
        self.rows.append({**row, "runs": len(times), "note": note})
        self._keep(self.result())
        return p50

    def compare(self, note: str, times: float | None = None, bar: float | None = None) -> None:
        """Say of the last row what it is beside another, and whether that is enough."""
        self.rows[-1]["note"] = note
        if times is not None and bar is not None:
            self.rows[-1] |= {"bar": f"{bar:.0f} times", "met": times >= bar}
        self._keep(self.result())

    def result(self) -> dict[str, Any]:
        shares = [row["percent_of_copy"] for row in self.rows if row.get("percent_of_copy")]
        judged = [row["met"] for row in self.rows if "met" in row]
        return {
            "failures": self.failures,
            "copy_gb_per_s": self.copy_gb_per_s,
            "rows": self.rows,
            "summary": {
                "rows": len(self.rows),
                "bars met": f"{sum(judged)} of {len(judged)}",
                "percent of copy": [round(min(shares), 1), round(max(shares), 1)] if shares else [],
                **({"stopped": self.stopped} if self.stopped else {}),
            },
        }


def speed(seconds: float, keep: Keep) -> dict[str, Any]:
    """All rows; `keep` is told as they come, so that what was measured outlives a fault."""
    run = Speed(seconds, keep)
    usable = {name: module for name, module in backends().items() if not isinstance(module, str)}
    free, _ = torch.cuda.mem_get_info()
    n = ELEMENTS if free > 12 << 30 else ELEMENTS // 4
    for step in (_small, _merges, _rivals):
        try:
            step(run, usable, n)
        except Exception as error:
            run.failures.append(f"{step.__name__}: {type(error).__name__}: {str(error)[-1500:]}")
        torch.cuda.empty_cache()
    return run.result()


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written; the best of a few, as little else
    could be.
    """
    free, _ = torch.cuda.mem_get_info()
    size = min(1 << 30, free // 4)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=gpu_correctness.DEVICE)
    target = torch.empty_like(source)
    times = device_times(lambda: target.copy_(source), 20, 5.0, warm=1.0)
    return 2 * size / min(times) / 1e6


# Cycles that the device is held while the host puts an event and a call behind them: 0.1 ms at 2
# GHz, some ten launches of a graph.
HELD = 200_000


def device_times(
    call: Callable[[], Any], repeats: int, budget: float, warm: float = 0.05
) -> list[float]:
    """Milliseconds of single calls, by events on the current stream, after as many as `warm`
    seconds take: an idle device runs at a fraction of its clock. On an idle stream the host's own
        time for the call would lie between the events.
    """
    begin = time.monotonic()
    for done in itertools.count():
        if done >= 3 and time.monotonic() - begin >= warm:
            break
        call()
        torch.cuda.synchronize()
    times: list[float] = []
    begin = time.monotonic()
    while len(times) < repeats and (len(times) < 3 or time.monotonic() - begin < budget):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HELD)
        before.record()
        call()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return times


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a replay of its CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        held = call()

    def replay() -> None:
        recorded.replay()
        _ = held  # what the capture returned keeps the graph's memory

    return replay


def called(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds a call where calls follow each other without waiting, from Python."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin) / repeats)
    return times


def _merges(run: Speed, usable: dict[str, Any], n: int) -> None:
    """The whole op and the pass with thresholds known, K = 2, 4, 8, fp32 and bf16."""
    for kind, dtype in (
        ("gaussian", torch.float32),
        ("gaussian", torch.bfloat16),
        ("ulps", torch.bfloat16),
    ):
        label = f"{str(dtype).removeprefix('torch.')}{' ulps' if kind == 'ulps' else ''}"
        all_models, base = tensors(kind, n, 8, dtype, 1)
        out = torch.empty_like(base)
        for count in (2, 4, 8):
            if run.left() < 20:
                run.stopped = f"out of time before {label}, K={count}; give more --minutes"
                return
            models = all_models[:count]
            for name, module in usable.items():
                if kind == "ulps" and count == 8:
                    continue
                with _by_itself(run, f"{name}, {label} K={count}"):
                    _merge(run, name, module, models, base, out, label)
        if kind == "gaussian":
            _linear(run, usable, all_models[:4], base, out, label)


def _merge(
    run: Speed,
    name: str,
    module: Any,
    models: list[torch.Tensor],
    base: torch.Tensor,
    out: torch.Tensor,
    label: str,
) -> None:
    """The whole op, the pass with thresholds known, and the op as it is called."""
    count, n, barred = len(models), base.numel(), "ulps" not in label
    nbytes = (count + 2) * n * base.element_size()
    rule = resolve_options(count, density=DENSITY).rule(n)
    pending = module.ties(models, base, rule, out)
    stats = pending.resolve()
    _gate(models, base, module)
    known = rule.with_precomputed(thresholds=stats.thresholds)
    note = ("missed" if pending.missed() else "held") if hasattr(pending, "missed") else ""
    whole = partial(module.ties, models, base, rule, out)
    fixed = partial(module.ties, models, base, known, out)
    run.add(
        f"ties {label} K={count}",
        name,
        device_times(_replayed(whole, out), 30, 1.0),
        nbytes,
        note,
        WHOLE_BAR[count] if barred else None,
    )
    run.add(
        f"known {label} K={count}",
        name,
        device_times(_replayed(fixed, out), 30, 1.0),
        nbytes,
        bar=KNOWN_BAR if barred else None,
    )
    if barred:
        run.add(f"ties {label} K={count} as called", name, called(whole, 20), nbytes, note)


@contextlib.contextmanager
def _by_itself(run: Speed, what: str) -> Iterator[None]:
    """What fails inside is noted, and takes no other row with it."""
    try:
        yield
    except Exception as error:
        run.failures.append(f"{what}: {type(error).__name__}: {str(error)[-1500:]}")


def _replayed(call: Callable[[], Any], out: torch.Tensor) -> Callable[[], None]:
    """The call's graph, which has to leave the bits that the call does."""
    call()
    want = out.clone()
    graph = captured(call)
    out.fill_(math.nan)
    graph()
    if not same_bits(out, want):
        differing = int((out != want).sum())
        raise RuntimeError(f"a replay leaves {differing} elements other than the call does")
    return graph


def _linear(
    run: Speed,
    usable: dict[str, Any],
    models: list[torch.Tensor],
    base: torch.Tensor,
    out: torch.Tensor,
    label: str,
) -> None:
    rule = resolve_options(4, trim="none", elect="none", merge="weighted_mean").rule(base.numel())
    nbytes = 5 * base.numel() * base.element_size()
    for name, module in usable.items():
        with _by_itself(run, f"{name}, linear {label}"):
            call = partial(module.ties, models, None, rule, out)
            graph = _replayed(call, out)
            run.add(f"linear {label} K=4", name, device_times(graph, 30, 1.0), nbytes)


def _gate(models: Sequence[torch.Tensor], base: torch.Tensor, module: Any) -> None:
    n = min(base.numel(), (1 << 20) + 11)
    head, head_base = [m[:n] for m in models], base[:n]
    rule = resolve_options(len(models), density=DENSITY).rule(n)
    out, want = torch.full_like(head_base, math.nan), torch.empty_like(head_base)
    module.ties(head, head_base, rule, out)
    reference.ties(head, head_base, rule, want)
    if not same_bits(out, want):
        raise RuntimeError(f"{module.__name__} differs from the reference; nothing is timed")


def _small(run: Speed, usable: dict[str, Any], n: int) -> None:
    """300 norms and biases in one call, beside the reference called for each."""
    jobs = []
    for j in range(SMALL_TENSORS):
        size = (4096, 1024, 14336, 4096)[j % 4]
        models, base = tensors("gaussian", size, 4, torch.bfloat16, j)
        rule = resolve_options(4, density=DENSITY).rule(size, str(j))
        jobs.append((models, base, rule, torch.empty_like(base)))

    # No bandwidth: their 21 MB stay in the cache from one call to the next.
    def by_reference() -> None:
        for models, base, rule, out in jobs:
            reference.ties(models, base, rule, out)

    slow = run.add(f"{SMALL_TENSORS} small", "reference", called(by_reference, 1))
    for name, module in usable.items():
        with _by_itself(run, f"{name}, {SMALL_TENSORS} small"):
            many = partial(module.ties_many, jobs)
            fast = run.add(f"{SMALL_TENSORS} small as called", name, called(many, 10))
            run.compare(f"{slow / fast:.0f} times the reference", slow / fast, SMALL_BAR)
            graphed = run.add(f"{SMALL_TENSORS} small", name, device_times(captured(many), 20, 1.0))
            run.compare(f"{slow / graphed:.0f} times the reference")


def _rivals(run: Speed, usable: dict[str, Any], n: int) -> None:
    """Other implementations on the same GPU: one tensor, K = 4, fp32."""
    n = min(n, 1 << 25)
    models, base = tensors("gaussian", n, 4, torch.float32, 1)
    out = torch.empty_like(base)
    rule = resolve_options(4, density=DENSITY).rule(n)
    ours = {}
    for name, module in usable.items():
        with _by_itself(run, f"{name}, rivals"):
            whole = partial(module.ties, models, base, rule, out)
            ours[name] = run.add(f"rivals: ties 2^{n.bit_length() - 1}", name, called(whole, 20))
    rivals: dict[str, Callable[[], Any]] = {
        "reference": lambda: reference.ties(models, base, rule, out)
    }
    compiled = torch.compile(plain_ties, dynamic=False)
    rivals["torch.compile"] = lambda: compiled(models, base, rule.ranks[0])
    try:
        from pymerge.bench import cases, peers

        given = cases.Tensors(models, base, out)
        for name, peer in peers.available("ties").items():
            rivals[name] = lambda peer=peer: peer(given)
    except ImportError as error:
        run.rows.append(_absent("peft, mergekit", str(error)))
    for name, call in rivals.items():
        if run.left() < 5:
            run.rows.append(_absent(name, "out of time"))
            continue
        try:
            taken = run.add(f"rivals: {name}", name, called(call, 1))
            said = ", ".join(f"{taken / t:.0f} x {backend}" for backend, t in ours.items())
            bar = {"torch.compile": COMPILE_BAR, "peft": PEER_BAR, "mergekit": PEER_BAR}.get(name)
            run.compare(said, taken / min(ours.values()), bar)
        except Exception as error:
            run.rows.append(_absent(name, f"{type(error).__name__}: {str(error)[:300]}"))


def _absent(name: str, why: str) -> dict[str, Any]:
    return {
        "what": f"rivals: {name}",
        "backend": name,
        "ms_p50": None,
        "note": why.replace("\n", " "),
    }


def plain_ties(models: list[torch.Tensor], base: torch.Tensor, rank: int) -> torch.Tensor:
    """The same merge as a person would write it in PyTorch, for torch.compile."""
    deltas = torch.stack([m.float() - base.float() for m in models])
    sizes = deltas.abs()
    thresholds = torch.stack([s.kthvalue(s.numel() - rank + 1).values for s in sizes])
    trimmed = torch.where(sizes >= thresholds[:, None], deltas, 0.0)
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed * sign > 0
    merged = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    return (base + merged).to(base.dtype)
