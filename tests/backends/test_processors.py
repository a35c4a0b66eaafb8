"""The CPU kernels on processors that are not here, where there are a cross compiler and an
emulator: aarch64, and x86-64 without AVX-512 or AVX2.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AARCH64 = shutil.which("aarch64-linux-gnu-g++")
HERE = shutil.which("c++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
SYSTEM = Path("/usr/aarch64-linux-gnu")
# Optimised there, where GCC would contract to fused multiply-adds if it were allowed to.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]


def build(folder: Path, cxx: str, *flags: str) -> Path:
    """The CPU kernels with tests/sanitize/driver.cpp, which merges random tensors and prints a
    digest of the results.
    """
    sources = [*sorted((ROOT / "csrc/cpu").rglob("*.cpp")), ROOT / "tests/sanitize/driver.cpp"]
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile_one(pair: tuple[Path, Path]) -> None:
        command = [cxx, *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-c", pair[0], "-o", pair[1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, zip(sources, objects, strict=True)))
    subprocess.run([cxx, "-pthread", *objects, "-o", folder / "driver"], check=True)
    return folder / "driver"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if AARCH64 is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed")
    return build(tmp_path_factory.mktemp("aarch64"), AARCH64, "-O2")


def test_aarch64_compiles_without_a_warning(driver):
    assert driver.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.slow
def test_aarch64_gives_the_same_bits(driver, tmp_path):
    if QEMU is None or not SYSTEM.is_dir() or HERE is None:
        pytest.skip(
            "qemu-aarch64, the libraries of aarch64 or a compiler for this machine is missing"
        )
    printed = [
        subprocess.run([*command, "20"], capture_output=True, text=True, timeout=600, check=True)
        for command in (
            [QEMU, "-L", SYSTEM, driver],
            [build(tmp_path, HERE, "-O0")],
        )
    ]
    assert "20 merges at every level, clean, digest " in printed[0].stdout
    assert printed[0].stdout == printed[1].stdout


@pytest.mark.parametrize(
    ("processor", "usable"), [("Nehalem", ["portable"]), ("Haswell", ["portable", "avx2"])]
)
def test_a_level_that_the_processor_lacks_is_an_error(processor, usable):
    """`pymerge.backends.native` takes the best that there is, and says so where another is asked
    for.
    """
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None or platform.machine() != "x86_64":
        pytest.skip("qemu-x86_64 is not installed")
    code = f"""
    import os, sys
    sys.path.insert(0, {str(ROOT)!r})
    from pymerge.backends import native
    os.environ.pop("PYMERGE_CPU_LEVEL", None)
    print([level for level, usable in native.cpu_levels().items() if usable], native.cpu_level())
    os.environ["PYMERGE_CPU_LEVEL"] = "avx512"
    try:
        print(native.cpu_level())
    except ValueError as error:
        print(error)
    """
    python = Path(sys.executable).resolve()
    command = [emulator, "-cpu", processor, python, "-S", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{usable} {usable[-1]}",
        "PYMERGE_CPU_LEVEL=avx512 is not available on this processor; available here: "
        + ", ".join(usable),
    ]
