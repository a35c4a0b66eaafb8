"""Tiny models, and the merge, for mergekit's own tests of whole merges: what `tests/common.py` has in its
repository, which the distribution lacks. `patched.py` puts this module in its place.
"""

from __future__ import annotations

import os
import tempfile

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def make_picollama(folder, vocab_size=64):
    config = LlamaConfig(**SIZES | {"vocab_size": vocab_size})
    return saved(LlamaForCausalLM(config), folder)


def make_picogranite(folder, vocab_size=64):
    config = GraniteConfig(**SIZES | {"vocab_size": vocab_size})
    return saved(GraniteForCausalLM(config), folder)


def make_gpt2size(folder, vocab_size=64):
    config = GPT2Config(n_embd=48, n_head=12, n_layer=12, n_positions=128, vocab_size=vocab_size)
    return saved(GPT2LMHeadModel(config), folder)


def make_picoLlaVa(folder):
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES))
    return saved(LlavaForConditionalGeneration(config), folder)


def run_and_check_merge(config, check_nan=True, check_tensors=True, validate=None, auto_arch=False):
    """Merge, then look at every tensor and at what the test asks for. Where UPSTREAM_DROP_IN is set,
    pymerge's function of the same name merges.
    """
    from mergekit.io import LazyTensorLoader
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    if "UPSTREAM_DROP_IN" in os.environ:
        from pymerge.compat.mergekit import run_merge
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, folder, options=MergeOptions(copy_tokenizer=config.tokenizer is None))
        AutoConfig.from_pretrained(folder)
        tensors = LazyTensorLoader.from_disk(folder)
        assert tensors.index.tensor_paths
        for name in tensors.index.tensor_paths:
            if check_tensors or check_nan:
                assert tensors.get_tensor(name).isfinite().all(), name
        if validate is not None:
            validate(folder)
