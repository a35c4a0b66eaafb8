"""peft's own `_test_weighted_combination_of_adapters`, on models that need no download. Run by `run.py`
beside peft's tests, of which it is one.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft_cases import KINDS, tiny
from tests.testing_common import PeftCommonTester


class _Made:
    """What peft's tests take for a class of transformers: a model is made, not loaded."""

    @staticmethod
    def from_pretrained(name):
        kind, dtype = name.split("-")
        return tiny(kind, getattr(torch, dtype))


class TestAdapters(PeftCommonTester):
    transformers_class = _Made
    torch_device = "cpu"

    def prepare_inputs_for_testing(self):
        return {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6)}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_weighted_combination_of_adapters(self, kind, dtype):
        options = {"task_type": "CAUSAL_LM", "r": 8, "init_lora_weights": False}
        self._test_weighted_combination_of_adapters(f"{kind}-{dtype}", LoraConfig, options)
