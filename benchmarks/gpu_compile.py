"""The part of gpu_check.py that compiles the Triton kernels which the other parts will launch, on
all processors at once.

Triton compiles a kernel when it is first launched, one after the other, about half a second each;
the sections launch some hundreds. Launches are recorded on CPU tensors, which are never read, and
what is compiled goes to Triton's cache on disk, where the sections, each a process of its own, find
it. The compiling processes never touch the device.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gpu_cases
import torch
from gpu_cases import Case, draw, plain
from gpu_correctness import COUNTS, GUESSED, SMALL

from pymerge.rules.ties import resolve_options

FLOATS = (torch.float32, torch.bfloat16)


class NoDevice:
    """What Triton asks of its driver when it compiles and does not launch."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def requests() -> Iterator[list[Any]]:
    """What the other sections ask of `ties_many`, with empty tensors: speed, large, graph, then the
    drawn cases.
    """
    for dtype in FLOATS:
        for count in (2, 4, 8):
            for n in (1 << 26, (1 << 20) + 11):
                yield [_request(n, count, dtype)]
        yield [_request(1 << 26, 4, dtype, False, trim="none", elect="none")]
    yield [_request(n, 4, torch.bfloat16) for n in (4096, 1024, 14336)]
    for dtype in FLOATS:
        yield [_request((1 << 22) + 5, 3, dtype)]
        yield [_request(1 << 28, 2, dtype)]
    yield [_request(1 << 26, 4, torch.float32)]
    yield [_request(1 << 24, 64, torch.bfloat16)]
    yield [_request((1 << 20) + 64, 3, torch.bfloat16)]
    for dtype in (*FLOATS, torch.float16):
        for count in (2, 8):
            yield [_of(plain(GUESSED[1], count, dtype, density=0.2))]
    for seed in range(1000):
        large = seed % 7 == 6
        yield [_of(draw(seed, GUESSED if large else SMALL, [1, 2, 4, 8] if large else COUNTS))]


def blank(
    distribution: str, n: int, count: int, dtypes: Sequence[torch.dtype], seed: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `gpu_cases._tensors` of the same arguments, but for the numbers, which a thousand cases
    take seconds for.
    """
    if distribution == "ulp":
        dtypes = [next((d for d in dtypes if d != torch.float64), torch.float32)]
    made = [torch.empty(n, dtype=dtypes[k % len(dtypes)]) for k in range(count + 1)]
    return made[1:], made[0]


def _request(n: int, count: int, dtype: torch.dtype, based: bool = True, **options: Any) -> Any:
    tensors = [torch.empty(n, dtype=dtype) for _ in range(count + 2)]
    rule = resolve_options(count, density=0.2, **options).rule(n)
    return tensors[2:], tensors[0] if based else None, rule, tensors[1]


def _of(case: Case) -> Any:
    out = torch.empty(case.models[0].shape, dtype=case.out_dtype)
    return case.models, case.base, case.rule, out


def compile_ahead(seconds: float) -> dict[str, Any]:
    """Compile until all is compiled or time is up."""
    from triton.backends.compiler import GPUTarget

    properties = torch.cuda.get_device_properties(0)
    target = GPUTarget("cuda", 10 * properties.major + properties.minor, 32)
    done = run(target, properties.multi_processor_count, seconds, os.cpu_count() or 1)
    return {"failures": [], "summary": {"kernels compiled": done}}


def run(target: Any, processors: int, seconds: float, jobs: int) -> int:
    """How many distinct launches were compiled for `target`, by `jobs` processes."""
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("fork")
    done = context.Value("i", 0)
    workers = [
        context.Process(target=_work, args=(j, jobs, target, processors, end, done), daemon=True)
        for j in range(jobs)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end + 5 - time.monotonic()))
        if worker.is_alive():
            worker.kill()
    return int(done.value)


def _work(own: int, jobs: int, target: Any, processors: int, end: float, done: Any) -> None:
    """Compile every `jobs`-th of the distinct launches. Each process records them all, which takes
    a second or two.
    """
    from triton.runtime.driver import driver

    from pymerge.triton_kernels.ties import _launch_plan

    torch.set_num_threads(1)  # there are as many processes as processors
    gpu_cases._tensors = blank
    driver.set_active(NoDevice(target))
    _launch_plan._programs = lambda _, chunks: min(chunks, 4 * processors)  # as on the device
    for launch in _mine(own, jobs):
        if time.monotonic() > end:
            return
        launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
        with done.get_lock():
            done.value += 1


def _mine(own: int, jobs: int) -> Iterator[Any]:
    from pymerge.triton_kernels import aot
    from pymerge.triton_kernels import ties as kernels

    seen: dict[Any, int] = {}
    for request in requests():
        for launch in aot.launches(lambda request=request: kernels.ties_many(request)):
            key = aot.variant(launch)
            if key not in seen:
                seen[key] = len(seen)
                if seen[key] % jobs == own:
                    yield launch
