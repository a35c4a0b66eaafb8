"""Whole-process merges of a 494M-parameter bf16 family: `pymerge merge` and, where installed,
`mergekit-yaml`, in turn.

    python benchmarks/bench_merge.py --work DIR [--runs 3] [--methods ties,linear] [--out benchmarks/results/NAME]

Writes a base and two fine-tunes in the shape of Qwen2-0.5B into DIR (3 GB, kept for the next run),
warms the page cache, and
times each command from start to exit: start-up is included, as is writing the merged model.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click
import torch
import yaml
from safetensors.torch import save_file

from pymerge.bench import describe_machine

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 896, 24, 14, 2, 4864, 151936
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151643,
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    key_value = HIDDEN // HEADS * KV_HEADS
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        named |= {
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            layer + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            layer + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
            layer + "self_attn.k_proj.bias": (key_value,),
            layer + "self_attn.k_proj.weight": (key_value, HIDDEN),
            layer + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            layer + "self_attn.q_proj.bias": (HIDDEN,),
            layer + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            layer + "self_attn.v_proj.bias": (key_value,),
            layer + "self_attn.v_proj.weight": (key_value, HIDDEN),
        }
    return named | {"model.norm.weight": (HIDDEN,)}


def make_family(work: Path) -> None:
    """base, a and b: fine-tunes at a distance of some units in the last place, as light fine-tunes
    are.
    """
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes().items()
    }
    for model in ("base", "a", "b"):
        folder = work / model
        if (folder / "model.safetensors").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        scale = 0 if model == "base" else 3e-4
        tensors = {
            name: (t + scale * torch.randn(t.shape, generator=generator)).bfloat16()
            for name, t in base.items()
        }
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_config(work: Path, method: str) -> Path:
    parameters = {"weight": 0.5} if method == "linear" else {"weight": 0.5, "density": 0.2}
    config = {
        "merge_method": method,
        "models": [{"model": str(work / m), "parameters": parameters} for m in ("a", "b")],
        "dtype": "bfloat16",
    }
    if method != "linear":
        config["base_model"] = str(work / "base")
    path = work / f"{method}.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def timed(command: list[str], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    return seconds


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--methods", default="ties,linear", show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(work: Path, runs: int, methods: str, out: Path | None) -> None:
    work = work.resolve()
    make_family(work)
    for file in work.glob("*/model.safetensors"):
        with file.open("rb") as handle:
            while handle.read(1 << 24):
                pass
    mergekit = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or shutil.which(
        "mergekit-yaml"
    )
    results = []
    for method in methods.split(","):
        config, target = write_config(work, method), work / "merged"
        ours = [sys.executable, "-m", "pymerge", "merge", str(config), str(target), "--quiet"]
        theirs = [mergekit, str(config), str(target), "--no-copy-tokenizer"] if mergekit else None
        times: dict[str, list[float]] = {"pymerge": [], "mergekit": []}
        timed(ours, target)
        for _ in range(runs):
            times["pymerge"].append(timed(ours, target))
            if theirs:
                times["mergekit"].append(timed(theirs, target))
        row = {"method": method, **{f"{k}_s": v for k, v in times.items()}}
        line = f"{method}: pymerge {median(times['pymerge']):.2f} s"
        if theirs:
            row["ratio"] = median(times["mergekit"]) / median(times["pymerge"])
            line += f", mergekit-yaml {median(times['mergekit']):.1f} s, {row['ratio']:.1f} times"
        results.append(row)
        click.echo(line)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    click.echo(f"largest resident set of a child process: {peak:.0f} MB (mapped files included)")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        stem = out.with_suffix("") if out.suffix == ".json" else out
        Path(f"{stem}.json").write_text(
            json.dumps({"machine": describe_machine(), "rows": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
