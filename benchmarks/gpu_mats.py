"""The part of gpu_check.py that checks and times `mats`: each backend's vector updates, an iteration beside matrix products, whole
solves beside the official formulation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import gpu_correctness
import torch

from pymerge import _dispatch
from pymerge.ops._cg import Run, run_type

Keep = Callable[[dict[str, Any]], None]
LARGE = [(2048, 2048), (2048, 4096)]
SMALL = [(384, 384), (1024, 1024), (384, 1536)]
COUNT = 8
GEMM_BAR, ITERATION_BAR, SOLVE_BAR = 80.0, 10.0, 50.0


def mats(seconds: float, keep: Keep) -> dict[str, Any]:
    """Rates and times, largest shapes first; every row is gated on a direct product or the official result."""
    end = time.monotonic() + seconds
    result: dict[str, Any] = {"failures": [], "rows": [], "summary": {}}
    try:
        import bench_mats
    except ImportError as error:  # scipy is the other side of the comparison
        result["summary"] = f"not run: {error}"
        return result
    device = torch.device(gpu_correctness.DEVICE)
    for step, shapes in ((_updates, LARGE), (_rate, LARGE), (_official, SMALL)):
        for shape in shapes:
            if time.monotonic() > end:
                result["summary"]["stopped"] = f"out of time before {shape}"
                return result
            try:
                result["rows"] += step(bench_mats, shape, device)
            except (
                Exception,
                SystemExit,
            ) as error:  # bench_mats ends the process where a gate fails
                result["failures"].append(
                    f"{step.__name__[1:]} {shape}: {type(error).__name__}: {str(error)[-1000:]}"
                )
            keep(result)
    result["summary"]["rows"] = len(result["rows"])
    return result


def _updates(bench: Any, shape: tuple[int, int], device: torch.device) -> list[dict[str, Any]]:
    """The vector updates of an iteration, on the same images q of its directions on every backend, which plain torch found."""
    g = torch.Generator(device).manual_seed(0)
    weight = torch.rand((1, *shape), generator=g, device=device) + 0.5
    first = torch.randn((1, *shape), generator=g, device=device)
    images: list[torch.Tensor] = []

    def run(kind: type[Run], iterations: int) -> Run:
        enough = torch.zeros(1, dtype=torch.float64, device=device)
        r = first.clone()
        running = kind(torch.zeros_like(first), r, r, 0.0, None, enough)
        for i in range(iterations):
            if len(images) == i:
                images.append(running.p * weight)
            running.advance(images[i])
            running.turn(r)
        return running

    few, many = 2, 8
    want, rows = run(Run, many), []
    for name in _dispatch.ORDER[device.type]:
        if _dispatch.why_not(name) is not None:
            continue
        kind = run_type(device.type, name)
        got = run(kind, many)
        for vector in (
            "step",
            "r",
            "p",
        ):  # r and p vanish: what counts is their error beside their first size
            there, here = (getattr(x, vector) + first for x in (got, want))
            bench.gate(f"{name} {vector}", there, here, 1e-5)
        if int(got.state().iterations) != many:
            raise RuntimeError(f"{name} did {int(got.state().iterations)} iterations of {many}")
        calls = {str(n): lambda kind=kind, n=n: run(kind, n) for n in (few, many)}
        times = bench.all_rounds(calls, 5, device).values()
        each = [(last - begun) / (many - few) for begun, last in zip(*times, strict=True)]
        ms = max(statistics.median(each), 1e-6)
        rows.append(
            {
                "what": f"cg updates {shape[0]}x{shape[1]}",
                "backend": name,
                "ms_p50": ms,
                "gb_per_s": 11 * first.nbytes / ms / 1e6,
                "note": "two sums, a step and a direction: 11 vectors moved",
            }
        )
    return rows


def _rate(bench: Any, shape: tuple[int, int], device: torch.device) -> list[dict[str, Any]]:
    """The 2 K products of the operator and the 2 of the preconditioner are an iteration's work; their rate beside that of
    plain products."""
    row = bench.time_iteration(*shape, COUNT, 5, device)
    share = 100 / row["ratio"] * (COUNT + 1) / COUNT
    return [
        {
            "what": f"cg iteration {shape[0]}x{shape[1]} K={COUNT}",
            "backend": "auto",
            "ms_p50": row["iteration_ms"],
            "note": f"{share:.0f} % of the rate of products ({row['gflops']:.0f} Gflop/s), "
            f"{row['ratio']:.2f} of the time of 2 K",
            "bar": f"{GEMM_BAR:.0f} % of the rate",
            "met": share >= GEMM_BAR,
        }
    ]


def _official(bench: Any, shape: tuple[int, int], device: torch.device) -> list[dict[str, Any]]:
    """scipy's CG with host copies on the same GPU: an iteration, and a solve to the objective of its 100."""
    layer = bench.synthetic(*shape, 4, 0, device)
    solve = bench.time_solve(layer, 2)
    name = f"{shape[0]}x{shape[1]} K=4"
    if solve["iterations"] is None:
        raise RuntimeError("40 iterations do not reach the official objective")
    iteration = bench.time_iteration(*shape, 4, 5, device)["iteration_ms"]
    times = solve["official_iteration_ms"] / iteration
    return [
        {
            "what": f"cg iteration {name}",
            "backend": "auto",
            "ms_p50": iteration,
            "note": f"{times:.0f} times the official formulation",
            "bar": f"{ITERATION_BAR:.0f} times",
            "met": times >= ITERATION_BAR,
        },
        {
            "what": f"mats to the objective {name}",
            "backend": "auto",
            "ms_p50": solve["ours_ms"],
            "note": f"{solve['speedup']:.0f} times the official formulation, {solve['iterations']} iterations",
            "bar": f"{SOLVE_BAR:.0f} times",
            "met": solve["speedup"] >= SOLVE_BAR,
        },
    ]
