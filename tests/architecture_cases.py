"""Tiny models of many architectures, and data for them: texts for `pymerge stats`,
batches for those that see or hear.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pymerge.statistics import Prediction

t = pytest.importorskip("transformers")

Batch = dict[str, torch.Tensor]

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FEW = {key: TEXT[key] for key in TEXT if key != "num_key_value_heads"}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_MOE = {**TEXT, "num_experts_per_tok": 2}
_QWEN2_VL_SEES = {
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "hidden_size": 32,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}

_MODELS: dict[str, Callable[[], Any]] = {
    "T5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                   decoder_start_token_id=0)),
    "BART": lambda: t.BartForConditionalGeneration(
        t.BartConfig(max_position_embeddings=64, **SEQ2SEQ)),
    "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
    "GPT-2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)),
    "GPT-NeoX": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**FEW)),
    "Phi-3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**TEXT)),
    "Mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_MOE, num_local_experts=4)),
    "Qwen3-MoE": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**_MOE, head_dim=8, moe_intermediate_size=16, num_experts=4)),
    "PhiMoE": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**_MOE, num_local_experts=4)),
    "Granite MoE": lambda: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**_MOE, num_local_experts=4)),
    "gpt-oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**_MOE, head_dim=8, num_local_experts=4,
                       layer_types=["full_attention"] * 2)),
    "Llama 4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(**{**_MOE, "num_experts_per_tok": 1}, head_dim=8,
                           intermediate_size_mlp=48, num_local_experts=4)),
    "Mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2,
                      time_step_rank=4, pad_token_id=0)),
    "RWKV": lambda: t.RwkvForCausalLM(
        t.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32,
                     intermediate_size=48, context_length=64)),
    "BERT": lambda: t.BertForSequenceClassification(t.BertConfig(**FEW, num_labels=3)),
    "DeBERTa-v2": lambda: t.DebertaV2ForSequenceClassification(
        t.DebertaV2Config(**FEW, relative_attention=True, pos_att_type=["p2c", "c2p"],
                          position_buckets=16, num_labels=3)),
    "LLaVA": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_feature_layer=-1,
                      vision_config=t.CLIPVisionConfig(**VISION), image_token_index=5)),
    "Gemma 3": lambda: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config={**TEXT, "head_dim": 8, "layer_types": ["full_attention"] * 2},
                       vision_config={**VISION, "vision_use_head": False}, mm_tokens_per_image=4,
                       image_token_index=5, boi_token_index=6, eoi_token_index=7)),
    "Qwen2-VL": lambda: t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": _ROPE},
                        vision_config=_QWEN2_VL_SEES, image_token_id=5, video_token_id=8,
                        vision_start_token_id=6, vision_end_token_id=7)),
    "ViT": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=3)),
    "CLIP": lambda: t.CLIPModel(
        t.CLIPConfig(vision_config=VISION, text_config={**FEW, "eos_token_id": 2},
                     projection_dim=16)),
    "Whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=16,
                        max_target_positions=32, suppress_tokens=None,
                        begin_suppress_tokens=None)),
}  # fmt: skip


def tiny(name: str, seed: int) -> Any:
    """A model with random weights, biases included."""
    torch.manual_seed(seed)
    made = _MODELS[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1 or not parameter.any():
                parameter.normal_(0, 0.05)
    return made.eval()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{i}": i for i in range(64)}
    fast = Tokenizer(models.WordLevel(words, unk_token="t3"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="t3", pad_token="t0", eos_token="t2"
    )


def texts(seed: int, targets: bool) -> str:
    """JSONL for `pymerge stats`."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"t{draw.randrange(9, 64)}" for _ in range(draw.randrange(low, high)))

    rows = (
        {"input": words(4, 12), "target": words(2, 6)} if targets else {"text": words(6, 14)}
        for _ in range(24)
    )
    return "\n".join(map(json.dumps, rows))


def images(folder: Path, seed: int) -> Path:
    """A folder with PNG files and the JSONL that names them, with labels."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(24):
        pixels = torch.randint(256, (20, 12, 3), generator=draw, dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "label": f"LABEL_{number % 3}"}))
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder / "data.jsonl"


# preprocessor_config.json of a ViT for `VISION`.
PROCESSOR = json.dumps(
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
)


def _tokens(images: int = 0) -> Batch:
    """Eight texts, each with so many places for images behind its first token."""
    ids = torch.randint(9, 64, (8, 8 + images))
    ids[:, 1 : 1 + images] = 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images() -> Batch:
    return {"pixel_values": torch.randn(8, 3, 16, 16)}


def _of_gemma3() -> Batch:
    batch = _tokens(4) | _images()
    return batch | {"token_type_ids": (batch["input_ids"] == 5).long()}


def _of_qwen2_vl() -> Batch:
    batch = _tokens(4)
    batch["input_ids"][:, 0] = 6
    return batch | {
        "mm_token_type_ids": (batch["input_ids"] == 5).long(),
        "pixel_values": torch.randn(8 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 8),
    }


def _of_whisper() -> Batch:
    return {"input_features": torch.randn(8, 8, 32), "labels": torch.randint(9, 64, (8, 6))}


BATCHES: dict[str, Callable[[], Batch]] = {
    "LLaVA": lambda: _tokens(16) | _images(),
    "Gemma 3": _of_gemma3,
    "Qwen2-VL": _of_qwen2_vl,
    "CLIP": lambda: _tokens() | _images(),
    "Whisper": _of_whisper,
}


def _next_tokens(model: nn.Module, batch: Batch) -> Prediction:
    return Prediction(model(**batch).logits[:, :-1], None, batch["attention_mask"][:, 1:])


LOSSES: dict[str, Any] = {
    "LLaVA": _next_tokens,
    "Gemma 3": _next_tokens,
    "Qwen2-VL": _next_tokens,
    "CLIP": lambda model, batch: Prediction(model(**batch).logits_per_image),
    "Whisper": "seq2seq",
}
