"""Small random models, padded batches, and statistics by their definitions: one example at a time,
in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

Batch = dict[str, torch.Tensor]
KINDS = ("input_gram", "output_grad_gram", "diagonal_fisher", "block_fisher")


def bert(**changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, num_labels=3, **changes,
    )  # fmt: skip
    return scrambled(transformers.BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return scrambled(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return scrambled(transformers.LlamaForCausalLM(config))


def scrambled(model: nn.Module) -> nn.Module:
    """Weights large enough that no gradient is near zero, biases and norms included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


def token_batches(
    vocabulary: int, sizes: tuple[int, ...] = (3, 2), width: int = 7, labels: int = 0
) -> list[Batch]:
    """Batches padded on the right to `width`, lengths from 2 to `width`."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in sizes:
        ids = torch.randint(1, vocabulary, (size, width), generator=generator)
        lengths = torch.randint(2, width + 1, (size,), generator=generator)
        mask = (torch.arange(width) < lengths[:, None]).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        if labels:
            batch["labels"] = torch.randint(labels, (size,), generator=generator)
        batches.append(batch)
    return batches


def single_examples(batches: list[Batch]) -> list[Batch]:
    """Every example alone and without its padding."""
    singles = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            singles.append(
                {
                    name: v[row : row + 1, :length] if v.dim() == 2 else v[row : row + 1]
                    for name, v in batch.items()
                }
            )
    return singles


def defined(
    model: nn.Module,
    examples: list[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    linear: Callable[[nn.Module], bool],
) -> dict[str, torch.Tensor]:
    """All four kinds by definition. loss gives one example's scalar loss."""
    names = {module: name for name, module in model.named_modules() if linear(module)}
    sums: dict[str, torch.Tensor] = {}

    def add(key: str, value: torch.Tensor) -> None:
        sums[key] = sums.get(key, torch.zeros_like(value)) + value.detach()

    for example in examples:
        seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def watch(module: nn.Module, args: Any, output: torch.Tensor, seen: Any = seen) -> None:
            output.retain_grad()
            seen.append((names[module], args[0], output))

        handles = [module.register_forward_hook(watch) for module in names]
        model.zero_grad()
        loss(model, example).backward()
        for handle in handles:
            handle.remove()
        for name, x, y in seen:
            x = x.reshape(-1, x.shape[-1])
            add(f"input_gram/{name}", sum(torch.outer(row, row) for row in x))
            g = torch.zeros_like(y) if y.grad is None else y.grad
            add(
                f"output_grad_gram/{name}",
                sum(torch.outer(row, row) for row in g.reshape(-1, g.shape[-1])),
            )
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            add(f"diagonal_fisher/{name}", gradient.square())
            if gradient.dim() == 1:
                add(f"block_fisher/{name}", torch.outer(gradient, gradient))
    model.zero_grad()
    return sums
