"""Merges of DTensors on every rank, each held against the merge of the full tensors to the bit."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import pymerge
from pymerge.errors import NonFiniteError
from pymerge.ops.sharded import norms, selection
from pymerge.ops.sharded.layout import local

Tensor = torch.Tensor
Dicts = list[dict[str, Tensor]]

MESHES: dict[str, tuple[list[Any], list[str]]] = {
    "four": ([0, 1, 2, 3], ["fsdp"]),
    "two": ([0, 1], ["fsdp"]),
    "square": ([[0, 1], [2, 3]], ["outer", "inner"]),
}
# What the methods' options are, under names of what they show.
OPTIONS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2, "weights": 0.7},
    "peft": {"density": 0.5, "flavor": "peft"},
    "official": {"density": 0.1, "flavor": "paper"},
    "keeps one": {"density": 1e-9},
    "keeps none and all": {"density": [0, 1, 0.5]},
    "task arithmetic": {"trim": "none", "elect": "none", "merge": "sum", "weights": [1, -2, 0.5]},
    "breadcrumbs": {"trim": "outliers", "density": 0.5, "gamma": [0.1, 0, 0.9]},
    "dare": {"trim": "random", "density": 0.3, "rescale": "density", "seed": 3, "name": "w"},
    "dare, l1": {"trim": "random", "density": [0.3, 1, 0.6], "rescale": "l1", "name": "w"},
    "l2": {"rescale": "l2", "density": [0.1, 0.2, 1]},
    "largest": {"rescale": "linf", "trim": "outliers", "density": 0.5, "gamma": 0.1},
    "max": {"merge": "max", "elect": "count", "zero_sign": "majority", "density": 0.4},
}
PLACED: dict[str, tuple[str, list[Any]]] = {
    "rows": ("four", [Shard(0)]),
    "columns": ("four", [Shard(1)]),
    "rows of two": ("two", [Shard(0)]),
    "replicated": ("four", [Replicate()]),
    "HSDP": ("square", [Replicate(), Shard(0)]),
    "blocks": ("square", [Shard(0), Shard(1)]),
    "rows twice": ("square", [Shard(0), Shard(0)]),
    "FSDP over TP": ("square", [_StridedShard(0, split_factor=2), Shard(0)]),
}
DTYPES = {
    "fp32": [torch.float32] * 4,
    "bf16": [torch.bfloat16] * 4,
    "fp16": [torch.float16] * 4,
    "mixed": [torch.float16, torch.bfloat16, torch.float32, torch.float16],
    "fp64": [torch.float64, torch.float32, torch.float64, torch.bfloat16],
}
# One row to less than a rank's share, empty shards, no elements, rows of odd length.
SHAPES = [(7, 13), (1, 6), (3, 1, 5), (2, 0), (33, 8)]


@cache
def mesh_of(name: str) -> DeviceMesh:
    ranks, dims = MESHES[name]
    return DeviceMesh("cpu", ranks, mesh_dim_names=tuple(dims))


def takes_part(mesh: DeviceMesh) -> bool:
    return mesh.get_coordinate() is not None


def shard_of(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    """What torch itself puts on this rank."""
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            pieces, _ = placement._split_tensor(
                tensor, mesh.size(dim), with_padding=False, contiguous=True
            )
            tensor = pieces[mesh.get_coordinate()[dim]]
    return tensor


def spread(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    return DTensor.from_local(
        shard_of(tensor, mesh, placements).clone(),
        mesh,
        placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.contiguous().stride(),
    )


def drawn(shape: Sequence[int], dtypes: Sequence[torch.dtype], seed: int = 0) -> list[Tensor]:
    """The base and its fine-tunes, the same on every rank."""
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    base = torch.randn(*shape, generator=generator)
    steps = [0.02 * torch.randn(*shape, generator=generator) for _ in dtypes[1:]]
    return [base.to(dtypes[0]), *((base + s).to(d) for s, d in zip(steps, dtypes[1:], strict=True))]


def equal_bits(got: Tensor, wanted: Tensor) -> bool:
    same = got.dtype == wanted.dtype and got.shape == wanted.shape
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return same and torch.equal(got.contiguous().view(view), wanted.contiguous().view(view))


def check_merge(
    tensors: Sequence[Tensor], mesh: DeviceMesh, placements: Sequence[Any], **options: Any
) -> None:
    base, *models = tensors
    wanted = pymerge.ties(models, base, **options)
    if not takes_part(mesh):
        return
    parts = [spread(x, mesh, placements) for x in models]
    start = spread(base, mesh, placements)
    before = [local(x).clone() for x in (start, *parts)]
    got = pymerge.ties(parts, start, **options)
    assert isinstance(got, DTensor)
    assert got.device_mesh == mesh and got.placements == tuple(placements)
    assert got.shape == base.shape and got.stride() == wanted.stride()
    assert equal_bits(local(got), shard_of(wanted, mesh, placements)), (base.shape, options)
    assert all(map(equal_bits, before, map(local, (start, *parts))))


def placements_and_options(placed: str) -> None:
    mesh, placements = PLACED[placed]
    for at, options in enumerate(OPTIONS.values()):
        shape = SHAPES[at % 2 * 4]  # both that every placement cuts unevenly or evenly
        check_merge(drawn(shape, DTYPES["fp32"]), mesh_of(mesh), placements, **options)


def shapes_and_dtypes(dtypes: str) -> None:
    for shape in SHAPES:
        tensors = drawn(shape, DTYPES[dtypes])
        check_merge(tensors, mesh_of("four"), [Shard(0)], density=0.3)
        check_merge(tensors, mesh_of("square"), [Shard(0), Shard(1)], **OPTIONS["dare, l1"])
    for tensor in (torch.arange(6.0), torch.arange(3.0)):
        check_merge([tensor, tensor + 1, -tensor], mesh_of("four"), [Shard(0)], density=0.4)


def many_models() -> None:
    for count in (1, 2, 9):
        tensors = drawn((9, 5), [torch.float32] * (count + 1))
        check_merge(tensors, mesh_of("four"), [Shard(0)], density=0.3)
        check_merge(tensors, mesh_of("four"), [Shard(0)], trim="random", rescale="l2", density=0.3)


def sampled(*, tied: bool) -> None:
    """Tensors of which samples are taken; in the second, few magnitudes that many elements have."""
    tensors = drawn((4001, 9), [torch.bfloat16 if tied else torch.float32] * 4)
    if tied:
        tensors = [tensors[0], *(tensors[0] + (x - tensors[0]).sign() * 2**-5 for x in tensors[1:])]
    for name in ("ties", "breadcrumbs", "largest"):
        check_merge(tensors, mesh_of("four"), [Shard(0)], **OPTIONS[name])
        check_merge(tensors, mesh_of("square"), [Replicate(), Shard(1)], **OPTIONS[name])


@contextlib.contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    yield
    for name, value in before.items():
        setattr(module, name, value)


def majority() -> None:
    """Signs of zero sums are those of most of all shards; here one rank's shard says otherwise."""
    mesh = mesh_of("four")
    base = torch.zeros(8, 2)
    one = torch.tensor([1.0, -1, 1, -1, -2, -1, -1, -1]).repeat_interleave(2).view(8, 2)
    other = torch.tensor([1.0, 1, 1, 1, -1, 1, -1, -1]).repeat_interleave(2).view(8, 2)
    for options in ({"scope": "tensor"}, {"scope": "model"}, {"elect": "count"}):
        given = {"trim": "none", "zero_sign": "majority", **options}
        minus = pymerge.ties([one, other], base, **given)
        assert minus[1, 0] < 0 < pymerge.ties([one, other], base, trim="none")[1, 0]
        check_merge([base, one, other], mesh, [Shard(0)], **given)
        check_merge([base, -one, -other], mesh, [Shard(1)], **given)


