"""What a collection was asked for, and how far it is: plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pymerge.statistics._batches import Mask
from pymerge.statistics._loss import Loss

GRADIENT_KINDS = ("output_grad_gram", "diagonal_fisher", "block_fisher")


@dataclass(frozen=True)
class Progress:
    """Where a collection stands: pass `number` of `passes`, and what that pass has read so far."""

    number: int
    passes: int
    batches: int
    examples: int
    tokens: int


@dataclass(frozen=True)
class Options:
    """What a collection was asked for: the arguments of `collect` that its passes need."""

    kinds: tuple[str, ...]
    loss: Loss | None
    loss_name: str
    labels: str
    samples: int
    seed: int
    mask: Mask
    max_tokens: int | None
    autocast: torch.dtype | None
    loss_scale: float
    checkpoint_every: int | None
    progress: Callable[[Progress], None] | None

    @property
    def gradients(self) -> bool:
        return any(kind in GRADIENT_KINDS for kind in self.kinds)
