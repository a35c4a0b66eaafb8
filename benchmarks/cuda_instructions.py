"""Instructions of the fast CUDA kernels' loops beside what a GPU can issue while the memory moves
the bytes. Needs no GPU.

    python benchmarks/cuda_instructions.py [--arch sm_90] [--processors 132] [--ghz 1.98] [--gb-per-s 4800]

Compiles csrc/cuda/ties/fast_*.cu with nvcc, reads the machine code with cuobjdump (the toolkit's or
Triton's) and counts the instructions of the loop that moves 16 bytes a model at a time, a warp's
issue slot each; a processor has four a clock. `room` is the share of the memory bandwidth at which
all issue slots would be taken: a bound, not a measurement, and a kernel needs it well above what it
    is to reach. Defaults are the H200's data sheet.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TYPES = {"f": ("fp32", 4), "NS_8BFloat16E": ("bf16", 2), "NS_4HalfE": ("fp16", 2)}
NAME = re.compile(r"\w*4fastILi(\d)E(f|NS_8BFloat16E|NS_4HalfE)LNS0_4PassE(\d)ELb([01])ELb([01])E")
LANES = 32
SLOTS = 4  # of a processor and clock


@dataclass(frozen=True)
class Loop:
    """per_element: instructions. sampled: of the pass by sampled thresholds. unit: weights of 1."""

    dtype: str
    models: int
    sampled: bool
    vote: bool
    unit: bool
    per_element: float

    def bytes_moved(self) -> int:
        """An element's: of every model, the base and the output."""
        return (self.models + 2) * (4 if self.dtype == "fp32" else 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--processors", type=int, default=132)
    parser.add_argument("--ghz", type=float, default=1.98)
    parser.add_argument("--gb-per-s", type=float, default=4800)
    arguments = parser.parse_args()
    print(f"{'dtype':5} {'models':>6}  {'pass':6} {'rule':12} {'instructions':>12} {'room':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((CSRC / "cuda/ties").glob("fast_*.cu")):
            cubin = Path(folder) / f"{source.stem}.cubin"
            compile_source(source, arguments.arch, cubin)
            for loop in sorted(loops(cubin), key=lambda x: (x.sampled, x.unit, x.vote, x.models)):
                rule = "no election" if not loop.vote else "unit" if loop.unit else "weighted"
                slots = 1e9 * arguments.processors * SLOTS * LANES * arguments.ghz
                room = slots / loop.per_element * loop.bytes_moved() / (1e9 * arguments.gb_per_s)
                print(
                    f"{loop.dtype:5} {loop.models:6}  {'sample' if loop.sampled else 'known':6}"
                    f" {rule:12} {loop.per_element:12.1f} {100 * room:5.0f}%"
                )


def compile_source(source: Path, arch: str, cubin: Path) -> None:
    """As setup.py does, for one architecture."""
    command = ["nvcc", "-std=c++17", "-O3", "--fmad=false", f"-I{CSRC}", f"-arch={arch}", "-cubin"]
    subprocess.run([*command, "-o", str(cubin), str(source)], check=True)


def cuobjdump() -> str | None:
    """The CUDA toolkit's, else the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        own = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(own) if own.exists() else None
    return found


def loops(cubin: Path) -> Iterator[Loop]:
    """The loop of every fast kernel; of the two of a pass by sampled thresholds the usual one."""
    tool = cuobjdump()
    if tool is None:
        raise SystemExit("cuobjdump is neither on the path nor with Triton; install one of both")
    text = subprocess.run([tool, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    for part in text.split("Function : ")[1:]:
        name = NAME.match(part)
        if name is None:
            continue
        dtype, size = TYPES[name[2]]
        yield Loop(
            dtype,
            int(name[1]),
            name[3] == "2",
            name[4] == "1",
            name[5] == "1",
            _shortest(part) / (16 // size),
        )


def _shortest(function: str) -> int:
    """Instructions of the shortest loop with a store of 16 bytes."""
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", function)
    code = [(int(address, 16), text) for address, text in lines]
    stores = [at for at, text in code if re.search(r"\bSTG\S*\.128", text)]
    found = []
    for at, text in code:
        back = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        begin = int(back[1], 16) if back else at
        if begin < at and any(begin <= store <= at for store in stores):
            found.append(sum(begin <= address <= at for address, _ in code))
    return min(found)


if __name__ == "__main__":
    main()
