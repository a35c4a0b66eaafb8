"""The part of gpu_check.py that checks and times `mats`: each backend's vector updates, small
layers whole by each kernel for them, an iteration beside matrix products, whole solves beside the
official formulation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import gpu_correctness
import gpu_speed
import torch

from pymerge.backends import registry
from pymerge.backends.cg.device import SmallKernel
from pymerge.backends.cg.iteration import CgState, VectorUpdates, conjugate_gradient
from pymerge.backends.registry import small_kernel, vector_updates
from pymerge.ops.mats import small_layers
from pymerge.ops.mats.system import Operator, Preconditioner, build
from pymerge.rules.mats import resolve

Keep = Callable[[dict[str, Any]], None]
LARGE = [(2048, 2048), (2048, 4096)]
SMALL = [(384, 384), (1024, 1024), (384, 1536)]
# (layers, d_out, d_in): inside of what `small_layers.takes`, and at its bounds.
STACKS = [(1, 16, 16), (1, 64, 64), (36, 64, 64), (1, 1, 256), (64, 16, 256), (64, 128, 128), (64, 256, 256)]  # fmt: skip
COUNT = 8
GEMM_BAR, ITERATION_BAR, SOLVE_BAR = 80.0, 10.0, 50.0


def mats(seconds: float, keep: Keep) -> dict[str, Any]:
    """Rates and times, largest shapes first; every row is gated on a direct product or the official
    result.
    """
    end = time.monotonic() + seconds
    result: dict[str, Any] = {"failures": [], "rows": [], "summary": {}}
    try:
        import bench_mats
    except ImportError as error:  # scipy is the other side of the comparison
        result["summary"] = f"not run: {error}"
        return result
    device = torch.device(gpu_correctness.DEVICE)
    steps: list[tuple[Any, list[Any]]] = [
        (_updates, LARGE),
        (_small, STACKS),
        (_rate, LARGE),
        (_official, SMALL),
    ]
    for step, shapes in steps:
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
    """The vector updates of an iteration, on the same images q of its directions on every backend,
    which plain torch found.
    """
    g = torch.Generator(device).manual_seed(0)
    weight = torch.rand((1, *shape), generator=g, device=device) + 0.5
    first = torch.randn((1, *shape), generator=g, device=device)
    images: list[torch.Tensor] = []

    def run(kind: type[VectorUpdates], iterations: int) -> VectorUpdates:
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
    want, rows = run(VectorUpdates, many), []
    for name in registry.ORDER[device.type]:
        if registry.why_not(name) is not None:
            continue
        kind = vector_updates(device.type, name)
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
        times = [
            _device_ms(bench, lambda kind=kind, n=n: run(kind, n), device) for n in (few, many)
        ]
        ms = max((times[1] - times[0]) / (many - few), 1e-6)
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


def _device_ms(bench: Any, call: Callable[[], Any], device: torch.device) -> float:
    """Of the device, as replays of a graph: Python's time for the launches lies behind a layer's
    products. The host's where it is one.
    """
    if device.type != "cuda":
        return statistics.median(bench.all_rounds({"call": call}, 5, device)["call"])
    return statistics.median(gpu_speed.device_times(gpu_speed.captured(call), 20, 1.0))


class Stack:
    """Layers with 4 models, for runs of 5 iterations; a stack of vectors has no output Grams."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        layers, d_out, d_in = shape
        g = torch.Generator(device).manual_seed(sum(shape))

        def grams(d: int) -> list[torch.Tensor]:
            rows = [torch.randn(4, 3 * d, d, generator=g, device=device) for _ in range(layers)]
            return [x.mT @ x / (3 * d) for x in rows]

        self.rule = resolve(4, objective_tolerance=0.0)
        a, b = grams(d_in), grams(d_out) if d_out > 1 else None
        self.system = build(a, b, self.rule, torch.float32, layers)
        self.inverses = Preconditioner(self.system, self.rule, self.rule.damping)
        self.rest = torch.randn(shape, generator=g, device=device)
        self.none = torch.zeros(layers, dtype=torch.float64, device=device)

    def by_kernel(self, kernel: SmallKernel) -> CgState:
        step, r = torch.zeros_like(self.rest), self.rest.clone()
        return small_layers.solve(
            kernel, self.system, self.inverses, step, r, 0.0, self.rule.iterations, None, self.none
        )

    def by_launches(self, kind: type[VectorUpdates]) -> CgState:
        """The way of larger layers."""
        apply = Operator(self.system, self.rest.shape[1], "fp32")
        step, r = torch.zeros_like(self.rest), self.rest.clone()
        return conjugate_gradient(
            apply, self.inverses, step, r, self.rule, self.rule.iterations, None, self.none, kind
        )

    def wrong(self, kernel: SmallKernel) -> str:
        """Empty, or how the kernel's run differs from plain torch's."""
        got, want = self.by_kernel(kernel), self.by_launches(VectorUpdates)
        error = float((got.step - want.step).double().norm() / want.step.double().norm())
        if not error < 1e-5:
            return f"relative error {error:.1e} for layers of {tuple(self.rest.shape)}"
        done = got.iterations.tolist()
        return "" if done == want.iterations.tolist() else f"{done} iterations"


def _small(bench: Any, shape: tuple[int, int, int], device: torch.device) -> list[dict[str, Any]]:
    """Whole runs in one launch by each kernel for small layers, beside the launches that the way of
    larger layers takes.
    """
    stack = Stack(shape, device)
    calls: dict[str, Callable[[], object]] = {}
    for name in registry.ORDER[device.type]:
        if registry.why_not(name) is not None:
            continue
        kernel = small_kernel(device.type, name)
        if kernel is None:
            continue
        wrong = stack.wrong(kernel)
        if wrong:
            raise RuntimeError(f"{name}: {wrong}; nothing was timed")
        calls[name] = lambda kernel=kernel: stack.by_kernel(kernel)
    kind = vector_updates(device.type)
    calls["by launches"] = lambda: stack.by_launches(kind)
    return [
        {
            "what": f"cg small {shape[0]} of {shape[1]}x{shape[2]}",
            "backend": name,
            "ms_p50": statistics.median(times),
            "note": f"{stack.rule.iterations} iterations, K=4",
        }
        for name, times in bench.all_rounds(calls, 9, device).items()
    ]


def _rate(bench: Any, shape: tuple[int, int], device: torch.device) -> list[dict[str, Any]]:
    """The 2 K products of the operator and the 2 of the preconditioner are an iteration's work;
    their rate beside that of plain products.
    """
    row = bench.time_iteration(*shape, COUNT, 5, device)
    share = 100 / row["ratio"] * (COUNT + 1) / COUNT
    return [
        {
            "what": f"cg iteration {shape[0]}x{shape[1]} K={COUNT}",
            "backend": "auto",
            "ms_p50": row["iteration_ms"],
            "note": (
                f"{share:.0f} % of the rate of products ({row['gflops']:.0f} Gflop/s), "
                f"{row['ratio']:.2f} of the time of 2 K"
            ),
            "bar": f"{GEMM_BAR:.0f} % of the rate",
            "met": share >= GEMM_BAR,
        }
    ]


def _official(bench: Any, shape: tuple[int, int], device: torch.device) -> list[dict[str, Any]]:
    """scipy's CG with host copies on the same GPU: an iteration, and a solve to the objective of
    its 100.
    """
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
            "note": (
                f"{solve['speedup']:.0f} times the official formulation, {solve['iterations']}"
                " iterations"
            ),
            "bar": f"{SOLVE_BAR:.0f} times",
            "met": solve["speedup"] >= SOLVE_BAR,
        },
    ]
