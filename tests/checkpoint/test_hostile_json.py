"""Damaged JSON in model folders, statistics files and manifests: an answer, or an error that names
a file; no traceback.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from folder_cases import CONFIG, family, write_model, write_sharded
from mutations import mutated
from safetensors import safe_open
from solve_cases import recipe as solve_recipe
from solve_cases import write_statistics

from pymerge.cli.main import commands
from pymerge.cli.stats import main as stats
from pymerge.engine.merge import merge_checkpoints

# How many of the mutations of each kind run; all of them where it is 0 (they passed).
SAMPLE = int(os.environ.get("PYMERGE_TEST_MUTATIONS", "40"))
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": 35, "content": "<s>", "special": True},
        {"id": 36, "content": "</s>", "special": True},
    ],
    "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(35)}, "merges": []},
}
UNIGRAM = {**TOKENIZER, "model": {"type": "Unigram", "vocab": [[f"t{i}", -1.0] for i in range(35)]}}
TOKENIZER_CONFIG = {
    "added_tokens_decoder": {"35": {"content": "<s>"}, "36": {"content": "</s>"}},
    "chat_template": "{{ messages }}",
    "eos_token": "</s>",
}
FULL_CONFIG = {
    **CONFIG,
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "eos_token_id": [36],
    "layer_types": ["full", "full"],
    "text_config": {"num_hidden_layers": 2, "vocab_size": 37, "torch_dtype": "float32"},
}
SMALL = {
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "added_tokens.json": {"<s>": 35, "</s>": 36},
    "generation_config.json": {"eos_token_id": [36], "bos_token_id": 35},
    "config.json": FULL_CONFIG,
}


def run(*arguments: object) -> str:
    """The command's text; the status is 0, or 1 with an error."""
    result = CliRunner().invoke(commands, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0 or (result.exit_code == 1 and "error: " in result.output)
    return result.output


def some(document: Any, seed: str) -> Iterator[tuple[str, bytes]]:
    every = list(mutated(document))
    chosen = random.Random(seed).sample(every, min(SAMPLE or len(every), len(every)))
    return iter(chosen)


def each(document: Any, seed: str, try_it: Callable[[bytes], object]) -> None:
    failed = []
    for what, content in some(document, seed):
        try:
            try_it(content)
        except Exception as error:
            failed.append(f"{what}: {error!r}")
    assert not failed, "\n".join(failed[:20])


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two models whose tokens have different ids, so that rows are moved and ids in configs with
    them.
    """
    states = family(1, torch.float32)
    made = [write_model(tmp_path / "a", states[0]), write_model(tmp_path / "b", states[1])]
    for folder in made:
        for name, content in SMALL.items():
            (folder / name).write_text(json.dumps(content))
    other = json.loads(json.dumps(TOKENIZER))
    other["model"]["vocab"] = {f"t{i}": (i + 1) % 35 for i in range(35)}
    (made[1] / "tokenizer.json").write_text(json.dumps(other))
    return made


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def linear(folders: list[Path], **more: Any) -> dict[str, Any]:
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    return {"merge_method": "linear", "models": models, **more}


@pytest.mark.parametrize("name", [*SMALL, "unigram"])
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "sliced"])
def test_small_files(tmp_path: Path, folders: list[Path], name: str, moved: bool) -> None:
    content = linear(folders, tokenizer_source=str(folders[0]))
    if not moved:
        sources = [{"model": str(folder), "layer_range": [0, 1]} for folder in folders]
        content = {"merge_method": "linear", "parameters": {"weight": 0.5}}
        content["slices"] = [{"sources": sources}]
    config = write_recipe(tmp_path / "r.yml", content)
    path = folders[0] / name.replace("unigram", "tokenizer.json")

    rewritten = name in ("config.json", "generation_config.json")

    def try_it(content: bytes) -> None:
        if rewritten and b"ud800" in content:
            return
        path.write_bytes(content)
        run("merge", config, tmp_path / "out", "--overwrite")

    each(UNIGRAM if name == "unigram" else SMALL[name], f"{name} {moved}", try_it)


def test_index(tmp_path: Path) -> None:
    folders = [write_sharded(tmp_path / str(k), s) for k, s in enumerate(family(1, torch.float32))]
    config = write_recipe(tmp_path / "r.yml", linear(folders))
    path = folders[0] / "model.safetensors.index.json"

    def try_it(content: bytes) -> None:
        path.write_bytes(content)
        run("plan", config)

    each(json.loads(path.read_text()), "index", try_it)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def test_safetensors_header(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(k), s) for k, s in enumerate(family(1, torch.float32))]
    config = write_recipe(tmp_path / "r.yml", linear(folders))
    path = folders[0] / "model.safetensors"
    header, data = header_of(path)

    def try_it(content: bytes) -> None:
        path.write_bytes(len(content).to_bytes(8, "little") + content + data)
        run("plan", config)

    each(header, "header", try_it)


KINDS = ("input_gram", "output_grad_gram", "diagonal_fisher")


@pytest.mark.parametrize("command", ["show", "merge", "mats", "fisher", "metadata"])
def test_statistics(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    states = family(2, torch.float32)
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(states)]
    files = [write_statistics(tmp_path / f"{k}.s", states[k], k, kinds=KINDS) for k in (1, 2)]
    other = write_statistics(tmp_path / "o.s", states[1], 1, kinds=KINDS)
    method = command if command in ("mats", "fisher") else "fisher"
    config = write_recipe(tmp_path / "r.yml", solve_recipe(method, folders[1:], files))
    with safe_open(str(files[0]), "pt") as file:
        metadata = file.metadata()
    header, data = header_of(files[0])
    document = metadata if command == "metadata" else json.loads(metadata["statistics"])
    if "progress" not in document and command != "metadata":
        document["data"][0]["digest"] = "another"
        document["progress"] = {"rows": 1, "seed": 0, "groups": 1, "layer_tokens": {"x": 1}}

    def try_it(content: bytes) -> None:
        changed = {**metadata, "statistics": content.decode("utf-8", "replace")}
        if command == "metadata":
            changed = json.loads(content) if content[:1] == b"{" else {}
        text = json.dumps({**header, "__metadata__": changed}).encode()
        files[0].write_bytes(len(text).to_bytes(8, "little") + text + data)
        if command in ("show", "metadata"):
            assert stats(["show", str(files[0]), "--tensors"]) in (0, 1)
        elif command == "merge":
            assert stats(["merge", str(tmp_path / "all.s"), str(files[0]), str(other)]) in (0, 1)
            assert stats(["merge", str(tmp_path / "all.s"), str(other), str(files[0])]) in (0, 1)
        if command not in ("show", "merge"):
            run("plan", config)

    if command == "metadata":

        def only_json(content: bytes) -> None:
            try:
                json.loads(content)
            except (ValueError, RecursionError):
                return
            try_it(content)

        each(document, command, only_json)
    else:
        each(document, command, try_it)


def test_manifest(tmp_path: Path) -> None:
    """What an interrupted merge finished is kept, whatever its manifest says, unless it is used or
    cannot be.
    """
    states = family(2, torch.float32)
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate(states)]
    files = [write_statistics(tmp_path / f"{k}.s", states[k], k) for k in (1, 2)]
    content = solve_recipe("mats", folders[1:], files, iterations=2)
    config = write_recipe(tmp_path / "r.yml", content)
    out, partial = tmp_path / "out", tmp_path / ".out.pymerge-partial"

    def stop(done: int, whole: int, name: str) -> None:
        manifest = partial / "pymerge_manifest.json"
        if manifest.exists() and json.loads(manifest.read_text())["outputs"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, out, out_shard_size=1500, progress=stop)
    held = {path.name: path.read_bytes() for path in partial.iterdir()}
    manifest = json.loads(held["pymerge_manifest.json"])

    def try_it(text: bytes) -> None:
        partial.mkdir(exist_ok=True)
        for name, whole in held.items():
            (partial / name).write_bytes(text if name == "pymerge_manifest.json" else whole)
        told = run("merge", config, out, "--out-shard-size", 1500, "--resume", "--overwrite")
        if "error: " in told:
            assert "start anew without --resume" in told
            assert all((partial / name).exists() for name in held)

    each(manifest, "manifest", try_it)
