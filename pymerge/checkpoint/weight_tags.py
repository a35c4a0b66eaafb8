"""Identifies a weight by a hash of a few of its elements (rules S14, S15)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pymerge.dtypes import INTEGERS, MERGEABLE, elements, torch_dtype

# Dtypes that have tags: torch can read their values, which take whole bytes.
_TAGGED = (*MERGEABLE, *INTEGERS, "float8_e4m3fn", "float8_e5m2")

# The values begin, begin + 1, ... of a model's tensor; None where they are not to be compared.
Sample = Callable[[str, int, int], "torch.Tensor | None"]

# Elements from the middle of the tensor, one after the other, so that a file gives them with one
# read.
SAMPLE = 256


def sample_of(count: int) -> tuple[int, int]:
    """First element and length of the sample that identifies a tensor of `count` elements."""
    size = min(count, SAMPLE)
    return (count - size) // 2, size


def tag_of(tensor: torch.Tensor) -> str:
    """ "<dtype>:<hash>" of a whole tensor."""
    begin, size = sample_of(tensor.numel())
    return tag_of_sample(tensor.detach().reshape(-1)[begin : begin + size], tensor.dtype)


def tag_of_sample(values: torch.Tensor, dtype: torch.dtype) -> str:
    """The tag of a tensor of this dtype whose sample has these values."""
    held = values.to("cpu", dtype).contiguous()
    state = hashlib.blake2b(held.view(torch.uint8).numpy().tobytes(), digest_size=8)
    return f"{str(dtype).removeprefix('torch.')}:{state.hexdigest()}"


def tag_like(tag: str, name: str, shape: Sequence[int], sample: Sample) -> str | None:
    """The tag of a model's tensor in the dtype of another `tag`; None where it cannot be told."""
    kind = tag.partition(":")[0]
    begin, size = sample_of(elements(tuple(shape)))
    values = sample(name, begin, size) if size and kind in _TAGGED else None
    return None if values is None else tag_of_sample(values, torch_dtype(kind))


class Beside(NamedTuple):
    """What the header of statistics says beside the model that they are of.

    content: the header with pools (S16) and with the names of the model's tensors (S15). foreign:
    names of weights that have other values in the model than when they were collected (S14).
    renamed: names of layers and parameters that were found by content.
    """

    content: Mapping[str, Any]
    foreign: tuple[str, ...]
    renamed: tuple[str, ...]


def beside(
    content: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], sample: Sample
) -> Beside:
    """Compare a statistics header with its model. shapes: of all the model's tensors."""
    pooled = with_pools(content)
    shapes, sample = _with_matrices(content, shapes, sample)
    named = with_names_of(pooled, shapes, sample)
    new = {key.partition("/")[2] for key in named["aliases"].keys() - pooled["aliases"].keys()}
    return Beside(named, foreign_weights(content, shapes, sample), tuple(sorted(new)))


def _with_matrices(
    content: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], sample: Sample
) -> tuple[Mapping[str, Sequence[int]], Sample]:
    """A model's tensors, with the slices of those of three dimensions that may be the layers of
    `content`, under the names of such layers (S1).
    """
    sizes = {_stored_size(entry) for entry in content["layers"].values() if "pool" in entry}
    found = dict(shapes)
    places: dict[str, tuple[str, int]] = {}
    for name, shape in shapes.items():
        for rows, columns in sizes if len(shape) == 3 else ():
            if shape[2] != columns or not rows or shape[1] % rows:
                continue
            parts = shape[1] // rows
            for place in range(shape[0] * parts):
                own = f"{name}.{place // parts}" + (f".{place % parts}" if parts > 1 else "")
                found[own] = (rows, columns)
                places[own] = name, place * rows * columns

    def sample_of_all(name: str, begin: int, size: int) -> torch.Tensor | None:
        stored, offset = places.get(name, (name, 0))
        return sample(stored, offset + begin, size)

    return found, sample_of_all


def _stored_size(layer: Mapping[str, Any]) -> tuple[int, int]:
    size = (layer["d_out"], layer["d_in"])
    return size[::-1] if layer["transposed"] else size


def _flat(shape: Sequence[int]) -> tuple[int, ...]:
    """As a matrix, which the weight of a convolution is to its statistics."""
    return (shape[0], elements(tuple(shape[1:]))) if len(shape) > 2 else tuple(shape)


