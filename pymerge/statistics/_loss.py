"""Per-example losses: what a gradient is taken of, with given labels or labels drawn from the model
(rules S7, S8).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch.nn import functional

from pymerge.messages.arguments import argument, check_flags
from pymerge.messages.words import type_of
from pymerge.ops.tensors import check_floats, check_numbers
from pymerge.rules import types

LABELS: tuple[str, ...] = get_args(types.Labels)
TASKS: tuple[str, ...] = get_args(types.Task)
_IGNORED = -100
_SAMPLING_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for a batch of n examples, for the collector to take gradients of.

    logits: (n, classes), or (n, positions, classes) where an example has several predictions; for a
        `gaussian` prediction the mean (n, width) of a normal distribution with unit variance.
    labels: (n,) or (n, positions) class indices, -100 for none; (n, width) targets of a gaussian.
        Only labels="empirical" needs them.
    mask: (n, positions), nonzero where there is a prediction. Positions without one count for
        nothing.
    """

    logits: torch.Tensor
    labels: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    gaussian: bool = False


def check_result(result: Any) -> None:
    """What a loss function returned holds its values in memory (E5)."""
    if isinstance(result, torch.Tensor):
        check_floats("what loss returned", result, "collect")
    if isinstance(result, Prediction):
        check_floats("what loss returned's logits", result.logits, "collect")
        for name in ("labels", "mask"):
            value = getattr(result, name)
            if value is not None:
                check_numbers(f"what loss returned's {name}", value, "collect")


Loss = Callable[[torch.nn.Module, Any], "Prediction | torch.Tensor"]


def named_loss(task: str) -> Loss:
    """The loss of a transformers model for one of `TASKS`."""
    losses: dict[str, Loss] = {
        "causal-lm": causal_lm,
        "masked-lm": classification,
        "token-classification": classification,
        "sequence-classification": classification,
        "image-classification": classification,
        "seq2seq": seq2seq,
        "embedding": embedding,
    }
    if task not in losses:
        raise ValueError(
            f"{argument('loss', task)} is not one of {', '.join(map(repr, TASKS))}; "
            "or pass a function (model, batch) -> Prediction"
        )
    return losses[task]


def causal_lm(model: torch.nn.Module, batch: Mapping[str, Any]) -> Prediction:
    """The next token, at every unmasked position; `labels` (not shifted, -100 ignored) where the
    batch has them.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    labels = batch["labels"] if batch.get("labels") is not None else batch["input_ids"]
    mask = batch.get("attention_mask")
    return Prediction(logits, labels[:, 1:], None if mask is None else mask[:, 1:])


def classification(model: torch.nn.Module, batch: Mapping[str, Any]) -> Prediction:
    """A class per example or, where the logits have three dimensions, per position."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    labels = batch.get("labels")
    if labels is None and logits.dim() == 3:
        return Prediction(logits, None, batch.get("attention_mask"))
    return Prediction(logits, labels)


def seq2seq(model: torch.nn.Module, batch: Mapping[str, Any]) -> Prediction:
    """The tokens of the target, `labels` (-100 ignored), each after those before it."""
    if batch.get("labels") is None:
        raise ValueError("the batch has no labels, the tokens of the targets; add them")
    return Prediction(model(**batch).logits, batch["labels"])


