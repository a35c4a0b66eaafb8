"""transformers loads what was merged, and it computes what the merged state dict computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import recipe

from pymerge.engine.merge import merge_checkpoints
from pymerge.reference.ties import ties as reference_ties
from pymerge.rules.ties import resolve_options

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)
    ),
    "qwen2 tied": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SMALL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, intermediate_size=48, num_labels=3)
    ),
    "bert masked": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SMALL, intermediate_size=48)
    ),
    "gpt2 tied": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
}


def make_family(name: str, root: Path, dtype: torch.dtype) -> list[Path]:
    torch.manual_seed(0)
    start = FAMILIES[name]()
    folders = []
    for number in range(3):
        model = FAMILIES[name]()
        model.load_state_dict(start.state_dict())
        if number:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        folders.append(root / f"m{number}")
        model.to(dtype).save_pretrained(
            folders[-1], max_shard_size="20KB" if number == 1 else "5GB"
        )
    return folders


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_and_computes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folders = make_family(name, tmp_path, dtype)
    out = tmp_path / "out"
    merge_checkpoints(recipe("ties", folders, density=0.3), out, out_shard_size="40KB")

    kind = type(FAMILIES[name]())
    models = [kind.from_pretrained(folder, dtype="auto") for folder in folders]
    options = resolve_options(2, density=0.3, weights=0.5)
    wanted = kind.from_pretrained(folders[0], dtype="auto")
    states = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for parameter_name, parameter in wanted.named_parameters():
            base, *tuned = (state[parameter_name].data for state in states)
            rule = options.rule(parameter.numel(), parameter_name)
            reference_ties(tuned, base, rule, parameter.data)

    loaded, report = kind.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    assert loaded.dtype == dtype
    for parameter_name, parameter in wanted.named_parameters():
        assert torch.equal(loaded.get_parameter(parameter_name), parameter), parameter_name
    assert torch.equal(logits(loaded), logits(wanted))
    assert not torch.equal(logits(loaded), logits(models[0]))


def test_stacked_layers_load(tmp_path: Path) -> None:
    folders = make_family("qwen2 tied", tmp_path, torch.float32)
    source = str(folders[0])
    pieces = [{"sources": [{"model": source, "layer_range": r}]} for r in ([0, 2], [0, 2])]
    merge_checkpoints({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 4
    first = transformers.AutoModelForCausalLM.from_pretrained(source)
    for number, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, first.model.layers[number % 2].get_parameter(name))
    assert logits(model).isfinite().all()
