"""Merges of a base with two adapters against the same merges of the merged models, in turn.

    python benchmarks/bench_adapters.py --work DIR [--runs 3] [--rank 16] [--layers 12]

Writes a bf16 base, two adapters of all its linear layers and the two merged models into DIR, checks
that both merges agree, and gives for whole processes the median time, the processors' time, and the
most anonymous memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click
import torch
from safetensors.torch import load_file, save_file

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 16000


def shapes(layers: int) -> dict[str, tuple[int, int]]:
    named = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        for name in "qkvo":
            named[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            named[f"model.layers.{i}.mlp.{name}_proj.weight"] = (INTERMEDIATE, HIDDEN)
        named[f"model.layers.{i}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return named


def write(folder: Path, file: str, state: dict[str, torch.Tensor], config: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / file, metadata={"format": "pt"})
    name = "adapter_config.json" if file.startswith("adapter") else "config.json"
    (folder / name).write_text(json.dumps(config))


def make(work: Path, layers: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for name, shape in shapes(layers).items()
    }
    write(work / "base", "model.safetensors", base, {"torch_dtype": "bfloat16"})
    for k in range(2):
        factors, full = {}, dict(base)
        for name, (outputs, inputs) in shapes(layers).items():
            if ".layers." in name:
                a = torch.randn(rank, inputs, generator=generator) * 0.02
                b = torch.randn(outputs, rank, generator=generator) * 0.02
                module = f"base_model.model.{name.removesuffix('.weight')}"
                factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
                full[name] = (base[name].float() + 2 * b @ a).bfloat16()
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
        settings["base_model_name_or_path"] = str(work / "base")
        write(work / f"adapter{k}", "adapter_model.safetensors", factors, settings)
        write(work / f"model{k}", "model.safetensors", full, {"torch_dtype": "bfloat16"})


def recipe(work: Path, method: str, kind: str) -> Path:
    models = [{"model": str(work / f"{kind}{k}"), "parameters": {"weight": 0.5}} for k in range(2)]
    config: dict[str, object] = {"merge_method": method, "models": models}
    if method != "linear":
        config |= {"base_model": str(work / "base"), "parameters": {"density": 0.5}}
    path = work / f"{method}-{kind}.yml"
    path.write_text(json.dumps(config))
    return path


def measured(path: Path, out: Path) -> tuple[float, float, float]:
    """Seconds, seconds of processors, and the most megabytes of anonymous memory."""
    shutil.rmtree(out, ignore_errors=True)
    before, start, peak = os.times(), time.perf_counter(), 0
    command = [sys.executable, "-m", "pymerge", "merge", str(path), str(out), "--quiet"]
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]))
        except OSError:  # it has ended
            pass
        time.sleep(0.01)
    seconds, after = time.perf_counter() - start, os.times()
    if process.returncode:
        raise SystemExit(process.returncode)
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    return seconds, used, peak / 1024


def check(one: Path, other: Path, method: str) -> None:
    """Both merges agree, but for the rounding of the merged models to bf16."""
    states = [load_file(folder / "model.safetensors") for folder in (one, other)]
    for name, tensor in states[0].items():
        near = torch.isclose(tensor.float(), states[1][name].float(), rtol=2e-2, atol=1e-3)
        far = 1 - near.float().mean().item()
        if far > (0.02 if method == "ties" else 0):  # what rounding puts across a threshold
            raise SystemExit(f"{method}: {name} differs in {far:.1%} of its elements")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--layers", default=12, show_default=True)
def main(work: Path, runs: int, rank: int, layers: int) -> None:
    work = work.resolve()
    make(work, layers, rank)
    for method in ("linear", "ties"):
        found: dict[str, list[tuple[float, float, float]]] = {"model": [], "adapter": []}
        paths = {kind: recipe(work, method, kind) for kind in found}
        for kind, path in paths.items():
            measured(path, work / f"out-{kind}")
        check(work / "out-model", work / "out-adapter", method)
        for _ in range(runs):
            for kind, path in paths.items():
                found[kind].append(measured(path, work / f"out-{kind}"))
        for kind, rows in found.items():
            seconds, used, memory = (median(column) for column in zip(*rows, strict=True))
            click.echo(
                f"{method} of {kind}s: {seconds:.1f} s, {used:.1f} s of processors,"
                f" {memory:.0f} MB anonymous"
            )
    for kind in ("model", "adapter"):
        shutil.rmtree(work / f"out-{kind}")


if __name__ == "__main__":
    main()
