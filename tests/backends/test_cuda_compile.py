"""What nvcc makes of csrc/cuda: every kernel compiles for sm_90 without spilling registers,
contracting or splitting accesses, but for the fast ones. With `-m slow`, all of them do,
for sm_80 and, where nvcc has it, sm_100 too, into a module that imports.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Instances of csrc/cuda/ties/fast.cuh: each takes as long as the other sources together.
FAST_SOURCES = ("fast_f32.cu", "fast_f16.cu", "fast_bf16.cu")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# (architectures, whether all of the extension): a quick one, and one that takes many minutes.
QUICK = pytest.param((["90"], False), id="sm_90")
WHOLE = pytest.param((["80", "90", "100"], True), id="whole", marks=pytest.mark.slow)
# As an installation compiles them, with the assembler's report. The rest, which other tests compile
# too, in haste.
ENVIRONMENT = {"PYMERGE_CUDA": "1", "CXXFLAGS": "-O0"}
KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'(.*?)Used (\d+) registers", re.DOTALL
)


class Build:
    """A copy of the tree in which setup.py has built the extension, and what that printed."""

    def __init__(self, folder: Path, archs: list[str], whole: bool) -> None:
        self.folder, self.archs = folder, archs
        compiled = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("csrc", "pymerge", "triton_kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=compiled)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        if not whole:  # csrc/cuda alone, into a module that does not import
            (folder / "csrc/bindings.cpp").write_text("")
            for source in (folder / "csrc/cpu").rglob("*.cpp"):
                source.unlink()
            for name in FAST_SOURCES:
                (folder / "csrc/cuda/ties" / name).unlink()
        self.sources = sorted((folder / "csrc/cuda").rglob("*.cu"))
        self.types = sum(source.name.startswith("fast_") for source in self.sources)
        (folder / "kept").mkdir()
        kept = f"--keep --keep-dir {folder / 'kept'}"
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=folder,
            env={
                **os.environ,
                **ENVIRONMENT,
                "PYMERGE_CUDA_ARCHS": ";".join(archs) + "+PTX",
                "NVCC": NVCC,
                "NVCC_APPEND_FLAGS": f"-Xptxas -v {kept}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-8000:]
        self.text = done.stdout

    @cached_property
    def assemblies(self) -> dict[str, str]:
        """PTX of every source for every architecture, by the file's name."""
        found = sorted((self.folder / "kept").glob("*.ptx"))
        assert len(found) == len(self.archs) * len(self.sources), found
        return {path.name: path.read_text() for path in found}


@pytest.fixture(scope="module", params=[QUICK, WHOLE])
def build(request, tmp_path_factory):
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    pytest.importorskip("pybind11")
    archs, whole = request.param
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    archs = [arch for arch in archs if f"sm_{arch}" in known.stdout.split()]  # sm_100 since 12.8
    return Build(tmp_path_factory.mktemp("cuda") / "tree", archs, whole)


def test_every_kernel_compiles_without_spilling(build, record_property):
    text, archs = build.text, build.archs
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
    assert kernels == text.count("Compiling entry function") >= len(archs) * (20 + 40 * build.types)
    assert all(
        text.count(f"for 'sm_{arch}'") * len(archs) == text.count("for 'sm_") for arch in archs
    )
    assert all(f"{source.name}.o" in text for source in build.sources)


def test_no_kernel_keeps_a_stack(build):
    """A stack frame is memory traffic: registers indexed at run time, or a parameter copied."""
    assert "bytes stack frame" in build.text
    assert not re.search(r"\b[1-9]\d* bytes stack frame", build.text), build.text


def _bodies(text):
    """(name, PTX) of every kernel and function."""
    for body in re.split(r"\.(?:entry|func)\b", text)[1:]:
        yield re.match(r"\s*(?:\(.*?\)\s*)?(\w+)", body, re.DOTALL)[1], body


# Of csrc/cuda/ties/fast.cuh: models, element type, pass (2: sampled thresholds), with a vote, of
# weights of 1.
FAST = re.compile(r"\w*4fastILi(\d)E(\w+?)LNS0_4PassE(\d)ELb([01])ELb([01])E")


def test_every_rounding_is_ieee(build):
    """fma would round once where the spec rounds twice, .ftz flush subnormals, div.full and
    div.approx be off. The fast kernels say where they want it, a model and element to look for what
    is not finite, and with weights once an element to look at the result; twice an element to divide
    by a count. So do matrix products, which agree to rounding.
    """
    inexact = r"\bfma\.\S+|\S+\.ftz\S*|\S+\.approx\S*|\bdiv\.full\S*"
    for name, text in build.assemblies.items():
        for function, body in _bodies(text):
            found = re.findall(inexact, body)
            kernel = FAST.match(function)
            if kernel is not None:
                K, width = int(kernel[1]), 4 if kernel[2].startswith("f") else 8
                each = K + (2 * (K > 2) if kernel[5] == "1" else 1)
                loops = 1 + (kernel[3] == "2")
                assert found == ["fma.rn.f32"] * (width * each * loops), (name, function)
            elif name.startswith("cg_small."):
                assert set(found) <= {"fma.rn.f32"}, (name, function, found)
            else:
                assert not found, (name, function, found)


