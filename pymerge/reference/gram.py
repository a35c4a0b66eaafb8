"""`gram` and `combine` in plain PyTorch, after docs/spec/gram.md. Written to be right and readable,
not fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.reference.ties import cast, scalar, task_vector, working_dtype


@torch.inference_mode()
def gram(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
) -> torch.Tensor:
    """The products of pairs (i, j), i <= j, for each row or column: (rows or columns, pairs),
    float64 (G2, G3; in torch's order of addition).
    """
    deltas = [delta.double() for delta in _deltas(models, base, shape)]
    along = 0 if by_column else 1
    pairs = [
        (deltas[i] * deltas[j]).sum(along)
        for i in range(len(deltas))
        for j in range(i, len(deltas))
    ]
    return torch.stack(pairs, dim=-1)


@torch.inference_mode()
def combine(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    by_column: bool,
    coefficients: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """G5 into `out`. coefficients: (rows or columns, K), float64."""
    work = working_dtype([*models, out] if base is None else [*models, base, out])
    total = torch.zeros(shape, dtype=work, device=out.device)
    for k, delta in enumerate(_deltas(models, base, shape, work)):
        factor = coefficients[:, k].to(device=out.device, dtype=work)
        total = total + delta * (factor[None, :] if by_column else factor[:, None])
    if base is not None:
        total = base.reshape(shape).to(work) + total
    total = torch.where(total.isnan(), scalar(torch.nan, total), total)
    out.copy_(cast(total, out.dtype).reshape(out.shape))


def _deltas(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    shape: tuple[int, int],
    work: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """T1, as matrices."""
    work = work or working_dtype([*models] if base is None else [*models, base])
    flat = None if base is None else base.reshape(-1).to(work)
    return [task_vector(model, flat, work).reshape(shape) for model in models]
