"""Seeds for the drop-ins' random masks, drawn from torch's generator as the original functions
do.
"""

from __future__ import annotations

import torch


def draw_seed() -> int:
    """A seed from torch's default CPU generator, so that `torch.manual_seed` makes a run repeatable
    while calls differ.
    """
    return int(torch.randint(0, 1 << 62, (), dtype=torch.int64, device="cpu").item())
