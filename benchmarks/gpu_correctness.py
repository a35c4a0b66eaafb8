"""The parts of gpu_check.py that compare: drawn cases, large and adversarial tensors, graphs."""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_cases
import torch
from gpu_cases import Plan, differences, draw, fixed_plans, plain, same_bits

from pymerge.backends import registry
from pymerge.reference import ties as reference
from pymerge.rules.ties import TiesRule, resolve_options

DEVICE = "cuda"
SMALL = [0, 1, 2, 3, 5, 100, 777, 4096, 5003, 16_385, 32_769, 70_001]
GUESSED = [1 << 20, (1 << 20) + 7, (1 << 21) + 4099]
COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 64]


def backends() -> dict[str, Any]:
    """Name -> module of the GPU backends; a reason as text where one cannot run."""
    from pymerge.backends import native

    found: dict[str, Any] = {}
    reason = native.why_not_cuda()
    if reason is None:
        from pymerge.backends import cuda

        found["cuda"] = cuda
    else:
        found["cuda"] = reason
    reason = registry.why_not("triton")
    if reason is None:
        from pymerge.triton_kernels import ties

        found["triton"] = ties
    else:
        found["triton"] = reason
    return found


Keep = Callable[[dict[str, Any]], None]


def forget(result: dict[str, Any]) -> None:
    """Keep nothing."""


def cases(seconds: float, keep: Keep = forget) -> dict[str, Any]:
    """Drawn cases of every option against the reference on the CPU, alternating between backends
    until time is up. The case at hand is kept, should a kernel not come to its end.
    """
    found = backends()
    failures = [f"{name}: {module}" for name, module in found.items() if isinstance(module, str)]
    usable = {name: module for name, module in found.items() if not isinstance(module, str)}
    done = dict.fromkeys(usable, 0)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))

    def one(name: str, case: Any) -> None:
        at_hand = f"{name}: {case.about}, {case.options}"
        keep({"failures": failures, "summary": {**_cases(done), "at hand": at_hand}})
        done[name] += compare(name, usable[name], case, failures)

    for name in usable:
        end = time.monotonic() + seconds / len(usable)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for count in (1, 2, 3, 4, 5, 6, 7, 8):
                if name == "triton" and count not in (2, 8):  # each variant is compiled anew
                    continue
                one(name, plain(GUESSED[1], count, dtype, density=0.2))
        seed = 0
        while time.monotonic() < end and len(failures) < 20:
            sizes = GUESSED if seed % 7 == 6 else SMALL
            counts = [1, 2, 4, 8] if seed % 7 == 6 else COUNTS
            one(name, draw(seed, sizes, counts))
            seed += 1
    return {"failures": failures, "summary": _cases(done)}


def _cases(done: dict[str, int]) -> dict[str, Any]:
    return {f"{name} cases": count for name, count in done.items()}


def compare(name: str, module: Any, case: Any, failures: list[str]) -> int:
    try:
        wrong, _ = differences(case, module.ties, DEVICE)
    except Exception as error:
        if "illegal" in str(error) or "misaligned" in str(error):
            raise RuntimeError(f"{name}: {error}; {case.about}, {case.options}") from error
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        failures.append(f"{name}: {wrong}; {case.about}, {case.options}")
    return 1


# --- large tensors, made and compared on the device
# -----------------------------------------------------------------


