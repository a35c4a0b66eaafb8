"""Recipes as model cards have them, in their own spelling, through three doors: `pymerge merge`,
`pymerge-mergekit-yaml`, and mergekit's own command (pytest -m parity).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mergekit_cases import in_order
from safetensors.torch import load_file
from trained_tokenizers import tokenizer

pytestmark = pytest.mark.parity

pytest.importorskip("mergekit", reason="mergekit is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

LAYERS = 8
ROWS = {"llama2": 376, "qwen": 344}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = ["<|im_start|>user\nthe words of a model<|im_end|>\n", "naïve café 12345", ""]

TIES = """
models:
  - model: MODELS/base
    # no parameters necessary for base model
  - model: MODELS/a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: MODELS/b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: MODELS/c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: MODELS/base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
"""

DARE_TIES = """
# Daredevil-8B style
models:
    - model: "MODELS/base"
      # No parameters necessary for base model
    - model: "MODELS/a"
      parameters:
          density: 0.6
          weight: 0.16
    - model: 'MODELS/b'
      parameters: {density: 0.56, weight: 0.14}
    - model: MODELS/c
      parameters:
          density: 0.55
          weight: 0.1
merge_method: dare_ties
base_model: MODELS/base
parameters:
    int8_mask: true
dtype: float16
seed: 42
"""

SLERP = """
slices:
  - sources:
      - model: MODELS/a
        layer_range: [0, 8]
      - model: MODELS/b
        layer_range: [0, 8]
merge_method: slerp
base_model: MODELS/a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float32
"""

SLERP_EMBED = """
models:
  - model: MODELS/a
  - model: MODELS/b
merge_method: slerp
base_model: MODELS/b
dtype: bfloat16
parameters:
  embed_slerp: true
  t: [0, 0.5, 1, 0.5, 0] # V shaped curve: a for input & output, b in the middle layers
"""

SLERP_VALUES = """
slices:
- sources:
  - model: MODELS/x
    layer_range:
    - 0
    - 8
  - model: MODELS/c
    layer_range: [0,8]
merge_method: slerp
base_model: MODELS/c
tokenizer_source: union
parameters:
  t:
  - filter: lm_head
    value: [0.75]
  - filter: embed_tokens
    value: [0.75]
  - filter: value
    value: .25
  - filter: layernorm
    value: [0.75, 0.25]
  - filter: modelnorm
    value: [0.75]
  - value: [0.1, 0.9]
dtype: float32
"""

MODEL_STOCK = """
models:
  - model: MODELS/a
  - model: MODELS/b
  - model: MODELS/c
merge_method: model_stock
base_model: MODELS/base
parameters:
  filter_wise: false
  normalize: false
  int8_mask: true
dtype: bfloat16
"""

DELLA_LINEAR = """
x-models: &a {model: MODELS/a, parameters: &usual {weight: 0.5, density: 0.5}}
merge_method: della_linear
base_model: MODELS/base
dtype: bfloat16
tokenizer_source: union
parameters:
  epsilon: 0.04
  lambda: 1.05
  int8_mask: true
  rescale: true
  normalize: true
models:
  - *a
  - model: MODELS/x
    parameters:
      <<: *usual
      weight: [0.2, 0.1, 0.25]
"""

BREADCRUMBS_TIES = """
models:
  - model: MODELS/a
    parameters:
      weight: [0.2, 0.3, 0.2]
      gamma: 0.02
      density: 0.9
  - model: MODELS/b
    parameters:
      weight:
        - filter: v_proj
          value: [0, 0, 1, 1]
        - filter: o_proj
          value: [1, 1, 0, 0]
        - filter: up_proj
          value: 1
        - filter: gate_proj
          value: 0
        - value: 1
      density: .9
merge_method: breadcrumbs_ties
base_model: MODELS/base
tokenizer_source: base
dtype: float32
out_dtype: bfloat16
"""

NUSLERP = """
merge_method: nuslerp
models:
  - model: MODELS/a
    parameters:
      weight:
        - filter: self_attn
          value: [0.2, 0.8]
        - value: 0.4
  - model: MODELS/x
    parameters:
      weight: 0.6
