"""The public op `regmean`: the weight whose outputs match every model's on its own inputs
(docs/spec/mats.md, M14).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import torch

from pymerge.ops.mats.api import MatsResult, mats
from pymerge.ops.mats.layer import Init
from pymerge.rules.types import TaskWeights


def regmean(
    weights: Sequence[torch.Tensor],
    input_grams: Sequence[torch.Tensor] | torch.Tensor,
    *,
    off_diagonal: SupportsFloat = 1.0,
    task_weights: TaskWeights | Sequence[SupportsFloat] = "raw",
    init: Init = "average",
    base: torch.Tensor | None = None,
    init_options: Mapping[str, Any] | None = None,
    name: str = "",
) -> MatsResult:
    """Merge K weights of a linear layer in closed form:

        W = (sum_k w_k W_k A_k) (sum_k w_k A_k)^-1

    with the off-diagonal elements of the A_k scaled by `off_diagonal` (the paper recommends 0.9 or
    less). In float64 by Cholesky; directions in which no model has inputs keep `init`.

    weights: K tensors (d_out, d_in), or vectors (d,) with their (d, d) block Fisher matrices.
    input_grams: K matrices (d_in, d_in) or one (K, d_in, d_in) tensor. The other arguments, the
    result and the errors are those of `pymerge.mats`.

    Source: Jin et al. 2022, arXiv:2212.09849.
    """
    return mats(
        weights,
        input_grams,
        init=init,
        base=base,
        init_options=init_options,
        name=name,
        solver="exact",
        off_diagonal=off_diagonal,
        task_weights=task_weights,
    )
