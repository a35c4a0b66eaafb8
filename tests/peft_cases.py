"""Models of a few thousand weights for adapters, each of an architecture of its own."""

from __future__ import annotations

import torch

KINDS = ("opt", "gpt2", "llama", "neox")


def tiny(kind, dtype):
    """A model of a few thousand weights, of an architecture of its own."""
    import transformers

    torch.manual_seed(0)
    if kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=40, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=32,
        )  # fmt: skip
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=32
        )
    else:
        sizes = {
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        kinds = {"llama": transformers.LlamaConfig, "neox": transformers.GPTNeoXConfig}
        config = kinds[kind](**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
