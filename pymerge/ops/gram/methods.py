"""The methods by Gram matrix on tensors, on any backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.gram.api import combine_checked, count_bad, gram_checked
from pymerge.ops.gram.coefficients import coefficients
from pymerge.rules.gram import GramOptions
from pymerge.rules.options import Counts


def merge_tensor(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    options: GramOptions,
    out: torch.Tensor,
    name: str,
    backend: str,
) -> Counts:
    """Merge checked tensors into `out`; on a GPU the coefficients are found on the host. name: has
    no effect, nothing is drawn.
    """
    n = out.numel()
    kept, bad = (n,) * options.count, (0,) * options.count
    products = gram_checked(models, base, options.per, backend).cpu()
    if not products.isfinite().all():
        bad = count_bad(models, base)
        if options.non_finite == "error" and any(bad):
            return Counts(kept, 0, bad)  # the caller refuses
    found, remark = coefficients(options, products.numpy())
    combine_checked(models, base, torch.from_numpy(found), options.per, out, backend)
    return Counts(kept, 0, bad, remark)
