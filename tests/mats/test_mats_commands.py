"""The three commands of docs/mats.md, as they stand there, on tiny transformers models."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mats_cases import relative
from safetensors.torch import load_file

from pymerge.engine.state_dict_statistics import merge_with_statistics

transformers = pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[2] / "docs/mats.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Three commands\n", 1)[1].split("\n## ", 1)[0]
WORDS = [f"w{i}" for i in range(24)]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", SECTION, re.S)
    assert found is not None
    return found.group(1)


def write_model(folder: Path, seed: int) -> None:
    """A fine-tune, so to say, of a random language model, with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def test_three_commands(tmp_path: Path) -> None:
    for number, name in enumerate(("code", "maths"), 1):
        write_model(tmp_path / name, number)
        lines = [
            " ".join(WORDS[(number * i + j) % 24] for j in range(3 + i % 7)) for i in range(20)
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "mats.yml").write_text(block("yaml"), encoding="utf-8")
    commands = block("sh").splitlines()
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "pymerge"
        done = subprocess.run(
            [sys.executable, "-m", "pymerge", *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    merged, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.dtype == torch.bfloat16
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("w1 w2 w3")["input_ids"]
    assert bool(merged(torch.tensor([ids])).logits.isfinite().all())

    states = [load_file(tmp_path / name / "model.safetensors") for name in ("code", "maths")]
    files = [tmp_path / f"{name}.stats.safetensors" for name in ("code", "maths")]
    want, reports = merge_with_statistics(states, None, files)
    got = load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in want.items():
        assert relative(got[name], tensor) < 4e-3, name
    solved = [r for r in reports if r.solver == "cg"]
    assert len(solved) == 14 + 1  # seven linear layers a block, and the head
    assert all(r.status == "iterations" and r.objective_decrease > 0 for r in solved)
    written = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert written["summary"]["iterations"] == len(solved)
