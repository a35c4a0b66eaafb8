"""Sums for parameters that products take directly: routers, experts in one parameter (rule S1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, Protocol

import torch
from torch import nn

from pymerge.statistics._grams import add_gram, full_precision
from pymerge.statistics._targets import Layer, Targets


class _Sums(Protocol):
    """What is needed of a recorder."""

    phase: Literal["forward", "backward", "loop"]
    probing: bool
    gradients: bool
    loss_scale: float
    targets: Targets
    keys: set[str]
    sums: dict[str, torch.Tensor]
    new_tokens: Counter[str]

    def positions(self, name: str, shape: torch.Size) -> tuple[torch.Tensor | None, int]: ...

    def aside(self, device: torch.device) -> AbstractContextManager[None]: ...


class Products:
    """What a recorder does with a product that `_functional.Watch` saw."""

    def __init__(self, recorder: _Sums) -> None:
        self._of = recorder

    def called(
        self,
        parameter: nn.Parameter,
        place: int | None,
        transposed: bool,
        x: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        """A product with a parameter, or with a slice of one (S1)."""
        target = self._of.targets.functional.get(id(parameter))
        if target is None or target.transposed != transposed or self._of.phase == "loop":
            return None
        if place is None and parameter.dim() == 3:
            pairs: list[tuple[int | None, torch.Tensor, tuple[Layer, ...]]]
            pairs = [(k, x[k], group) for k, group in enumerate(target.slices)]
        else:
            pairs = [(None, x, target.slices[place or 0])]
        wanted, changed = False, False
        for _, rows, group in pairs:
            if group and self._of.phase == "forward":
                self._input(group, target.pooled, rows)
            wanted |= any(
                f"output_grad_gram/{p.name}" in self._of.keys for p in (*group, *target.pooled)
            )
        if not (self._of.gradients and wanted and torch.is_grad_enabled()):
            return None
        if not output.requires_grad:
            output, changed = output.requires_grad_().clone(), True
        kept = [(k, group, self._rows_of(group, rows)) for k, rows, group in pairs if group]
        hook = partial(self._gradient, kept, target.pooled)
        output.register_hook(hook)  # type: ignore[no-untyped-call]
        return output if changed else None

    def _rows_of(self, group: Sequence[Layer], x: torch.Tensor) -> torch.Tensor | None:
        return self._of.positions(group[0].name, x.shape)[0]

    def _input(self, group: Sequence[Layer], pooled: Sequence[Layer], x: torch.Tensor) -> None:
        index, count = self._of.positions(group[0].name, x.shape)
        for layers in (group, pooled):
            for layer in layers:
                self._of.new_tokens[layer.name] += count
            if layers and f"input_gram/{layers[0].name}" in self._of.keys and not self._of.probing:
                with full_precision(x.device):
                    rows = x.reshape(-1, layers[0].d_in)
                    add_gram(self._of.sums[f"input_gram/{layers[0].name}"], rows, index)

    def _gradient(
        self,
        kept: Sequence[tuple[int | None, Sequence[Layer], torch.Tensor | None]],
        pooled: Sequence[Layer],
        g: torch.Tensor,
    ) -> None:
        if self._of.phase != "backward" or self._of.probing:
            return
        with self._of.aside(g.device):
            for place, group, index in kept:
                own = g if place is None else g[place]
                flat = own.reshape(-1, own.shape[-1])
                for layers in (group, pooled):
                    widths = [layer.d_out for layer in layers]
                    columns = torch.split(flat, widths, 1) if layers else ()
                    for layer, rows in zip(layers, columns, strict=True):
                        key = f"output_grad_gram/{layer.name}"
                        if key in self._of.keys:
                            add_gram(self._of.sums[key], rows, index, 1 / self._of.loss_scale)