def test_the_fast_kernels_move_16_bytes_at_a_time(build):
    """A load for each model and the base and one store, each one instruction on global memory;
    twice in the pass by sampled thresholds, which has a loop for brackets that have collapsed.
    """
    kernels = 0
    for name, text in build.assemblies.items():
        for function, body in _bodies(text):
            kernel = FAST.match(function)
            if kernel is None:
                continue
            kernels += 1
            loops = 1 + (kernel[3] == "2")
            loads = len(re.findall(r"\bld\.global\.nc\.v4\.", body))
            stores = len(re.findall(r"\bst\.global\.\w+\.v4\.", body))
            assert (loads, stores) == (loops * (int(kernel[1]) + 1), loops), (name, function)
            assert not re.search(r"\b(ld|st)(\.v[24])?\.[a-z]\d+", body), (name, function)
    # architectures, types, passes and rules, numbers of models
    assert kernels == len(build.archs) * build.types * 5 * 8


def test_the_general_kernels_move_16_bytes_at_a_time(build):
    """Every vector of an input or of the output, whatever the dtype: for eight elements one of a
    16-bit type, two of fp32, four of fp64. Elements one by one are for tensors that are not
    aligned, and for the last few.
    """
    kernels = {"apply": True, "merge_small": True}  # whether it writes the output
    kernels |= dict.fromkeys(("histogram", "coarse", "sample", "norm_chunks"), False)
    seen = 0
    for name, text in build.assemblies.items():
        for body in re.split(r"\.(?:entry|func)\b", text)[1:]:
            kernel = re.match(rf" \w*\d({'|'.join(kernels)})(?:I([fd])|E)", body)
            if kernel is None:
                continue
            seen += 1
            loads = Counter(re.findall(r"\bld\.global\.nc\.(v\d\.\w\d+)", body))
            stores = Counter(re.findall(r"\bst\.global\.cs\.(v\d\.\w\d+)", body))
            for found, wanted in ((loads, True), (stores, kernels[kernel[1]])):
                short, single, double = (found.pop(v, 0) for v in ("v4.u32", "v4.f32", "v2.f64"))
                doubles = 4 * short if kernel[2] == "d" else 0
                assert (short > 0) == wanted, (name, kernel[0])
                assert (single, double) == (2 * short, doubles), (name, kernel[0])
                assert not found, (name, kernel[0], found)
    # architectures; kernels, in each working precision that they have
    assert seen == len(build.archs) * 13


def test_the_updates_of_conjugate_gradient_move_16_bytes_at_a_time(build):
    """Beside the accesses of one element, for rows that are not aligned: of fp64 two elements, of
    fp32 four.
    """
    moved = {"dot": (2, 0), "advance": (4, 2), "turn": (3, 1)}
    kernels = 0
    for name, text in build.assemblies.items():
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
    assert kernels == len(build.archs) * 2 * 3  # architectures, types, kernels


def test_small_layers_take_16_bytes_at_a_time_from_shared_memory(build):
    """A product's inner loop: 2 loads, of 4 elements of each factor, to 16 multiplications."""
    kernels = 0
    for name, text in build.assemblies.items():
        if name.startswith("cg_small."):
            kernels += 1
            loads = len(re.findall(r"\bld\.shared\.v4\.f32", text))
            assert loads > 0 and len(re.findall(r"\bfma\.rn\.f32", text)) >= 8 * loads, name
    assert kernels == len(build.archs)


@pytest.mark.parametrize("build", [WHOLE], indirect=True)
def test_the_module_imports_without_a_device(build):
    code = "from pymerge import _C; assert _C.with_cuda; print(_C.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(build.folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=build.folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(build.folder)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["fast_bf16", "fast_f16"])
def test_the_oldest_devices_have_no_instruction_missing(tmp_path, kernels):
    """sm_75, which setup.py says is the first: what it lacks, the assembler finds. In haste."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    if "sm_75" not in known.stdout.split():
        pytest.skip("this nvcc no longer compiles for sm_75")
    flags = ["-std=c++17", "-O0", "-Xptxas", "-O0", "-DPYMERGE_WITH_CUDA=1", f"-I{ROOT / 'csrc'}"]
    source = ROOT / f"csrc/cuda/ties/{kernels}.cu"
    done = subprocess.run(
        [NVCC, *flags, "-arch=sm_75", "-cubin", source, "-o", tmp_path / "kernels.cubin"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_asking_whether_the_kernels_run_makes_no_context():
    """On GPU 0, for a merge on cuda:1. These calls of the runtime make none."""
    text = (ROOT / "csrc/cuda/core/runtime.cu").read_text()
    asked = text[text.index("\nstd::string why_not() {\n  int count") :]
    called = set(re.findall(r"\b(cuda[A-Z]\w+)\(", asked))
    assert called == {"cudaGetDeviceCount", "cudaDeviceGetAttribute", "cudaGetErrorString", "cudaGetLastError"}  # fmt: skip