dtype: float32
tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    <|im_start|>:
      source: "MODELS/a"
    <|im_end|>:
      source: MODELS/a
      force: true
chat_template: "chatml"
"""

SCE = """
models:
  # Pivot model
  - model: MODELS/base
  # Target models
  - model: MODELS/a
  - model: MODELS/b
  - model: MODELS/c
merge_method: sce
base_model: MODELS/base
parameters:
  select_topk: 0.15
dtype: float32
tokenizer:
  source: MODELS/a
"""

STACK = """
dtype: float16
merge_method: passthrough
slices:
- sources:
  - layer_range: [0, 4]
    model: MODELS/a
- sources:
  - layer_range: [2, 6]
    model: MODELS/b
- sources:
  - layer_range: [3, 7]
    model: MODELS/a
    parameters:
      scale:
        - filter: o_proj
          value: 0.0
        - filter: down_proj
          value: 0.0
        - value: 1.0
- sources:
  - layer_range: [5, 8]
    model: MODELS/b
"""

MIXED_SLICES = """
slices:
  - sources:
      - {model: MODELS/a, layer_range: [0, 3]}
      - {model: MODELS/b, layer_range: [1, 4]}
    parameters: {t: 0.25}
  - sources: [{model: MODELS/a, layer_range: [3, 8]}, {model: MODELS/b, layer_range: [2, 7]}]
merge_method: slerp
base_model: MODELS/a
parameters: {t: 0.5}
dtype: float32
"""

SOUP = """
name: "soup"
models:
  - model: MODELS/a
    layer_range: [0, 8]
    parameters:
      weight: 1
  - model: MODELS/b
    parameters:
      weight: 1.0
  - model: MODELS/c
    parameters:
      weight: 1e-1
merge_method: linear
normalize: true
dtype: float16
"""

PLAIN_SUM = """
models:
- model: MODELS/a
  parameters:
    weight: [1.0, 0.5]
- model: MODELS/x
  parameters:
    weight: [0.0, 0.5]
merge_method: linear
parameters:
  normalize: no
dtype: float32
tokenizer_source: union
"""

LORAS = """
models:
  - model: MODELS/base+MODELS/lora
    parameters:
      weight: 0.6
      density: 0.5
  - model: MODELS/a+MODELS/lora2
    parameters:
      weight: 0.7
      density: 0.5
merge_method: ties
base_model: MODELS/base
dtype: float32
"""

LORA_COPY = """
merge_method: passthrough
models: [{model: MODELS/base+MODELS/lora}]
dtype: float32
"""

ARITHMETIC = """
base_model: MODELS/base
merge_method: task_arithmetic
models:
    - {model: MODELS/a, parameters: {weight: 0.75}}
    - {model: MODELS/b, parameters: {weight: -0.5}} # take it away
parameters: {lambda: 0.8}
dtype: "float32"
"""

ZOO = {
    name: value for name, value in globals().items() if name.isupper() and "models" in str(value)
}
ZOO |= {name: globals()[name] for name in ("SLERP", "SLERP_VALUES", "STACK", "MIXED_SLICES")}
FLAGS = (
    "--copy-tokenizer --allow-crimes --out-shard-size 1B --lazy-unpickle --random-seed 7".split()
)
RANDOM = ("DARE_TIES", "DELLA_LINEAR")


@pytest.fixture(scope="module", params=["llama2", "qwen"])
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b, c whose rows are padded to one size, a with ChatML's tokens in some of these; x with a
    vocabulary of its own; two adapters of base. All have real tokenizers.
    """
    import transformers

    root = tmp_path_factory.mktemp("models")
    (root / request.param).touch()
    added = {"a": ["<|im_start|>", "<|im_end|>"], "x": ["<tool>", "<|im_end|>", "</tool>"]}
    for seed, name in enumerate(("base", "a", "b", "c", "x")):
        made = tokenizer(request.param, added.get(name, []))
        if name == "a":
            made.chat_template = CHATML
        sizes = {
            "vocab_size": len(made) if name == "x" else ROWS[request.param],
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        if request.param == "qwen":
            config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True)
            kind = transformers.Qwen2ForCausalLM
        else:
            config = transformers.LlamaConfig(**sizes)
            kind = transformers.LlamaForCausalLM
        torch.manual_seed(0)
        model = kind(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        model.to(torch.bfloat16 if name == "c" else torch.float32).save_pretrained(root / name)
        made.save_pretrained(root / name)
    for name, modules in (("lora", ["q_proj", "v_proj"]), ("lora2", "all-linear")):
        base = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
        options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=modules, **options))
        adapted.save_pretrained(root / name)
    return root


