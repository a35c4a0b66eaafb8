"""Mixtures of experts that one model stores as a tensor per expert and another one as fused
tensors.

Checkpoints list them: `experts.0.gate_proj.weight` (I, H), `experts.0.up_proj.weight` (I, H),
`experts.0.down_proj.weight` (H, I), or `w1`, `w3`, `w2`. Modules of transformers 5 fuse them:
`experts.gate_up_proj` (E, 2I, H), each expert's gate first, and `experts.down_proj` (E, H, I).
Either layout is read as the other by gathering rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pymerge.checkpoint.types import Rows, Source, TensorInfo
from pymerge.dtypes import elements

Tensors = Mapping[str, TensorInfo]

_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
_LISTED = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w[123])\.weight$")


@dataclass(frozen=True)
class Experts:
    """A model's tensors, with its experts in another model's layout.

    tensors: under the names of that layout. made: what to read for each tensor that is not stored
        so. words: how the layouts differ, for a note.
    """

    tensors: Tensors
    made: Mapping[str, Source]
    words: str


def as_in(model: int, mine: Tensors, its: Tensors) -> Experts | None:
    """The tensors `mine` of model number `model` with experts laid out as in `its`; None where they
    already are.
    """
    listed, fused = _listed(mine), _fused(mine)
    their_listed, their_fused = _listed(its), _fused(its)
    if listed and their_fused and not fused:
        made = dict(_fuse(model, mine, listed))
        words = "one by one, and not all in one tensor as"
        gone = {m.group() for m in map(_LISTED.match, mine) if m}
    elif fused and their_listed and not listed:
        names = _naming(set().union(*their_listed.values()))
        made = dict(_list(model, mine, fused, names))
        words = "all in one tensor, and not one by one as"
        gone = {f"{stack}.{kind}" for stack in fused for kind in ("gate_up_proj", "down_proj")}
    else:
        return None
    if not made:
        return None
    tensors = {name: info for name, info in mine.items() if name not in gone}
    tensors |= {name: info for name, (info, _) in made.items()}
    return Experts(tensors, {name: source for name, (_, source) in made.items()}, words)


def _naming(kinds: set[str]) -> tuple[str, str, str]:
    return _NAMES[0] if kinds.intersection(_NAMES[0]) else _NAMES[1]


def _listed(tensors: Tensors) -> dict[str, set[str]]:
    """Stacks of experts that are stored one by one -> the kinds of their tensors."""
    found: dict[str, set[str]] = {}
    for name, info in tensors.items():
        match = _LISTED.match(name)
        if match and len(info.shape) == 2:
            found.setdefault(match[1], set()).add(match[3])
    return found


def _fused(tensors: Tensors) -> list[str]:
    """Stacks of experts that are stored as two tensors."""
    found = [match[1] for name in tensors if (match := _FUSED.match(name))]
    return [
        stack
        for stack in dict.fromkeys(found)
        if all(len(tensors[f"{stack}.{k}"].shape) == 3 for k in _kinds(stack, tensors))
        and len(_kinds(stack, tensors)) == 2
    ]


def _kinds(stack: str, tensors: Tensors) -> list[str]:
    return [kind for kind in ("gate_up_proj", "down_proj") if f"{stack}.{kind}" in tensors]


def _fuse(
    model: int, tensors: Tensors, stacks: Mapping[str, set[str]]
) -> Iterator[tuple[str, tuple[TensorInfo, Source]]]:
    counts: dict[str, int] = {}
    for name in tensors:
        match = _LISTED.match(name)
        if match:
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    for stack, kinds in stacks.items():
        gate, up, down = _naming(kinds)
        count = counts[stack]
        parts = {
            "gate_up_proj": [f"{stack}.{e}.{k}.weight" for e in range(count) for k in (gate, up)],
            "down_proj": [f"{stack}.{e}.{down}.weight" for e in range(count)],
        }
        for kind, names in parts.items():
            infos = [tensors.get(name) for name in names]
            first = infos[0]
            if first is None or any(
                i is None or (i.shape, i.dtype) != (first.shape, first.dtype) for i in infos
            ):
                continue
            rows, columns = first.shape
            shape = (count, rows * len(names) // count, columns)
            name = f"{stack}.{kind}"
            sources = tuple(Source(model, each) for each in names)
            choice = np.arange(len(names), dtype=np.int32)
            places = np.full((len(names), len(names)), -1, np.int32)
            np.fill_diagonal(places, 0)
            made = Rows((len(names), rows * columns), first.dtype, sources, places, choice)
            yield (
                name,
                (
                    TensorInfo(name, first.dtype, shape, first.saved_as),
                    Source(model, names[0], made),
                ),
            )


def _list(
    model: int, tensors: Tensors, stacks: list[str], names: tuple[str, str, str]
) -> Iterator[tuple[str, tuple[TensorInfo, Source]]]:
    gate, up, down = names
    for stack in stacks:
        for fused, kinds in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
            stored = tensors[f"{stack}.{fused}"]
            count, rows, columns = stored.shape
            if rows % len(kinds):
                continue
            shape = (rows // len(kinds), columns)
            for e in range(count):
                for k, kind in enumerate(kinds):
                    name = f"{stack}.{e}.{kind}.weight"
                    place = np.array([[e * len(kinds) + k]], np.int32)
                    made = Rows(
                        (1, elements(shape)),
                        stored.dtype,
                        (Source(model, stored.name),),
                        place,
                        np.zeros(1, np.int32),
                    )
                    info = TensorInfo(name, stored.dtype, shape, stored.saved_as)
                    yield name, (info, Source(model, stored.name, made))
