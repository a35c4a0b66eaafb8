"""Which elements of a DTensor are in this process, and among which ranks they are spread.

torch.distributed.tensor is looked at only where something has imported it: there is no DTensor
before.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Successive numbers: the first, and how many.
Run = tuple[int, int]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a tensor's elements: a process group for each mesh dimension that shards
    it, none where every rank has all. device: what their collectives take, as "cuda".
    """

    groups: tuple[Any, ...] = ()
    device: str = "cpu"


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor."""
    if type(value) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard in this process: a plain tensor on the DTensor's own memory. Other tensors are
    returned as they are.
    """
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        shard: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def why_not_sharded(tensor: Any) -> str:
    """Why the values of a DTensor are not those of its shards, and the way out; "" if they are."""
    strange = [each for each in tensor.placements if not (each.is_shard() or each.is_replicate())]
    strange = [each for each in strange if _shard_dim(each) is None]
    if strange:
        return (
            f"is a DTensor of placement {strange[0]}, whose values are yet to be reduced over the"
            " ranks; pass what .redistribute(placements=...) makes of it, with Shard or"
            " Replicate, or its .full_tensor(), on every rank"
        )
    if tensor.device_mesh.get_coordinate() is None:
        return (
            "is a DTensor on a mesh that this process is not in; call this on the ranks of the mesh"
            " alone, or pass its .full_tensor()"
        )
    here = tuple(map(_count, _held(tensor)))
    own = tuple(local(tensor).shape)
    if here != own:
        return (
            f"is a DTensor whose shard has shape {own}, where its placements"
            f" {_placements(tensor)} say {here}; make it with distribute_tensor, or pass its"
            " .full_tensor()"
        )
    return ""


def why_otherwise(tensor: Any, first: Any) -> str:
    """How a tensor is spread otherwise than the first one, which a blank in the text stands for; ""
    if it is not. ValueError material: shapes are compared elsewhere.
    """
    if is_dtensor(tensor) != is_dtensor(first):
        if is_dtensor(tensor):
            return (
                "is a DTensor and {} is not; distribute that one alike, or pass this one's"
                " .full_tensor(), on every rank"
            )
        return (
            "is no DTensor and {} is; distribute it alike (distribute_tensor), or pass the"
            " .full_tensor() of that DTensor, on every rank"
        )
    if not is_dtensor(tensor):
        return ""
    if tensor.device_mesh != first.device_mesh:
        return (
            f"is on {tensor.device_mesh}, {{}} on {first.device_mesh}; redistribute one of them,"
            " all must be on one mesh"
        )
    if tuple(tensor.placements) != tuple(first.placements):
        return (
            f"has placements {_placements(tensor)}, {{}} has {_placements(first)}; all must be"
            " equal: pass what .redistribute(placements=...) makes of one of them"
        )
    return ""


def ranks_of(tensor: Any) -> Ranks:
    """The ranks among which a tensor's elements are spread; none for a plain tensor."""
    if not is_dtensor(tensor):
        return Ranks()
    mesh = tensor.device_mesh
    groups = tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if _shard_dim(placement) is not None and mesh.size(dim) > 1
    )
    return Ranks(groups, mesh.device_type)


def mesh_of(tensor: Any) -> Ranks:
    """All ranks of a DTensor's mesh."""
    mesh = tensor.device_mesh
    groups = tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1)
    return Ranks(groups, mesh.device_type)


def shards_of(tensor: Any) -> int:
    """Into how many shards a tensor is cut."""
    if not is_dtensor(tensor):
        return 1
    sizes = (
        tensor.device_mesh.size(dim)
        for dim, placement in enumerate(tensor.placements)
        if _shard_dim(placement) is not None
    )
    return math.prod(sizes)


def cut_dims(tensor: Any) -> set[int]:
    """The dimensions along which a tensor is in several shards."""
    if not is_dtensor(tensor):
        return set()
    dims = (
        _shard_dim(placement)
        for place, placement in enumerate(tensor.placements)
        if tensor.device_mesh.size(place) > 1
    )
    return {dim for dim in dims if dim is not None}


def like_dtensor(shard: torch.Tensor, tensor: Any) -> torch.Tensor:
    """A DTensor of the shape and placements of another one, on this memory."""
    from torch.distributed.tensor import DTensor

    sizes = [max(size, 1) for size in tensor.shape]
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(tensor.ndim)]
    made: torch.Tensor = DTensor.from_local(
        shard,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tuple(strides),
    )
    return made


def runs(tensor: Any) -> list[Run]:
    """The shard's elements, in its own order, as runs in the whole tensor, which is row-major."""
    if not is_dtensor(tensor):
        return [(0, tensor.numel())] if tensor.numel() else []
    held = _held(tensor)
    if not all(held):
        return []
    shape = tuple(tensor.shape)
    # The dimensions behind `cut` are whole, so that equal steps along `cut` are neighbours.
    cut = len(shape) - 1
    while cut > 0 and _count(held[cut]) == shape[cut]:
        cut -= 1
    width = math.prod(shape[cut + 1 :])
    pieces = [(first * width, count * width) for first, count in held[cut]] if shape else [(0, 1)]
    starts = [0]
    for dim in range(cut):
        step = math.prod(shape[dim + 1 :])
        indices = [i for first, count in held[dim] for i in range(first, first + count)]
        starts = [start + i * step for start in starts for i in indices]
    found: list[tuple[int, int]] = []
    for start in starts:
        for first, count in pieces:
            if found and sum(found[-1]) == start + first:
                found[-1] = (found[-1][0], found[-1][1] + count)
            else:
                found.append((start + first, count))
    return found


def _held(tensor: Any) -> list[list[Run]]:
    """For each dimension, the indices in the whole tensor of what the shard has: those that the
    placements leave, one mesh dimension after the other.
    """
    found = [[(0, size)] if size else [] for size in tensor.shape]
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    for mesh_dim, placement in enumerate(tensor.placements):
        dim = _shard_dim(placement)
        if dim is None:
            continue
        # _StridedShard: of every part that dimensions further right cut, this rank's piece.
        parts = _chunks(found[dim], int(getattr(placement, "split_factor", 1)))
        pieces = [_chunks(part, mesh.size(mesh_dim))[place[mesh_dim]] for part in parts]
        found[dim] = [run for piece in pieces for run in piece]
    return found


def _count(held: Sequence[Run]) -> int:
    return sum(count for _, count in held)


def _chunks(held: Sequence[Run], chunks: int) -> list[list[Run]]:
    """So many pieces, the first ones of equal size, the last ones smaller or empty, as Shard
    cuts.
    """
    size = -(-_count(held) // chunks)
    found: list[list[Run]] = [[] for _ in range(chunks)]
    at = 0  # of the elements so far
    for first, count in held:
        end = first + count
        while first < end:
            taken = min(end - first, size - at % size)
            found[at // size].append((first, taken))
            first += taken
            at += taken
    return found


def _shard_dim(placement: Any) -> int | None:
    """The tensor's dimension that a placement cuts; None for others."""
    if placement.is_replicate() or placement.is_partial():
        return None
    dim = getattr(placement, "dim", None)
    return dim if isinstance(dim, int) else None


def _placements(tensor: Any) -> str:
    return f"({', '.join(map(str, tensor.placements))})"


def total_share(tensors: Sequence[Any]) -> int:
    """The elements of the largest shards of these tensors, which every rank knows."""
    return sum(-(-tensor.numel() // shards_of(tensor)) for tensor in tensors)
