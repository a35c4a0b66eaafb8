"""Compile the kernels ahead of time for GPUs that need not be there, and report what each would
take.

    python -m pymerge.triton_kernels.aot --target sm_80 --target sm_90

What is compiled is what `ties`, `select`, `gram`, `combine` and `mats` would launch for a representative set of
inputs: their launches are recorded, not run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pymerge.backends.cg.device import WIDTH, SmallLayers
from pymerge.rules.ties import resolve_options
from pymerge.triton_kernels import _launch
from pymerge.triton_kernels import gram as gram_op
from pymerge.triton_kernels import ties as op
from pymerge.triton_kernels.mats.cg import TritonUpdates
from pymerge.triton_kernels.mats.cg_small import solve_small

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.float64: "*fp64",
    torch.float32: "*fp32",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments and options of one launch."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target. spills: bytes of local memory per thread; shared: bytes per
    program.
    """

    kernel: str
    case: str
    target: str
    registers: int
    spills: int
    shared: int
    warps: int
    assembly: str


def cases(full: bool = False) -> dict[str, Callable[[], object]]:
    """Name -> a call of `ties`, `select` or a part of `mats` on small CPU tensors: every kernel,
    every option at least once; with `full` the product of dtypes, numbers of models and trims too.
    """
    found: dict[str, Callable[[], object]] = {}

    def add(
        name: str, n: int, dtypes: Sequence[torch.dtype], based: bool = True, **options: Any
    ) -> None:
        def call() -> object:
            models = [torch.empty(n, dtype=d) for d in dtypes[1:]]
            base = torch.empty(n, dtype=dtypes[0]) if based else None
            rule = resolve_options(len(models), **options).rule(n, name)
            return op.ties(models, base, rule, torch.empty(n, dtype=dtypes[0]))

        found[name] = call

    f32, f16, b16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
    # Thresholds of the huge ones are sampled, whatever K up to 8.
    huge, large, small = 1 << 26, 1 << 20, 1000
    add("fp32 K=2", huge, [f32] * 3)
    add("fp32 K=8 weighted", huge, [f32] * 9, weights=0.5, density=0.01)
    add("bf16 K=3 weighted", huge, [b16] * 4, weights=0.5)
    add("bf16 K=4", huge, [b16] * 5)
    add("bf16 K=8", huge, [b16] * 9, density=0.01)
    add("bf16 K=6 outliers", large, [b16] * 7, weights=0.5, trim="outliers")
    add("fp16 K=4 small", small, [f16] * 5)
    add("bf16 K=2 16384", 16384, [b16] * 3)
    add("mixed K=4 paper", large, [b16, f16, b16, f32, b16], flavor="paper", elect="count")
    add("bf16 K=16", large, [b16] * 17)
    add("bf16 K=16 weighted", large, [b16] * 17, weights=0.25)
    add("fp64 K=2 l2", large, [f64] * 3, rescale="l2")
    add("fp32 K=3 breadcrumbs", large, [f32] * 4, trim="outliers", density=0.9, merge="sum")
    add("bf16 K=2 dare l1", large, [b16] * 3, trim="random", rescale="l1", elect="none")
    add("bf16 K=2 dare density", large, [b16] * 3, trim="random", rescale="density", merge="max")
    add(
        "fp32 K=2 linear",
        large,
        [f32] * 3,
        based=False,
        trim="none",
        elect="none",
        rescale="linf",
        density=0.5,
    )
    if full:
        for dtype in (f32, f16, b16, f64):
            for K in (1, 2, 4, 6, 8, 9, 64):
                for trim in ("magnitude", "none", "outliers", "random"):
                    name = f"{str(dtype)[6:]} K={K} {trim}"
                    add(name, large, [dtype] * (K + 1), trim=trim, weights=0.5)
    segments = [([torch.zeros(large, dtype=b16)], None), ([torch.zeros(small, dtype=b16)], None)]
    found["select"] = lambda: op.select(segments, [100])
    for count, dtype in ((2, f32), (4, b16), (8, f32)):
        name = f"K={count} {str(dtype)[6:]}"
        found[f"gram {name}"] = lambda k=count, d=dtype: _gram(k, d, False)
        found[f"gram columns {name}"] = lambda k=count, d=dtype: _gram(k, d, True)
    found["mats fp32"] = lambda: _conjugate_gradient(f32)
    found["mats fp64 limited"] = lambda: _conjugate_gradient(f64, limited=True)
    found["mats 64x64 limited"] = lambda: _small_layers(64, limited=True)
    found["mats vectors"] = lambda: _small_layers(1)
    return found


