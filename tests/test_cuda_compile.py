"""What nvcc makes of csrc/cuda: every kernel compiles for sm_80 and sm_90 without spilling registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-c"]
ARCHS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'(.*?)Used (\d+) registers", re.DOTALL
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """File name -> what the assembler says of it."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(source: Path) -> tuple[str, str]:
        command = [
            NVCC,
            *FLAGS,
            *ARCHS,
            f"-I{CSRC}",
            str(source),
            "-o",
            str(folder / f"{source.name}.o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return source.name, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(compile_one, SOURCES))


def test_every_kernel_compiles_without_spilling(reports, record_property):
    kernels = 0
    for name, text in reports.items():
        assert "warning" not in text, text
        for symbol, arch, between, registers in KERNEL.findall(text):
            kernels += 1
            record_property(f"{name} {arch} {symbol}", f"{registers} registers")
            assert int(registers) <= 255
            assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", between), (
                name,
                arch,
                symbol,
                between,
            )
        # Functions that are called and not inlined are reported as well.
        assert not re.search(r"\b[1-9]\d* bytes spill", text), (name, text)
    assert kernels >= 2 * 60


def test_no_kernel_keeps_a_stack(reports):
    """A stack frame is memory traffic: registers indexed at run time, or a parameter copied."""
    for name, text in reports.items():
        assert not re.search(r"\b[1-9]\d* bytes stack frame", text), (name, text)
