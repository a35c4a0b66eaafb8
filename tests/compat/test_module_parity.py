"""Recipes of several modules: T5's halves and a model that sees, as mergekit merges them
(pytest -m parity).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mergekit_cases import in_order
from safetensors.torch import load_file

from pymerge.cli.main import mergekit_yaml

pytestmark = pytest.mark.parity

pytest.importorskip("mergekit", reason="mergekit is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Of the text model, which has 8 numbers in a head.
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
T5 = """
merge_method: ties
base_model: MODELS/base
modules:
  encoder:
    models:
    - {model: MODELS/a, parameters: {weight: [0.2, 0.8], density: 0.6}}
    - {model: MODELS/b, parameters: {weight: 0.5, density: 0.5}}
  decoder:
    parameters: {weight: 0.3}
    models:
    - {model: MODELS/b, parameters: {density: [0.5, 0.75]}}
  shared:
    models: [{model: MODELS/a, parameters: {weight: 1}}]
parameters: {normalize: false}
dtype: float32
"""
MISTRAL3 = """
merge_method: linear
modules:
  text_decoder:
    models:
    - {model: MODELS/a, parameters: {weight: [{filter: mlp, value: 0.3}, {value: 0.6}]}}
    - {model: MODELS/b, parameters: {weight: [0.5, 0.2]}}
  multi_modal_projector:
    models: [{model: MODELS/base, parameters: {weight: 1}}]
  vision_tower:
    models:
    - {model: MODELS/base, parameters: {weight: 1}}
    - {model: MODELS/b, parameters: {weight: [0, 1]}}
dtype: float32
"""


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def mistral3() -> Any:
    text = SIZES | {
        "model_type": "mistral",
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    seeing = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    seeing |= {"model_type": "pixtral", "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    config = transformers.Mistral3Config(text_config=text, vision_config=seeing)
    return transformers.Mistral3ForConditionalGeneration(config)


@pytest.mark.parametrize(("make", "recipe"), [(t5, T5), (mistral3, MISTRAL3)], ids=["t5", "seeing"])
def test_several_modules(
    make: Any, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.scripts.run_yaml import main

    monkeypatch.setattr(MergeConfiguration, "referenced_models", in_order)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name)
    path = tmp_path / "recipe.yml"
    path.write_text(recipe.replace("MODELS", str(tmp_path)))
    merged = []
    for command, out in ((main, "theirs"), (mergekit_yaml, "ours")):
        arguments = [str(path), str(tmp_path / out), "--no-copy-tokenizer"]
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        files = (tmp_path / out).glob("*.safetensors")
        merged.append({name: w for file in files for name, w in load_file(file).items()})
    theirs, mine = merged
    assert mine.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert (mine[name] - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name
    loaded, report = type(make()).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()) and isinstance(loaded, torch.nn.Module)