def _gram(count: int, dtype: torch.dtype, by_column: bool) -> None:
    """Products of rows or columns, and a combination with their coefficients."""
    models = [torch.empty(64, 4096, dtype=dtype) for _ in range(count)]
    base, out = torch.empty_like(models[0]), torch.empty_like(models[0])
    shape = (64, 4096)
    gram_op.gram(models, base, shape, by_column)
    factors = torch.empty(shape[by_column], count, dtype=torch.float64)
    gram_op.combine(models, base, shape, by_column, factors, out)


def _conjugate_gradient(dtype: torch.dtype, limited: bool = False) -> None:
    """An iteration's vector updates, with a preconditioner and without."""
    step, z = (torch.zeros(2, 64, 64, dtype=dtype) for _ in range(2))
    ones = torch.ones(2, dtype=torch.float64)
    running = TritonUpdates(step, step.clone(), z, 0.0, ones if limited else None, ones)
    running.advance(z)
    running.turn(z)
    running.turn(running.r)


def _small_layers(d_out: int, limited: bool = False) -> None:
    """Three layers of four models, (d_out, 64): with output Grams, or vectors without."""
    wide, count = d_out > 1, 4 if d_out > 1 else 1
    problem = SmallLayers(
        step=torch.empty(3, d_out, 64),
        r=torch.empty(3, d_out, 64),
        a=torch.empty(3, count, 64, 64),
        b=torch.empty(3, d_out, count * d_out) if wide else None,
        right=torch.empty(3, 64, 64),
        left=torch.empty(3, d_out, d_out) if wide else None,
        scratch=torch.empty(3, 3 + count, d_out, 64),
        state=torch.empty(3, WIDTH, dtype=torch.float64),
        limits=limited,
        iterations=5,
    )
    solve_small(problem)


def launches(call: Callable[[], object]) -> list[Launch]:
    """The launches that a call would make."""
    made: list[Launch] = []
    with _launch.recording(
        lambda kernel, args, options: made.append(Launch(kernel, args, options))
    ):
        call()
    return made


def variant(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles anew for; launches of one variant share their code."""
    types = tuple(
        (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, torch.Tensor) else _integer(a)
        for a in launch.args
    )
    return launch.kernel.__name__, types, tuple(sorted(launch.options.items()))


def _integer(value: int) -> str:
    """The type that Triton gives to an integer that is not specialised."""
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def compile_launch(launch: Launch, case: str, target: str) -> Compiled:
    """Compile one launch; its result is cached by Triton."""
    names = launch.kernel.arg_names
    options = dict(launch.options)
    constants = {name: options.pop(name) for name in names if name in options}
    signature = dict.fromkeys(constants, "constexpr")
    attributes = {}
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = _integer(value)
    signature = {name: signature[name] for name in names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=TARGETS[target], options=options)
    registers, spills, assembly = _usage(built.asm)
    return Compiled(
        kernel=launch.kernel.__name__,
        case=case,
        target=target,
        registers=registers,
        spills=spills,
        shared=built.metadata.shared,
        warps=built.metadata.num_warps,
        assembly=assembly,
    )


def _usage(asm: dict[str, Any]) -> tuple[int, int, str]:
    """(registers, bytes of local memory, assembly)."""
    if "amdgcn" in asm:
        text = str(asm["amdgcn"])
        vectors = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        # Scalar registers spill into lanes of vector registers, not to memory.
        spilled = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
        return vectors, spilled * 4, text
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], str(asm["ptx"])


def compile_all(targets: Sequence[str], full: bool = False) -> Iterator[Compiled]:
    """Every distinct kernel of `cases` on every target."""
    seen = set()
    for case, call in cases(full).items():
        for launch in launches(call):
            key = variant(launch)
            if key in seen:
                continue
            seen.add(key)
            for target in targets:
                yield compile_launch(launch, case, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; returns 1 where a kernel spills registers."""
    parser = argparse.ArgumentParser(
        prog="python -m pymerge.triton_kernels.aot", description=__doc__
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument(
        "--full", action="store_true", help="every dtype, number of models and trim"
    )
    parsed = parser.parse_args(arguments)
    spilled = 0
    write = sys.stdout.write
    write(
        f"{'target':8} {'kernel':18} {'case':26} {'registers':>9} {'warps':>5} {'spills':>6}"
        f" {'shared':>7}\n"
    )
    for one in compile_all(parsed.target or list(TARGETS), parsed.full):
        spilled += one.spills > 0
        write(
            f"{one.target:8} {one.kernel:18} {one.case:26} {one.registers:9} {one.warps:5} "
            f"{one.spills:6} {one.shared:7}\n"
        )
        sys.stdout.flush()
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