def in_the_reference() -> None:
    """Parts that begin at no multiple of four."""
    tensors = drawn((7, 3), DTYPES["fp32"])
    for placements in ([Shard(0)], [Shard(1)]):
        given = {**OPTIONS["dare, l1"], "backend": "reference"}
        check_merge(tensors, mesh_of("four"), placements, **given)


def disproved_brackets() -> None:
    """Brackets beside the thresholds, and more keys inside than are kept: both are found out."""
    tensors = drawn((4001, 9), DTYPES["fp32"])
    streams = []
    stream = selection._Streamed

    def counting(*given: Any) -> Any:
        streams.append(given)
        return stream(*given)

    for values in ({"_SIGMAS": -30.0}, {"_MOST_KEPT": 10**9, "_WHOLE": 100}):
        with changed(selection, **values, _Streamed=counting):
            check_merge(tensors, mesh_of("four"), [Shard(0)], density=0.2)
            check_merge(tensors, mesh_of("four"), [Shard(1)], **OPTIONS["breadcrumbs"])
        assert len(streams) > 3
        streams.clear()


def norms_near_a_tie() -> None:
    """Where sums in binary64 do not say how the quotient rounds, integers do."""
    from fractions import Fraction

    tensors = drawn((64, 9), DTYPES["fp32"])
    with changed(norms, _ERROR=Fraction(1, 8)):
        for options in (OPTIONS["l2"], OPTIONS["dare, l1"]):
            check_merge(tensors, mesh_of("four"), [Shard(0)], **options)


