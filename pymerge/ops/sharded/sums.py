"""What ranks tell each other in a merge of shards: int64 numbers, added or compared, whose result
depends on no order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.sharded.layout import Ranks


def added(numbers: Sequence[tuple[Ranks, torch.Tensor]]) -> list[torch.Tensor]:
    """Each table of int64 added up over its ranks, on the CPU. One collective for all tables of the
    same ranks and each of their groups; none where there are no others.
    """
    return _reduced(numbers, largest=False)


def largest(numbers: Sequence[tuple[Ranks, torch.Tensor]]) -> list[torch.Tensor]:
    """As `added`, the largest of each number instead of the sum."""
    return _reduced(numbers, largest=True)


def _reduced(numbers: Sequence[tuple[Ranks, torch.Tensor]], largest: bool) -> list[torch.Tensor]:
    found = [table.cpu() for _, table in numbers]
    by_ranks: dict[Ranks, list[int]] = {}
    for place, (ranks, _) in enumerate(numbers):
        if ranks.groups:
            by_ranks.setdefault(ranks, []).append(place)
    for ranks, places in by_ranks.items():
        from torch.distributed import ReduceOp, all_reduce

        wire = torch.cat([found[place].reshape(-1) for place in places]).to(ranks.device)
        for group in ranks.groups:
            all_reduce(wire, ReduceOp.MAX if largest else ReduceOp.SUM, group=group)
        parts = torch.split(wire.cpu(), [found[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(found[place].shape)
    return found
