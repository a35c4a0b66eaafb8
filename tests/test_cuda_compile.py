"""What nvcc makes of csrc/cuda: every kernel compiles for sm_80 and sm_90 without spilling registers, contracting or
splitting accesses, into a module that imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# As an installation compiles them, with the assembler's report. The rest, which other tests compile too, in haste.
BUILD = {
    "PYMERGE_CUDA": "1",
    "PYMERGE_CUDA_ARCHS": "80;90+PTX",
    "CXXFLAGS": "-O0 -DPYMERGE_FEW_FUSED=1",
}
KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'(.*?)Used (\d+) registers", re.DOTALL
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """(a copy of the tree with the extension in it, what the build printed)."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    pytest.importorskip("pybind11")
    tree = tmp_path_factory.mktemp("cuda") / "tree"
    compiled = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "pymerge", "triton_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=compiled)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "kept").mkdir()
    kept = f"--keep --keep-dir {tree / 'kept'}"
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, **BUILD, "NVCC": NVCC, "NVCC_APPEND_FLAGS": f"-Xptxas -v {kept}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return tree, done.stdout


def test_every_kernel_compiles_without_spilling(tree, record_property):
    _, text = tree
    assert not re.search(r"\bwarning\b", text), text
    kernels = 0
    for symbol, arch, between, registers in KERNEL.findall(text):
        kernels += 1
        record_property(f"{arch} {symbol}", f"{registers} registers")
        assert int(registers) <= 255
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", between), (
            arch,
            symbol,
            between,
        )
    # Functions that are called and not inlined are reported as well.
    assert not re.search(r"\b[1-9]\d* bytes spill", text), text
    assert kernels == text.count("Compiling entry function") >= 2 * 60
    assert text.count("for 'sm_80'") == text.count("for 'sm_90'")
    assert all(f"{source.name}.o" in text for source in SOURCES)


def test_no_kernel_keeps_a_stack(tree):
    """A stack frame is memory traffic: registers indexed at run time, or a parameter copied."""
    _, text = tree
    assert "bytes stack frame" in text
    assert not re.search(r"\b[1-9]\d* bytes stack frame", text), text


@pytest.fixture
def assemblies(tree):
    """PTX of every source for both architectures, by the file's name."""
    folder, _ = tree
    found = {path.name: path.read_text() for path in sorted((folder / "kept").glob("*.ptx"))}
    assert len(found) == 2 * len(SOURCES), list(found)
    return found


def test_every_rounding_is_ieee(assemblies):
    """fma would round once where the spec rounds twice, .ftz flush subnormals, div.full and div.approx be off."""
    for name, text in assemblies.items():
        found = re.findall(r"\bfma\.\S+|\S+\.ftz\S*|\S+\.approx\S*|\bdiv\.full\S*", text)
        assert not found, (name, found)


def test_the_fast_kernels_move_16_bytes_at_a_time(assemblies):
    """A load for each model and the base and one store, each one instruction on global memory."""
    kernels = 0
    for name, text in assemblies.items():
        for body in re.split(r"\.(?:entry|func)\b", text)[1:]:
            models = re.match(r" \w*4fastILi(\d)E", body)
            if models is None:
                continue
            kernels += 1
            loads = len(re.findall(r"\bld\.global\.nc\.v4\.", body))
            stores = len(re.findall(r"\bst\.global\.\w+\.v4\.", body))
            assert (loads, stores) == (int(models[1]) + 1, 1), (name, body[:80])
            assert not re.search(r"\b(ld|st)(\.v[24])?\.[a-z]\d+", body), (name, body[:80])
    assert kernels == 2 * 3 * 3 * 8  # architectures, types, passes, numbers of models


def test_the_updates_of_conjugate_gradient_move_16_bytes_at_a_time(assemblies):
    """Beside the accesses of one element, for rows that are not aligned: of fp64 two elements, of fp32 four."""
    moved = {"dot": (2, 0), "advance": (4, 2), "turn": (3, 1)}
    kernels = 0
    for name, text in assemblies.items():
        for body in re.split(r"\.(?:entry|func)\b", text)[1:]:
            kernel = re.match(r" \w*cg_(dot|advance|turn)_kernelI([fd])E", body)
            if kernel is None:
                continue
            kernels += 1
            wide = "v4.f32" if kernel[2] == "f" else "v2.f64"
            loads = len(re.findall(rf"\bld\.global\.(?:nc|cg)\.{wide}", body))
            stores = len(re.findall(rf"\bst\.global\.cg\.{wide}", body))
            want = moved[kernel[1]]  # a loop may be unrolled
            assert loads and loads % want[0] == 0 and stores * want[0] == loads * want[1], (
                name,
                kernel[0],
            )
    assert kernels == 2 * 2 * 3  # architectures, types, kernels


def test_the_module_imports_without_a_device(tree):
    folder, _ = tree
    code = "from pymerge import _C; assert _C.with_cuda; print(_C.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(folder)
