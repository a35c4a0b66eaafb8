"""Statistics beside the state dict that they are of: under its names, or an error (rule S15)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pymerge.checkpoint.weight_tags import Sample, with_names_of, with_pools
from pymerge.messages.words import some_names
from pymerge.rules.mats import is_linear, too_little
from pymerge.statistics._file import Statistics


def sampler(model: Mapping[str, torch.Tensor]) -> Sample:
    """Elements of a state dict's tensors."""

    def sample(name: str, begin: int, size: int) -> torch.Tensor | None:
        tensor = model[name]
        if not tensor.is_floating_point():
            return None
        return tensor.detach().reshape(-1)[begin : begin + size]

    return sample


def fitted(
    readers: Sequence[Any],
    models: Sequence[Mapping[str, torch.Tensor]],
    method: str,
    allow_unsolved: bool = False,
) -> list[Any]:
    """The readers, with the names of the models' tensors where those have other names than their
    modules. ValueError for one that knows none of its model's tensors, and where all of them know
    less than half of the linear layers, unless that is allowed.
    """
    kinds = ("diagonal_fisher",) if method == "fisher" else ("input_gram", "block_fisher")
    found: list[Any] = []
    grams: set[str] = set()
    for k, (reader, model) in enumerate(zip(readers, models, strict=True)):
        if not isinstance(reader, Statistics):
            found.append(reader)
            continue
        shapes = {name: tuple(model[name].shape) for name in model}
        pooled = with_pools(reader.header)
        header = with_names_of(pooled, shapes, sampler(model))
        fit = Statistics(dict(header), reader._read, reader.path)
        known = {key.partition("/")[2] for key in reader._keys()}
        names = {
            name for kind, _, name in (key.partition("/") for key in fit._keys()) if kind in kinds
        }
        if not any(name in names or name.removesuffix(".weight") in names for name in shapes):
            has = some_names(sorted(names)) if names else f"no {' or '.join(kinds)}"
            raise ValueError(
                f"statistics[{k}] fits no tensor of models[{k}]: it has {has}, the model has"
                f" {some_names(list(shapes))}; pass statistics that were collected on this model,"
                " and collect them with rename= where its tensors have other names"
            )
        others = [key.partition("/")[2] for key in header["aliases"].keys() - pooled["aliases"]]
        if others:
            warnings.warn(
                f"statistics[{k}] names tensors otherwise than models[{k}]"
                f" ({some_names(sorted(known))} there); {some_names(sorted(set(others)))} were"
                " found by their values",
                stacklevel=4,
            )
        found.append(fit)
        grams |= {key.partition("/")[2] for key in fit._keys() if key.startswith("input_gram/")}
    # A reader of one's own cannot tell what it has.
    if (
        grams
        and method != "fisher"
        and not allow_unsolved
        and all(isinstance(each, Statistics) for each in found)
    ):
        linear = {n: m.numel() for n, m in models[0].items() if is_linear(n, tuple(m.shape))}
        lost = [name for name in linear if name.removesuffix(".weight") not in grams]
        solved = sum(linear.values()) - sum(linear[name] for name in lost)
        little = too_little(solved, sum(linear.values()), lost, "allow_unsolved=True")
        if little:
            raise ValueError(little)
    return found
