"""The op `masked` on tensors: choose the backend, call (docs/spec/masked.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.backends import registry
from pymerge.rules.masked import MaskedOptions
from pymerge.rules.options import Counts


def merge_tensor(
    models: Sequence[torch.Tensor],
    base: torch.Tensor,
    options: MaskedOptions,
    out: torch.Tensor,
    name: str,
    backend: str,
) -> Counts:
    """Merge checked tensors into `out`. name: has no effect, nothing is drawn.

    RuntimeError for a backend that is asked for by name and has no kernels for the op.
    """
    function = registry.pick_or_reference("masked", out.device.type, backend, options.method)[1]
    counts: Counts = function(models, base, options, out)
    return counts
