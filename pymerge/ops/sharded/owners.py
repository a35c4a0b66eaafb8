"""Which tensors of a state dict are one memory, as all ranks see it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pymerge.ops.sharded.layout import Ranks, is_dtensor, local, mesh_of
from pymerge.ops.sharded.sums import largest


def agreed_owners(owners: Mapping[str, str], like: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The owner of each name, where a rank sees its shards alone: DTensors are one memory if they
    are on every rank that has elements of them. One collective for each mesh.

    owners: what this rank sees, in the same order of names on all ranks: for each name, the first
        one whose tensor is the same memory.
    """
    places = {name: place for place, name in enumerate(owners)}
    names = [*owners]
    by_mesh: dict[Ranks, list[str]] = {}
    for name in names:
        if is_dtensor(like[name]):
            by_mesh.setdefault(mesh_of(like[name]), []).append(name)
    found = dict(owners)
    for mesh, own in by_mesh.items():
        # The largest and the smallest place that a rank names; empty shards name none.
        seen = [
            (places[owners[name]], -places[owners[name]])
            if local(like[name]).numel()
            else (-1, -len(names))
            for name in own
        ]
        (agreed,) = largest([(mesh, torch.tensor(seen, dtype=torch.int64, device="cpu"))])
        for name, (most, least) in zip(own, agreed.tolist(), strict=True):
            found[name] = names[most] if most == -least else name
    return found