def embedding(model: torch.nn.Module, batch: Mapping[str, Any]) -> Prediction:
    """The mean-pooled, normalised sentence embedding as the mean of a unit gaussian."""
    hidden = model(**batch).last_hidden_state
    mask = batch.get("attention_mask")
    weight = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
    weight = weight.to(hidden.device, torch.float32).unsqueeze(-1)
    pooled = (hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
    return Prediction(functional.normalize(pooled, dim=-1), gaussian=True)


def per_example_losses(
    result: Prediction | torch.Tensor, labels: str, samples: int, seed: int, numbers: Sequence[int]
) -> Iterator[torch.Tensor]:
    """One (n,) tensor of negative log-likelihoods per draw of labels, each summed over an example's
    predictions.

    A plain tensor of per-example losses is passed through. `numbers` are the examples' in the whole
    data: an example's draws depend on the seed and on its number alone (S8).
    """
    if isinstance(result, torch.Tensor):
        if result.dim() != 1:
            raise ValueError(
                f"loss returned a tensor of shape {tuple(result.shape)}; return one loss per"
                " example, (n,), not reduced over the batch, or a Prediction"
            )
        if labels != "empirical":
            raise ValueError(
                f"{argument('labels', labels)} needs the model's distribution, but loss returned"
                f" plain losses; return a Prediction, or pass {argument('labels', 'empirical')}"
            )
        yield result
        return
    if not isinstance(result, Prediction):
        raise TypeError(
            f"loss returned {type_of(result)}; return a Prediction or a tensor of"
            " per-example losses"
        )
    work = torch.float64 if result.logits.dtype == torch.float64 else torch.float32
    logits = result.logits.to(work)
    check_flags(gaussian=result.gaussian)
    if result.gaussian:
        yield from _gaussian(logits, result.labels, labels, samples, seed, numbers)
        return
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; expected (n, classes) or (n, positions,"
            " classes)"
        )
    flat = logits if logits.dim() == 3 else logits.unsqueeze(1)
    mask = _mask(result, flat)
    log_p = functional.log_softmax(flat, dim=-1)
    if labels == "empirical":
        if result.labels is None:
            raise ValueError(
                f"{argument('labels', 'empirical')} needs labels in the batch; add them, or pass "
                f"{argument('labels', 'true')}"
            )
        yield _nll(log_p, result.labels.reshape(mask.shape).clamp(min=0), mask)
    elif labels == "exact":
        if flat.shape[1] != 1:
            raise ValueError(
                f"{argument('labels', 'exact')} needs one prediction per example; pass "
                f"{argument('labels', 'true')}"
            )
        for label in range(flat.shape[2]):
            chosen = log_p[:, 0, label]
            yield -chosen * (0.5 * chosen).exp().detach() * mask[:, 0]
    else:
        for draw in range(samples):
            yield _nll(log_p, _draw(log_p.detach(), mask, seed, numbers, draw), mask)


def _mask(result: Prediction, flat: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device)
    for name, given in (("mask", result.mask), ("labels", result.labels)):
        if given is None:
            continue
        if given.numel() != mask.numel():
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} for logits of shape"
                f" {tuple(result.logits.shape)}; they must agree up to the last dimension"
            )
        given = given.to(flat.device).reshape(mask.shape)
        mask &= (given != 0) if name == "mask" else (given != _IGNORED)
    return mask


def _nll(log_p: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    chosen = log_p.gather(-1, labels.to(log_p.device).unsqueeze(-1)).squeeze(-1)
    return -torch.where(mask, chosen, 0).sum(1)


def _draw(
    log_p: torch.Tensor, mask: torch.Tensor, seed: int, numbers: Sequence[int], draw: int
) -> torch.Tensor:
    """Labels drawn by inverting the cumulative distribution in fp64 at uniform numbers made on the
    CPU.
    """
    uniform = torch.zeros(mask.shape, dtype=torch.float64, device="cpu")
    host = mask.cpu()
    for row, kept in enumerate(host):
        generator = _generator(seed, numbers[row], draw)
        uniform[row, kept] = torch.rand(
            int(kept.sum()), dtype=torch.float64, device="cpu", generator=generator
        )
    uniform = uniform.to(log_p.device).reshape(-1, 1)
    flat = log_p.reshape(-1, log_p.shape[-1])
    labels = []
    for part, level in _chunks(flat, uniform):
        cumulative = part.double().exp().cumsum(-1)
        labels.append(torch.searchsorted(cumulative, level * cumulative[:, -1:], right=True))
    if not labels:  # no example is long enough for a prediction
        return torch.zeros(mask.shape, dtype=torch.int64, device=log_p.device)
    found = torch.cat(labels).clamp(max=flat.shape[1] - 1)
    return found.reshape(mask.shape)


def _chunks(
    flat: torch.Tensor, uniform: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = max(1, _SAMPLING_ELEMENTS // max(1, flat.shape[1]))
    for start in range(0, flat.shape[0], rows):
        yield flat[start : start + rows], uniform[start : start + rows]


def _gaussian(
    mean: torch.Tensor,
    targets: torch.Tensor | None,
    labels: str,
    samples: int,
    seed: int,
    numbers: Sequence[int],
) -> Iterator[torch.Tensor]:
    if labels == "exact":
        for coordinate in range(mean.shape[1]):
            yield mean[:, coordinate]
        return
    if labels == "empirical":
        if targets is None:
            raise ValueError(
                f"{argument('labels', 'empirical')} needs targets; pass"
                f" {argument('labels', 'true')} for an embedding"
            )
        yield 0.5 * (mean - targets.to(mean)).square().reshape(mean.shape[0], -1).sum(1)
        return
    for draw in range(samples):
        noise = torch.stack(
            [
                torch.randn(
                    mean.shape[1:],
                    dtype=torch.float64,
                    device="cpu",
                    generator=_generator(seed, numbers[row], draw),
                )
                for row in range(mean.shape[0])
            ]
        ).to(mean)
        target = (mean + noise).detach()
        yield 0.5 * (mean - target).square().reshape(mean.shape[0], -1).sum(1)


def _generator(seed: int, example: int, draw: int) -> torch.Generator:
    words = f"{seed} {example} {draw}".encode()
    key = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(key >> 1)
