"""What a machine can do that has a wheel of pymerge and nothing else: `python smoke.py`, outside of
any clone. Prints one line, or ends with the first thing that is wrong.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import pymerge

RECIPE = """
merge_method: ties
base_model: base
models:
  - model: one
    parameters: {weight: 1.0, density: 0.2}
  - model: two
    parameters: {weight: 0.7, density: 0.3}
parameters: {normalize: true}
dtype: bfloat16
"""


def command(*words: str, folder: Path) -> str:
    called = [sys.executable, "-I", "-m", "pymerge", *words]
    done = subprocess.run(called, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words} ended with {done.returncode}\n{done.stderr}"
    return done.stdout


def main() -> None:
    installed = Path(pymerge.__file__)
    assert "site-packages" in installed.parts, f"{installed} is not what the wheel installed"
    version = importlib.metadata.version("pymerge-kernels")

    # The compiled kernels give the bits of the reference, at every level of this processor.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(100_003, generator=generator)
    models = [base + 1e-3 * torch.randn(100_003, generator=generator) for _ in range(3)]
    merged = pymerge.ties(models, base, density=0.2, backend="cpu")
    assert torch.equal(merged, pymerge.ties(models, base, density=0.2, backend="reference"))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, model in enumerate(("base", "one", "two")):
            generator.manual_seed(seed)
            (folder / model).mkdir()
            (folder / model / "config.json").write_text('{"model_type": "llama"}')
            tensors = {
                f"layers.{i}.weight": torch.randn(64, 32, generator=generator).bfloat16()
                for i in range(3)
            }
            save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / "recipe.yml").write_text(RECIPE)
        command("plan", "recipe.yml", folder=folder)
        command("merge", "recipe.yml", "merged", folder=folder)
        states = [load_file(folder / model / "model.safetensors") for model in ("one", "two")]
        want = pymerge.merge(
            states,
            load_file(folder / "base" / "model.safetensors"),
            method="ties",
            density=[0.2, 0.3],
            weights=[1.0, 0.7],
        )
        got = load_file(folder / "merged" / "model.safetensors")
        assert got.keys() == want.keys()
        assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
        command("doctor", folder=folder)
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"pymerge-kernels {version} works with Python {python} and torch {torch.__version__}")


if __name__ == "__main__":
    main()