def foreign_weights(
    content: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], sample: Sample
) -> tuple[str, ...]:
    """Names of a model's tensors that have other values than when its statistics were collected."""
    # A layer's own tensor, where the weight has another name first (tied ones) that the model does
    # not hold.
    layers = {
        layer["weight"]: f"{name}.weight"
        for name, layer in content.get("layers", {}).items()
        if "weight" in layer
    }
    found = []
    for name, tag in content.get("weights", {}).items():
        own = name if name in shapes else layers.get(name, name)
        if own in shapes and tag_like(tag, own, shapes[own], sample) not in (None, tag):
            found.append(name)
    return tuple(found)


def with_names_of(
    content: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], sample: Sample
) -> Mapping[str, Any]:
    """A statistics header that also knows its layers and parameters by the names of a model's
    tensors, where those are others: by content (S15).

    shapes: of all the model's tensors.
    """
    found = _names_by_content(content, shapes, sample)
    if not found:
        return content
    aliases, layers = dict(content["aliases"]), dict(content["layers"])
    few = dict(content.get("few", {}))
    of_weight: dict[str, list[str]] = {}
    for layer, entry in content["layers"].items():
        of_weight.setdefault(entry["weight"], []).append(layer)

    def add(kind: str, own: str, name: str) -> None:
        key = f"{kind}/{own}"
        key = content["aliases"].get(key, key)
        if key in content["tensors"]:
            aliases.setdefault(f"{kind}/{name}", key)

    for name, weight in found.items():
        stem = name.removesuffix(".weight")
        for layer in of_weight.get(weight, ()):
            layers.setdefault(stem, content["layers"][layer])
            if layer in content.get("few", {}):
                few[stem] = content["few"][layer]
            add("input_gram", layer, stem)
            add("output_grad_gram", layer, stem)
        add("diagonal_fisher", weight, name)
        add("block_fisher", weight, name)
    return {**content, "aliases": aliases, "layers": layers, "few": few}


def with_pools(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A statistics header whose slices of a parameter that saw few tokens have the sums of all
    slices, and a map `few`: layer -> its tokens (S16).
    """
    aliases, few = dict(content["aliases"]), {}
    for layer, entry in content["layers"].items():
        pool = entry.get("pool", layer)
        if pool == layer:
            continue
        key = content["aliases"].get(f"input_gram/{layer}", f"input_gram/{layer}")
        own = content["tensors"].get(key) or content["tensors"].get(f"output_grad_gram/{layer}")
        if own is None or 8 * own["tokens"] >= max(8, entry["d_in"]):
            continue
        for kind in ("input_gram", "output_grad_gram"):
            whole = content["aliases"].get(f"{kind}/{pool}", f"{kind}/{pool}")
            if whole in content["tensors"]:
                aliases[f"{kind}/{layer}"] = whole
                few[layer] = own["tokens"]
    return {**content, "aliases": aliases, "few": few} if few else content


def _names_by_content(
    content: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], sample: Sample
) -> dict[str, str]:
    """Name of a model's tensor -> the weight in `content` that has its shape and tag, of names that
    the other side does not have.
    """
    known = {*content.get("weights", {})}
    layer_shapes: dict[str, tuple[int, ...]] = {}
    for layer, entry in content["layers"].items():
        layer_shapes[entry["weight"]] = _stored_size(entry)
        known.add(f"{layer}.weight")
        if f"{layer}.weight" in shapes:
            known.add(entry["weight"])
    own = {**{name: _flat(size) for name, size in content["parameters"].items()}, **layer_shapes}
    wanted: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for weight, tag in content.get("weights", {}).items():
        gone = weight not in shapes and not any(
            entry["weight"] == weight and f"{layer}.weight" in shapes
            for layer, entry in content["layers"].items()
        )
        if gone and weight in own:
            wanted.setdefault((own[weight], tag), []).append(weight)
    kinds: dict[tuple[int, ...], set[str]] = {}
    for size, tag in wanted:
        kinds.setdefault(size, set()).add(f"{tag.partition(':')[0]}:")
    found = {}
    for name, shape in shapes.items():
        if name in known:
            continue
        for kind in sorted(kinds.get(_flat(shape), ())):
            tag = tag_like(kind, name, shape, sample)
            weights = wanted.get((_flat(shape), tag or ""), ())
            if weights:
                found[name] = max(weights, key=lambda weight: _common_ending(weight, name))
    return found


def _common_ending(one: str, other: str) -> tuple[int, int]:
    """How many parts of two names agree from the end, and how many at all."""
    mine, theirs = one.split("."), other.split(".")
    pairs = zip(reversed(mine), reversed(theirs), strict=False)
    equal = [a == b for a, b in pairs]
    ending = equal.index(False) if False in equal else len(equal)
    return ending, len({*mine} & {*theirs})