def command(door: str) -> Any:
    if door == "theirs":
        from mergekit.scripts.run_yaml import main

        return main
    from pymerge.cli import main as own

    return own.mergekit_yaml if door == "as mergekit" else own.commands


def run(door: str, recipe: Path, out: Path) -> None:
    arguments = [str(recipe), str(out), "--lora-merge-cache", str(out.parent / "cache"), *FLAGS]
    if door == "ours":
        arguments = ["merge", *arguments]
    result = CliRunner().invoke(command(door), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


@pytest.mark.parametrize("name", ZOO)
def test_recipes(name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit.config import MergeConfiguration

    monkeypatch.setattr(MergeConfiguration, "referenced_models", in_order)
    recipe = tmp_path / "mergekit_config.yml"
    recipe.write_text(ZOO[name].replace("MODELS", str(models)), encoding="utf-8")
    for door in ("ours", "as mergekit"):
        run(door, recipe, tmp_path / door)
    loads(tmp_path / "ours")
    if name == "STACK" and (models / "qwen").exists():
        with pytest.raises(Exception, match="layer_types"):  # mergekit leaves them as they were
            run("theirs", recipe, tmp_path / "theirs")
        return
    run("theirs", recipe, tmp_path / "theirs")
    theirs, mine = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    other = weights(tmp_path / "as mergekit")
    assert mine.keys() == theirs.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    same_config(tmp_path)
    same_tokenizer(tmp_path)
    assert {key: t.dtype for key, t in mine.items()} == {key: t.dtype for key, t in theirs.items()}
    assert {key: t.shape for key, t in mine.items()} == {key: t.shape for key, t in theirs.items()}
    if name in RANDOM:
        similar(mine, theirs, weights(models / "base"))
    else:
        for key, wanted in theirs.items():
            close(name, key, mine[key], wanted)


def loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert model.float()(torch.arange(6)[None]).logits.isfinite().all()


def close(name: str, key: str, mine: torch.Tensor, wanted: torch.Tensor) -> None:
    step = torch.finfo(wanted.dtype).eps * wanted.abs().max()
    far = (mine.double() - wanted.double()).abs() > 8 * step
    # In 16 bits mergekit rounds after every step, and cuts among equal magnitudes.
    assert far.float().mean() <= (0 if wanted.dtype == torch.float32 else 0.02), (name, key)


def similar(mine: Any, theirs: Any, base: Any) -> None:
    """Other draws of the same distribution: task vectors of like size."""
    for key, wanted in theirs.items():
        if wanted.shape == base[key].shape and wanted.numel() > 200:
            start = base[key].double()
            sizes = [(t.double() - start).abs().mean() for t in (mine[key], wanted)]
            assert 0.8 < float(sizes[0] / sizes[1]) < 1.25, key


def same_config(root: Path) -> None:
    mine, theirs = (
        json.loads((root / door / "config.json").read_text()) for door in ("ours", "theirs")
    )
    for key in ("vocab_size", "num_hidden_layers", "dtype", "torch_dtype", "architectures"):
        if key in theirs:
            assert mine.get(key) == theirs[key], key


def same_tokenizer(root: Path) -> None:
    from transformers import AutoTokenizer

    mine, theirs = (AutoTokenizer.from_pretrained(root / door) for door in ("ours", "theirs"))
    assert mine.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        ids = mine(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert mine.decode(ids) == theirs.decode(ids)
    assert mine.special_tokens_map == theirs.special_tokens_map
    assert bool(mine.chat_template) == bool(theirs.chat_template)
    if mine.chat_template:
        talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
        said = [each.apply_chat_template(talk, tokenize=False) for each in (mine, theirs)]
        assert said[0] == said[1]