def rows_of_magprune() -> None:
    options = {"trim": "magprune", "density": 0.4, "rescale": "l1", "name": "w"}
    for shape in ((7, 13), (9, 4, 3)):
        tensors = drawn(shape, DTYPES["fp32"])
        check_merge(tensors, mesh_of("four"), [Shard(0)], **options)
        check_merge(tensors, mesh_of("square"), [Replicate(), Shard(0)], **options)
    mesh = mesh_of("four")
    for shape, dim in (((8, 4), 1), ((8,), 0)):
        parts = [spread(x, mesh, [Shard(dim)]) for x in drawn(shape, DTYPES["fp32"])]
        with pytest.raises(TypeError, match=rf"cut rows.*dimension {dim}.*full_tensor"):
            pymerge.ties(parts[1:], parts[0], **options)


def dicts_of(shapes: dict[str, Sequence[int]]) -> Dicts:
    """The base's state dict, then two models'."""
    named = {name: drawn(shape, DTYPES["bf16"][:3], len(name)) for name, shape in shapes.items()}
    return [{name: tensors[at] for name, tensors in named.items()} for at in range(3)]


LAYERS: dict[str, Sequence[int]] = {
    "embed.weight": (11, 6),
    "norm.weight": (6,),
    "layer.weight": (5, 6),
    "short.bias": (2,),
}


def state_dicts(call: Callable[..., dict[str, Tensor]], method: str, **options: Any) -> None:
    """Shards, replicas and plain tensors beside each other, one of them tied."""
    dicts = dicts_of(LAYERS)
    for each in dicts:
        each["head.weight"] = each["embed.weight"]
        each["tied.bias"] = each["short.bias"]
        each["steps"] = torch.tensor([3, 4, 5, 6, 7])
    dicts[2]["steps"] = dicts[2]["steps"] + 1
    square, four = mesh_of("square"), mesh_of("four")
    places: dict[str, tuple[DeviceMesh, list[Any]]] = {
        "embed.weight": (four, [Shard(0)]),
        "layer.weight": (square, [Replicate(), Shard(1)]),
        "short.bias": (four, [Shard(0)]),  # empty on two ranks
        "steps": (four, [Shard(0)]),
    }
    sharded: Dicts = []
    for each in dicts:
        own = {n: spread(x, *places[n]) if n in places else x for n, x in each.items()}
        own["head.weight"] = own["embed.weight"].detach()
        own["tied.bias"] = own["short.bias"].detach()
        sharded.append(own)
    takes_base = method != "linear"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wanted = call(dicts[1:], *dicts[: 1 * takes_base], **options)
        first = [str(each.message) for each in said]
        got = call(sharded[1:], *sharded[: 1 * takes_base], **options)
        assert [str(each.message) for each in said[len(first) :]] == first
    assert list(got) == list(wanted)
    for name, full in wanted.items():
        own = got[name]
        place = places.get(
            {"head.weight": "embed.weight", "tied.bias": "short.bias"}.get(name, name)
        )
        assert isinstance(own, DTensor) == (place is not None)
        part = full if place is None else shard_of(full, *place)
        assert torch.equal(local(own), part), name
    assert got["head.weight"] is got["embed.weight"]
    assert got["tied.bias"] is got["short.bias"]


def out_is_written() -> None:
    mesh, base, *models = mesh_of("four"), *drawn((7, 3), DTYPES["fp32"])
    parts, start = [spread(x, mesh, [Shard(0)]) for x in models], spread(base, mesh, [Shard(0)])
    out = spread(torch.full((7, 3), math.nan), mesh, [Shard(0)])
    assert pymerge.ties(parts, start, out=out) is out
    assert torch.equal(local(out), shard_of(pymerge.ties(models, base), mesh, [Shard(0)]))
    held = {"w": spread(torch.full((7, 3), math.nan), mesh, [Shard(0)])}
    merged = pymerge.merge([{"w": x} for x in parts], {"w": start}, method="ties", out=held)
    assert merged["w"] is held["w"] and torch.equal(local(held["w"]), local(out))
    with pytest.raises(ValueError, match=r"out has placements \(R\), the inputs has .*\(S\(0\)\)"):
        pymerge.ties(parts, start, out=spread(base, mesh, [Replicate()]))