def tensors(
    kind: str, n: int, count: int, dtype: torch.dtype, seed: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    return gpu_cases.adversarial(kind, n, count, dtype, seed, DEVICE)


FIXED = len(fixed_plans())


def plans() -> Iterator[Plan]:
    """First those that are always made, then random ones without end."""
    yield from fixed_plans()
    r = random.Random(0)
    while True:
        kind, dtype = r.choice(gpu_cases.KINDS), r.choice([torch.float32, torch.bfloat16])
        yield kind, int(2 ** r.uniform(16, 28)), r.choice([1, 2, 3, 4, 8]), dtype


def large(seconds: float, keep: Keep = forget) -> dict[str, Any]:
    """Adversarial data at sizes that are guessed, up to 2^28, against the CPU backend's bits or the
    reference's.
    """
    usable = {name: module for name, module in backends().items() if not isinstance(module, str)}
    failures: list[str] = []
    end = time.monotonic() + seconds
    held: dict[str, str] = {}
    done = left_out = 0
    stopped: dict[str, str] = {}
    for seed, (kind, n, count, dtype) in enumerate(plans()):
        if time.monotonic() > end:
            if seed < FIXED:  # which says nothing of the kernels
                stopped["stopped"] = f"out of time before {kind}, n={n}; give more --minutes"
            break
        if 8 * n * (count + 4) > torch.cuda.mem_get_info()[0]:  # what making them takes, too
            left_out += 1
            continue
        models, base = tensors(kind, n, count, dtype, seed)
        rule = resolve_options(count, density=0.2).rule(n)
        want, wanted = _expected(models, base, rule)
        for name, module in usable.items():
            out = torch.full((n,), math.nan, dtype=dtype, device=DEVICE)
            again = torch.full((n,), math.nan, dtype=dtype, device=DEVICE)
            what = f"{name}, {kind}, n={n}, K={count}, {dtype}"
            keep({"failures": failures, "summary": {"comparisons": done, "at hand": what}})
            pending = module.ties(models, base, rule, out)
            module.ties(models, base, rule, again)
            stats = pending.resolve()
            if not same_bits(out, want):
                failures.append(f"{what}: {int((out != want).sum())} elements differ")
            if not same_bits(out, again):
                failures.append(f"{what}: a second run gives other bits")
            if repr(stats) != repr(wanted):
                failures.append(f"{what}: {stats} for {wanted}")
            if hasattr(pending, "missed"):
                held[f"{kind} {n} {str(dtype).removeprefix('torch.')}"] = (
                    "missed" if pending.missed() else "held"
                )
            done += 1
        del models, base, want
    return {
        "failures": failures,
        "guesses": held,
        "summary": {"comparisons": done, "too large": left_out, "guesses": _tally(held), **stopped},
    }


def _tally(held: dict[str, str]) -> dict[str, int]:
    return {word: list(held.values()).count(word) for word in ("held", "missed")}


def _expected(
    models: Sequence[torch.Tensor], base: torch.Tensor, rule: TiesRule
) -> tuple[torch.Tensor, Any]:
    """From the CPU backend where it is there (it is fast), else from the reference on the CPU."""
    function: Any = reference.ties
    if registry.why_not("cpu") is None:
        from pymerge.backends import cpu

        function = cpu.ties
    torch.set_num_threads(os.cpu_count() or 1)
    out = torch.full(base.shape, math.nan, dtype=base.dtype)
    stats = function([m.cpu() for m in models], base.cpu(), rule, out)
    return out.to(DEVICE), stats


# --- graphs, streams, many tensors
# ----------------------------------------------------------------------------------


def graph(seconds: float, keep: Keep = forget) -> dict[str, Any]:
    """Capture in a CUDA graph and replay on other data; another stream; many tensors; scratch
    memory.
    """
    failures: list[str] = []
    summary: dict[str, Any] = {}
    for name, module in backends().items():
        if isinstance(module, str):
            continue
        for what, check in (
            ("graph", _graph),
            ("stream", _stream),
            ("many", _many),
            ("select", _select),
        ):
            keep({"failures": failures, "summary": {**summary, "at hand": f"{name} {what}"}})
            try:
                wrong = check(module)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                failures.append(f"{name}, {what}: {wrong}")
            summary[f"{name} {what}"] = "failed" if wrong else "passed"
        if name == "cuda":
            n = 1 << 26
            for dtype in (torch.float32, torch.bfloat16):
                for count in (2, 4, 8):
                    rule = resolve_options(count).rule(n)
                    share = module.scratch_bytes(n, count, dtype, rule) / (n * dtype.itemsize)
                    if share >= 0.05:
                        failures.append(
                            f"scratch is {100 * share:.1f} % of one input, K={count}, {dtype}"
                        )
    return {"failures": failures, "summary": summary}


def _graph(module: Any) -> str:
    n, count = (1 << 20) + 64, 3
    rule = resolve_options(count, density=0.2).rule(n)
    first, second = (tensors("gaussian", n, count, torch.bfloat16, seed) for seed in (1, 2))
    models, base = [m.clone() for m in first[0]], first[1].clone()
    out = torch.empty_like(base)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        module.ties(models, base, rule, out)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        pending = module.ties(models, base, rule, out)
    for data in (first, second, first):
        for into, new in zip([*models, base], [*data[0], data[1]], strict=True):
            into.copy_(new)
        out.fill_(math.nan)
        captured.replay()
        want = torch.empty_like(out)
        reference.ties(data[0], data[1], rule, want)
        if not same_bits(out, want):
            return f"replay differs in {int((out != want).sum())} elements"
    del pending
    return ""


def _stream(module: Any) -> str:
    """Two streams at once, each with its own tensors: kernels follow the caller's stream."""
    n = (1 << 22) + 3
    streams = [torch.cuda.Stream() for _ in range(2)]
    data = [tensors("gaussian", n, 2, torch.float32, seed) for seed in range(2)]
    rule = resolve_options(2, density=0.3).rule(n)
    outs = [torch.full((n,), math.nan, device=DEVICE) for _ in range(2)]
    torch.cuda.synchronize()
    for stream, (models, base), out in zip(streams, data, outs, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(3):
                module.ties(models, base, rule, out)
    torch.cuda.synchronize()
    for (models, base), out in zip(data, outs, strict=True):
        want = torch.empty_like(out)
        reference.ties(models, base, rule, want)
        if not same_bits(out, want):
            return f"{int((out != want).sum())} elements differ"
    return ""


def _many(module: Any) -> str:
    jobs, wanted = [], []
    for j in range(300):
        n = 1 + 977 * j % 20_000
        models, base = tensors("gaussian", n, 4, torch.bfloat16, j)
        rule = resolve_options(4, density=0.2).rule(n, str(j))
        jobs.append((models, base, rule, torch.full_like(base, math.nan)))
        want = torch.empty_like(base)
        wanted.append((want, reference.ties(models, base, rule, want)))
    stats = module.ties_many(jobs)
    for (_, _, _, out), one, (want, counts) in zip(jobs, stats, wanted, strict=True):
        if not same_bits(out, want) or repr(one.resolve()) != repr(counts):
            return f"n={out.numel()} differs"
    return ""


def _select(module: Any) -> str:
    models, base = tensors("heavy tail", 3_000_001, 3, torch.float32, 5)
    cuts = [0, 1, 700, 2_000_000, 3_000_001]
    segments = [([m[a:b] for m in models], base[a:b]) for a, b in itertools.pairwise(cuts)]
    ranks = [600_000, 1, 2_999_999]
    got = module.select(segments, ranks)
    got = got.tolist() if isinstance(got, torch.Tensor) else got
    want = reference.select([(models, base)], ranks)
    return "" if list(got) == list(want) else f"{got} for {want}"
