"""Random masks of the drop-ins: seeded from torch's generator, as the functions that they
replace.
"""

from __future__ import annotations

import torch


def draw_seed() -> int:
    """A seed from torch's default CPU generator: `torch.manual_seed` makes a run repeatable, each
    call differs.
    """
    return int(torch.randint(0, 1 << 62, (), dtype=torch.int64, device="cpu").item())
