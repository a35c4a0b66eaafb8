"""The backend "cpu": passes torch tensors to the compiled kernels as addresses.

Uses as many threads as torch does (`torch.set_num_threads`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.backends import native, native_gram
from pymerge.backends.native_masked import MaskedTensor
from pymerge.backends.placement import device_of
from pymerge.dtypes import name_of
from pymerge.rules.masked import MaskedOptions, row_of
from pymerge.rules.options import Counts
from pymerge.rules.ties import TiesRule, TiesStats


def ties(
    models: Sequence[torch.Tensor], base: torch.Tensor | None, rule: TiesRule, out: torch.Tensor
) -> TiesStats:
    """docs/spec/ties.md in one pass per tensor; `out` is contiguous. Only strided inputs are
    copied.
    """
    held = [t.contiguous() for t in models]
    held_base = None if base is None else base.contiguous()
    return native.ties(
        [_buffer(t) for t in held],
        None if held_base is None else _buffer(held_base),
        _buffer(out),
        out.numel(),
        rule,
        torch.get_num_threads(),
    )


def select(
    tensors: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor | None]], ranks: Sequence[int]
) -> list[float]:
    """The ranks[k]-th largest magnitude of model k over the concatenation of all tensors (T3,
    T7).
    """
    device_of(tensors)
    held = [
        ([t.contiguous() for t in models], None if base is None else base.contiguous())
        for models, base in tensors
    ]
    return native.select(
        [
            (
                [_buffer(t) for t in models],
                None if base is None else _buffer(base),
                models[0].numel(),
            )
            for models, base in held
        ],
        ranks,
        torch.get_num_threads(),
    )


def masked(
    models: Sequence[torch.Tensor], base: torch.Tensor, options: MaskedOptions, out: torch.Tensor
) -> Counts:
    """docs/spec/masked.md; `out` is contiguous. Only strided inputs are copied."""
    held = [t.contiguous() for t in models]
    held_base = base.contiguous()
    tensor = MaskedTensor(
        [_buffer(t) for t in held],
        _buffer(held_base),
        out.numel(),
        name_of(out.dtype),
        torch.get_num_threads(),
    )
    return tensor.merge(options.rule(out.numel(), row_of(out.shape), tensor), _buffer(out))


def gram(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
) -> torch.Tensor:
    """docs/spec/gram.md, G2 and G3: (rows or columns, pairs), float64."""
    held = [t.contiguous() for t in models]
    held_base = None if base is None else base.contiguous()
    groups, count = shape[by_column], len(models)
    products = torch.empty(
        (groups, count * (count + 1) // 2), dtype=torch.float64, device=models[0].device
    )
    native_gram.gram(
        [_buffer(t) for t in held],
        None if held_base is None else _buffer(held_base),
        shape,
        by_column,
        products.data_ptr(),
        torch.get_num_threads(),
    )
    return products


def combine(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
    coefficients: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """docs/spec/gram.md, G5; `out` is contiguous. coefficients: (rows or columns, K), float64."""
    held = [t.contiguous() for t in models]
    held_base = None if base is None else base.contiguous()
    ordered = (coefficients.T if by_column else coefficients).contiguous()
    native_gram.combine(
        [_buffer(t) for t in held],
        None if held_base is None else _buffer(held_base),
        shape,
        by_column,
        ordered.data_ptr(),
        _buffer(out),
        torch.get_num_threads(),
    )


def _buffer(tensor: torch.Tensor) -> tuple[int, str]:
    return tensor.data_ptr(), name_of(tensor.dtype)
