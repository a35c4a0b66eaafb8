"""Merges of folders on the GPU at hand: the files of the CPU, byte for byte; layers that are solved,
to rounding; memory that runs out. test_gpu_engine.py tests the same engine without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import solve_cases
import torch
from folder_cases import family, read_result, recipe, write_family, write_model
from mats_cases import relative

from pymerge.engine.merge import merge_checkpoints

SIZES = [4096, 1024, 14336, 5003, 70_001, 1 << 20, (1 << 22) + 7, 3 << 20, 33]
METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.3},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05},
    "linear": {},
}


@pytest.fixture(autouse=True)
def backend(on_gpu: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PYMERGE_BACKEND", on_gpu)
    yield on_gpu
    torch.cuda.empty_cache()


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it for a merge on the CPU, whatever the variable says."""

    def merge(config: Any, out: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PYMERGE_BACKEND")
            merge_checkpoints(config, out, seed=5)
        return out

    return merge


def write(root: Path, dtype: torch.dtype) -> list[Path]:
    """A base and three fine-tunes with tensors that fill the GPU's memory in parts."""
    g = torch.Generator().manual_seed(3)
    base = [torch.randn(n, generator=g) * 0.02 for n in SIZES]
    folders = []
    for k in range(4):
        state = {
            f"layers.{j}.weight": (b + k * 0.001 * torch.randn(len(b), generator=g)).to(dtype)
            for j, b in enumerate(base)
        }
        folders.append(write_model(root / f"model{k}", state))
    return folders


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_files_are_those_of_the_cpu(
    tmp_path: Path, cpu: Any, method: str, dtype: torch.dtype
) -> None:
    """Whole, in parts, and in the smallest parts."""
    config = recipe(method, write(tmp_path, dtype), **METHODS[method])
    want = weights(cpu(config, tmp_path / "cpu"))
    for memory in (None, "64MB", "20MB"):
        out = tmp_path / f"gpu-{memory}"
        summary = merge_checkpoints(config, out, device="cuda", device_memory=memory, seed=5)
        assert weights(out) == want, memory
        assert any("computed on" in note for note in summary.notes)


@pytest.mark.parametrize("method", ["mats", "regmean"])
def test_layers_are_solved_there(tmp_path: Path, cpu: Any, method: str) -> None:
    folders = write_family(tmp_path, dtype=torch.float32)
    states = family(dtype=torch.float32)
    kinds = ("input_gram", "output_grad_gram")
    files = [
        solve_cases.write_statistics(tmp_path / f"{k}.stats", states[k], k, kinds=kinds)
        for k in (1, 2)
    ]
    config = solve_cases.recipe(method, folders[1:], files, folders[0])
    want = read_result(cpu(config, tmp_path / "cpu"))
    for memory in (None, "24MB"):
        out = tmp_path / f"gpu-{memory}"
        summary = merge_checkpoints(config, out, device="cuda", device_memory=memory)
        for name, tensor in read_result(out).items():
            assert relative(tensor, want[name]) < 1e-5, name
        assert any("were solved on" in note for note in summary.notes)


def test_memory_that_runs_out_halves_the_parts(tmp_path: Path, cpu: Any) -> None:
    config = recipe("ties", write(tmp_path, torch.bfloat16), density=0.2)
    want = weights(cpu(config, tmp_path / "cpu"))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (48 << 20)) / total)
    try:
        options = {"device": "cuda", "device_memory": "400MB"}
        summary = merge_checkpoints(config, tmp_path / "gpu", seed=5, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("ran out of memory" in note for note in summary.notes)
    assert weights(tmp_path / "gpu") == want