def refusals() -> None:
    four, square = mesh_of("four"), mesh_of("square")
    x = torch.arange(32.0).view(8, 4)
    rows, columns = spread(x, four, [Shard(0)]), spread(x, four, [Shard(1)])
    blocks = spread(x, square, [Shard(0), Replicate()])
    partial_ = DTensor.from_local(x, four, [Partial()], run_check=False)
    for call in (
        lambda *tensors: pymerge.ties([*tensors[1:]], tensors[0]),
        lambda *tensors: pymerge.ties([{"w": t} for t in tensors[1:]], {"w": tensors[0]}),
        lambda *tensors: pymerge.merge([{"w": t} for t in tensors[1:]], {"w": tensors[0]}),
    ):
        with pytest.raises(ValueError, match=r"models\[1\].* has placements \(S\(1\)\), base"):
            call(rows, rows, columns)
        with pytest.raises(ValueError, match=r"models\[0\].* is on DeviceMesh.*, base"):
            call(rows, blocks)
        with pytest.raises(TypeError, match=r"models\[0\].* placement P.*redistribute"):
            call(rows, partial_)
        with pytest.raises(TypeError, match=r"base.* is a DTensor and models\[0\].*full_tensor"):
            call(rows, x)
        with pytest.raises(ValueError, match="shape"):
            call(rows, spread(x[:7], four, [Shard(0)]))
    with pytest.raises(TypeError, match=r"full_tensor\(\), on every rank"):
        pymerge.merge([{"w": rows}], {"w": rows}, method="slerp", t=0.5)
    with pytest.raises(TypeError, match="shard has shape"):
        pymerge.ties(
            [DTensor.from_local(x, four, [Shard(0)], run_check=False, shape=(8, 4), stride=(4, 1))]
        )


def all_ranks_refuse() -> None:
    """What is on one rank alone is an error of all, which counts all."""
    mesh, base = mesh_of("four"), torch.ones(8, 4)
    bad = base.clone()
    bad[0, :2] = math.inf
    bad[5, 0] = math.nan
    parts = [spread(x, mesh, [Shard(0)]) for x in (bad, base)]
    start = spread(base, mesh, [Shard(0)])
    with pytest.raises(NonFiniteError, match=r"models\[0\]: 3, of 32"):
        pymerge.ties(parts, start)
    check_merge([base, bad, base], mesh, [Shard(0)], non_finite="allow")
    half = spread(base.half(), mesh, [Shard(0)])
    large = base.clone()
    large[7] = 1e6
    with pytest.raises(NonFiniteError, match="4 values of the result overflow"):
        pymerge.ties([spread(large, mesh, [Shard(0)])], half, trim="none")
    with pytest.raises(NonFiniteError, match=r"holds NaN or infinite values: 3 in"):
        pymerge.merge([{"w": parts[0]}], method="passthrough")


CASES: dict[str, Callable[[], None]] = {
    **{f"placed: {name}": partial(placements_and_options, name) for name in PLACED},
    **{f"dtypes: {name}": partial(shapes_and_dtypes, name) for name in DTYPES},
    "numbers of models": many_models,
    "sampled": partial(sampled, tied=False),
    "sampled, equal magnitudes": partial(sampled, tied=True),
    "majority": majority,
    "reference": in_the_reference,
    "disproved brackets": disproved_brackets,
    "norms near a tie": norms_near_a_tie,
    "della": rows_of_magprune,
    "dicts: ties": partial(state_dicts, pymerge.ties, "ties", density=0.5),
    "dicts: official": partial(state_dicts, pymerge.ties, "ties", density=0.5, flavor="paper"),
    "dicts: breadcrumbs over all": partial(
        state_dicts, pymerge.ties, "ties", trim="outliers", gamma=0.2, density=0.5, scope="model"
    ),
    **{
        f"dicts: {method}": partial(
            state_dicts, partial(pymerge.merge, method=method), method, **options
        )
        for method, options in {
            "linear": {"weights": [1, 2]},
            "dare_ties": {"density": 0.5, "seed": 5},
            "breadcrumbs": {"density": 0.8, "gamma": 0.1},
        }.items()
    },
    "out": out_is_written,
    "refusals": refusals,
    "non-finite": all_ranks_refuse,
}
