"""The methods under masks, and DELLA, beside mergekit's own functions, in turn in one process:
`python benchmarks/bench_masked.py --help`. Results are compared before anything is timed.

Seconds are of the wall clock, and of the processor: what all threads of the process took, which is
comparable where other programs share the machine.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from mergekit.merge_methods import merge_tensors

from pymerge.backends import native
from pymerge.compat.mergekit import merge_tensors as compat_merge_tensors
from pymerge.methods import find_method
from pymerge.methods.method import Given
from pymerge.ops.masked.api import merge_tensor as masked
from pymerge.ops.ties.api import run_tensor
from pymerge.rules.masked import PAIRS, MaskedOptions
from pymerge.rules.ties import TiesOptions

CASES: dict[str, dict[str, float]] = {
    "nearswap": {"t": 1e-3},
    "ram": {"epsilon": 1e-3},
    "ramplus_tl": {"epsilon": 1e-3},
    "sce": {"select_topk": 0.3},
    "arcee_fusion": {},
    "della": {"weight": 1.0, "density": 0.5, "epsilon": 0.2},
    "della_linear": {"weight": 1.0, "density": 0.5, "epsilon": 0.2},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROW = 4096


def models_of(size: int, count: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(size // ROW, ROW, generator=g)).to(dtype)
    models = [
        (base.float() + 2e-3 * torch.randn(base.shape, generator=g)).to(dtype) for _ in range(count)
    ]
    return models, base


def ours(
    method: str, models: list[torch.Tensor], base: torch.Tensor, out: torch.Tensor
) -> Callable[[], object]:
    """The op alone, on tensors that are there, as mergekit's function is timed."""
    found = find_method(method)
    values = {p.name: CASES[method].get(p.name, p.default) for p in found.parameters}
    shared = {p.name: values[p.name] for p in found.parameters if p.scope == "shared"}
    options = found.resolve(Given(shared, [values] * len(models), base=True))
    if isinstance(options, TiesOptions):
        rule = options.rule(base.numel(), "w", base.shape)
        return lambda: run_tensor(models, base, options, rule, out, "cpu")
    assert isinstance(options, MaskedOptions)
    return lambda: masked(models, base, options, out, "", "cpu")


def gate(method: str, count: int) -> None:
    """Refuses to time what gives other numbers than mergekit, on small tensors in fp32."""
    models, base = models_of(16 * ROW, count, torch.float32)
    arguments = [base, *models], method
    options = {"parameters": CASES[method], "base_index": 0}
    mine = compat_merge_tensors(*arguments, **options) - base
    theirs = merge_tensors(*arguments, **options) - base
    if method.startswith("della"):  # other draws
        off = abs(float(mine.abs().sum() / theirs.abs().sum()) - 1)
    else:
        off = float(((mine - theirs).abs() > 1e-6).double().mean())
    # Masks of arcee_fusion close to the threshold depend on the processor there.
    if off > (0.03 if method == "arcee_fusion" else 0.005):
        sys.exit(f"{method}: results differ from mergekit's ({off:.2%})")


def timed(call: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1 << 24, help="elements of a tensor")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=native.num_threads())
    parser.add_argument("--methods", default=",".join(CASES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"level {native.cpu_level()}, {given.threads} threads, {given.size} elements")
    print("method,dtype,models,pymerge_s,mergekit_s,times,pymerge_cpu_s,mergekit_cpu_s,times_cpu")
    for method in given.methods.split(","):
        count = 1 if method in PAIRS else given.models
        gate(method, count)
        for name in given.dtypes.split(","):
            models, base = models_of(given.size, count, DTYPES[name])
            mine = ours(method, models, base, torch.empty_like(base))
            arguments = {"parameters": CASES[method], "base_index": 0}
            mine()
            theirs = functools.partial(merge_tensors, [base, *models], method, **arguments)
            rows = [(*timed(mine), *timed(theirs)) for _ in range(given.repeats)]
            wall, processor, their_wall, their_processor = map(
                statistics.median, zip(*rows, strict=True)
            )
            print(
                f"{method},{name},{count},{wall:.4f},{their_wall:.4f},{their_wall / wall:.1f},"
                f"{processor:.4f},{their_processor:.4f},{their_processor / processor:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
