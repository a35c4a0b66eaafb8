"""`pymerge verify`: a merged folder is whole, and transformers loads and runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from pymerge.cli.main import commands
from pymerge.engine import loading
from pymerge.engine.merge import merge_checkpoints
from pymerge.engine.verify import Verification, verify_folder
from pymerge.errors import CheckpointError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
VISION = {k: v for k, v in TEXT.items() if k != "vocab_size"} | HEADS | {"image_size": 8, "patch_size": 4}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **HEADS, **IDS))


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (llama, "it generates"),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=32)
        ),
        "it generates",
    ),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**TEXT, **HEADS)), "computes"),
    "classifier": (
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**TEXT, **HEADS, num_labels=3)
        ),
        "computes",
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
                decoder_start_token_id=0,
            )
        ),
        "it generates",
    ),
    "t5 encoder and decoder": (
        lambda: transformers.T5Model(
            transformers.T5Config(
                vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
            )
        ),
        "computes",
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
        "computes",
    ),
    "clip": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=TEXT | HEADS | IDS, vision_config=VISION, projection_dim=8
            )
        ),
        "computes",
    ),
    "whisper": (
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, num_mel_bins=8,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                decoder_ffn_dim=16, max_source_positions=20, max_target_positions=16,
                decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **IDS,
            )
        ),
        "it generates",
    ),
}  # fmt: skip


def merged(root: Path, make: Callable[[], Any] = llama, **options: Any) -> Path:
    torch.manual_seed(0)
    make().save_pretrained(root / "m")
    config = {"merge_method": "passthrough", "models": [{"model": str(root / "m")}]}
    merge_checkpoints(config, root / "out", **options)
    return root / "out"


@pytest.mark.parametrize("name", MODELS)
def test_models_of_many_kinds_load_and_run(tmp_path: Path, name: str) -> None:
    make, said = MODELS[name]
    found = loading.check(merged(tmp_path, make))
    assert not found["problems"]
    assert "no tensor is missing" in found["done"][0] and said in found["done"][-1]


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_a_problem_and_not_filled_at_random(tmp_path: Path) -> None:
    out = merged(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    changed(out, lambda tensors: tensors.pop(name))
    (problem,) = loading.check(out)["problems"]
    assert "1 tensor that the weights lack" in problem and name in problem


def test_what_is_left_over_is_said(tmp_path: Path) -> None:
    out = merged(tmp_path)
    changed(out, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(2)}))
    found = loading.check(out)
    assert not found["problems"] and "it does not use 1: mtp.fc.weight" in found["done"][0]


def test_other_shapes_and_infinities_are_problems(tmp_path: Path) -> None:
    out = merged(tmp_path)
    changed(out, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    (problem,) = loading.check(out)["problems"]
    assert "NaN or infinite" in problem
    changed(out, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    (problem,) = loading.check(out)["problems"]
    assert "transformers cannot load it as LlamaForCausalLM" in problem or "shapes" in problem


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"architectures": ["NobodysModel"]}, "does not know its architecture, NobodysModel"),
        ({"architectures": ["logging"]}, "does not know its architecture, logging"),
        ({"architectures": ["is_torch_available"]}, "does not know its architecture, is_torch"),
        ({"architectures": ["__version__"]}, "does not know its architecture, __version__"),
        ({"architectures": [5]}, "does not know its architecture, 5"),
        (
            {"architectures": ["X"], "auto_map": {"AutoModel": "modeling_x.X"}},
            "code of the folder's own, which is not run",
        ),
        ({"model_type": "nobodys"}, "transformers cannot read config.json"),
        ({"num_hidden_layers": 2}, "fills them at random: model.layers.1"),
        ({"hidden_size": 16}, "cannot load it as LlamaForCausalLM"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, entries: dict[str, Any], said: str) -> None:
    out = merged(tmp_path)
    edit(out, **entries)
    (problem,) = loading.check(out)["problems"]
    assert said in problem


def test_without_a_config_or_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = merged(tmp_path)
    (out / "config.json").unlink()
    assert "there is no config.json" in loading.check(out)["problems"][0]
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "pip install transformers" in loading.check(out)["problems"][0]


def test_hashes_come_first(tmp_path: Path) -> None:
    out = merged(tmp_path)
    changed(out, lambda tensors: tensors["model.norm.weight"].zero_())
    found = verify_folder(out)
    assert found == Verification(
        (), ("model.safetensors is not what the merge wrote; merge again",)
    )
    (out / "model.safetensors").unlink()
    (out / "config.json").unlink()
    save_file({"a": torch.ones(1)}, out / "other.safetensors")
    problems = " | ".join(verify_folder(out).problems)
    assert "model.safetensors" in problems and "other.safetensors: weights that" in problems
    assert "config.json" in problems and "and not there" in problems


def test_what_is_no_merge(tmp_path: Path) -> None:
    for name in ("nothing", "a" * 300, "a\0b"):
        with pytest.raises(CheckpointError, match="is no folder"):
            verify_folder(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"no pymerge_manifest\.json"):
        verify_folder(tmp_path)
    for text, said in (
        ('{"format": 1}', r"is damaged \(pymerge: Field required\); merge again"),
        (
            '{"format": 2, "pymerge": "9.9"}',
            r"is of format 2, by pymerge '9\.9'; this release reads",
        ),
        ("{}", r"is of format None.*; merge again, or verify with the release that made it"),
    ):
        (tmp_path / "pymerge_manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            verify_folder(tmp_path)


def test_modules_beside_the_caller_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -c` would import them from the working directory."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    (problem,) = verify_folder(merged(tmp_path), libraries=30 << 20).problems
    assert "imported" not in problem.replace("cannot be imported", "")


def test_memory_is_bounded(tmp_path: Path) -> None:
    (problem,) = verify_folder(merged(tmp_path), libraries=30 << 20).problems
    assert "memory" in problem or "cannot be imported" in problem or "ended" in problem


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments], catch_exceptions=False)


def test_the_commands_say_it_and_their_exit_status(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "m")
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {tmp_path / 'm'}}}]\n")
    out = tmp_path / "out"
    result = invoke("merge", recipe, out, "--verify")
    assert result.exit_code == 0
    hashes, loads, runs = result.stdout.splitlines()[-3:]
    assert hashes == "1 weight file is as pymerge_manifest.json says (SHA-256)"
    assert loads.startswith("LlamaForCausalLM loads in transformers")
    assert runs.startswith("it generates (4 tokens")
    edit(out, num_hidden_layers=2)
    result = invoke("verify", out)
    assert result.exit_code == 1 and "error: " in result.stderr
    assert f"{out}: config.json: not what the merge wrote" in result.stderr
    assert f"{out}: LlamaForCausalLM has" in result.stderr and "at random" in result.stderr
    assert "as pymerge_manifest.json says" in result.stdout
    (out / "model.safetensors").unlink()
    result = invoke("verify", out, "--quiet")
    assert result.exit_code == 1 and not result.stdout and "model.safetensors" in result.stderr
