"""Which sums a model is asked for: its linear layers, its parameters, who owns them (rules S1,
S2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from pymerge.messages.arguments import argument
from pymerge.messages.words import type_of
from pymerge.rules.mats import vector_length

Filter = Callable[[str], bool]
NameFilter = str | Iterable[str] | Filter | None


@dataclass(frozen=True)
class Layer:
    """A linear map y = W x + b. `transposed`: the weight is stored (d_in, d_out), as in GPT-2's
    Conv1D.

    name: the first module with this weight; its Gram matrices gather the calls of all of `modules`.
    values: the weight. pool: of a slice of a parameter, the layer that gathers all slices.
    """

    name: str
    modules: tuple[nn.Module, ...]
    d_in: int
    d_out: int
    transposed: bool
    weight: str
    values: torch.Tensor
    pool: str = ""


@dataclass(frozen=True)
class Functional:
    """A parameter that products take directly (S1). slices: the layers of each of its matrices (one
    for a 2-D parameter), cut into equal parts of d_out. pooled: those of all slices together, none
    where there is but one.
    """

    transposed: bool
    slices: tuple[tuple[Layer, ...], ...]
    pooled: tuple[Layer, ...]


@dataclass
class Targets:
    """Keys to sum up, in the order of the model's modules, and where they come from.

    keys: "<kind>/<name>". layers: by name. parameters: by canonical name. owners: the modules that
        hold a parameter.
    tied: other name -> canonical name, of layers and of parameters. skipped: key -> why it is left
        out.
    """

    keys: dict[str, None] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    owners: dict[str, list[nn.Module]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    functional: dict[int, Functional] = field(default_factory=dict)  # by the parameter's id


def name_filter(what: str, given: NameFilter) -> Filter:
    """A predicate from a glob, several globs, a function, or None for all. A glob matches a whole
    name or its end after a dot.
    """
    if given is None:
        return lambda name: True
    if callable(given):
        return given
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, (Sequence, Set)):
        raise TypeError(
            f"{what} is {type_of(patterns)}; pass globs such as '*.mlp.*', or a function"
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{what} has {type_of(pattern)}; pass globs such as '*.mlp.*', or a function"
            )

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in patterns)

    return matches


def linear_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """(d_in, d_out, transposed) of a Linear or a Conv1D; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    weight = getattr(module, "weight", None)
    if (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(weight, torch.Tensor)
    ):
        return weight.shape[0], weight.shape[1], True
    return None


def convolution_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """(d_in, d_out, False) of a convolution that is a linear map of windows of its input; None for
    other modules, and where channels have weights of their own.
    """
    if (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and (module.groups, module.padding_mode) == (1, "zeros")
        and module._parameters.get("weight") is not None
    ):
        return math.prod(module.weight.shape[1:]), module.out_channels, False
    return None


def find_targets(
    model: nn.Module,
    rename: Callable[[str], str],
    kinds: Collection[str],
    layers: Filter,
    parameters: Filter,
    max_dim: int,
    products: Mapping[str, bool] | None = None,
    parts_of: Callable[[str], int] = lambda name: 1,
) -> Targets:
    """All sums of `kinds` over the layers and parameters that the filters let through, by their
    renamed names.

    products: parameters that products take directly -> whether they are stored (d_in, d_out).
        parts_of: of how many matrices a slice of such a parameter is made.
    """
    targets = Targets()
    canonical: dict[int, str] = {}
    owners: dict[int, list[nn.Module]] = {}
    for prefix, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            owners.setdefault(id(parameter), []).append(module)
            full = f"{prefix}.{local}" if prefix else local
            canonical.setdefault(id(parameter), rename(full))
    # A module that is registered under several names comes once above; its other names are aliases
    # of the first.
    by_weight: dict[tuple[int, bool], Layer] = {}
    own = dict(model.named_parameters())
    direct = {id(own[full]) for full in products or {}}
    for prefix, module in model.named_modules(remove_duplicate=False):
        name = rename(prefix)
        shape = linear_shape(module) or convolution_shape(module)
        if shape is not None and layers(name) and id(module.weight) not in direct:
            _add_layer(targets, by_weight, canonical, name, module, shape, kinds, max_dim)
        for local, parameter in module._parameters.items():
            full = rename(f"{prefix}.{local}" if prefix else local)
            if (
                parameter is not None
                and parameter.is_floating_point()
                and layers(name)
                and parameters(full)
            ):
                _add_parameter(targets, canonical[id(parameter)], full, parameter, kinds, max_dim)
                targets.owners[canonical[id(parameter)]] = owners[id(parameter)]
    for full, turned in (products or {}).items():
        name = rename(full)
        _add_functional(targets, name, own[full], turned, parts_of(full), layers, kinds, max_dim)
    return targets


def _add_functional(
    targets: Targets,
    name: str,
    parameter: nn.Parameter,
    transposed: bool,
    parts: int,
    layers: Filter,
    kinds: Collection[str],
    max_dim: int,
) -> None:
    several = parameter.dim() == 3
    matrices = parameter.detach().unbind(0) if several else (parameter.detach(),)
    stem = name if several else name.removesuffix(".weight")
    axis = 1 if transposed else 0
    if matrices[0].shape[axis] % parts:
        parts = 1

    def made(place: str, matrix: torch.Tensor, pools: tuple[Layer, ...]) -> tuple[Layer, ...]:
        found: list[Layer] = []
        for number, part in enumerate(matrix.chunk(parts, axis)):
            own = f"{stem}{place}.{number}" if parts > 1 else f"{stem}{place}"
            d_out, d_in = part.shape[::-1] if transposed else part.shape
            pool = pools[number].name if pools else own if place == ".pooled" else ""
            weight = own if several else name
            found.append(Layer(own, (), d_in, d_out, transposed, weight, part, pool))
        return tuple(found)

    wanted = [k for k in range(len(matrices)) if layers(f"{stem}.{k}" if several else stem)]
    if not wanted:
        return
    pooled = made(".pooled", matrices[0], ()) if several else ()
    slices = tuple(
        made(f".{k}" if several else "", matrix, pooled) if k in wanted else ()
        for k, matrix in enumerate(matrices)
    )
    for group in (*slices, pooled):
        for layer in group:
            added = False
            for kind, size in (("input_gram", layer.d_in), ("output_grad_gram", layer.d_out)):
                if kind not in kinds:
                    continue
                if kind == "input_gram" and layer is not group[0]:  # parts read one input
                    if f"{kind}/{group[0].name}" in targets.keys:
                        targets.aliases[f"{kind}/{layer.name}"] = f"{kind}/{group[0].name}"
                        added = True
                    continue
                added |= _add_key(targets, f"{kind}/{layer.name}", size, max_dim)
            if added:
                targets.layers[layer.name] = layer
    targets.functional[id(parameter)] = Functional(transposed, slices, pooled)


def _add_layer(
    targets: Targets,
    by_weight: dict[tuple[int, bool], Layer],
    canonical: dict[int, str],
    name: str,
    module: nn.Module,
    shape: tuple[int, int, bool],
    kinds: Collection[str],
    max_dim: int,
) -> None:
    d_in, d_out, transposed = shape
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    known = by_weight.get((id(weight), transposed))
    if known is not None:
        if module not in known.modules:
            known = replace(known, modules=(*known.modules, module))
            by_weight[id(weight), transposed] = targets.layers[known.name] = known
        for kind in ("input_gram", "output_grad_gram"):
            if f"{kind}/{known.name}" in targets.keys:
                targets.aliases[f"{kind}/{name}"] = f"{kind}/{known.name}"
        return
    parameter = canonical.get(id(weight), f"{name}.weight")
    layer = Layer(name, (module,), d_in, d_out, transposed, parameter, weight)
    added = False
    for kind, size in (("input_gram", d_in), ("output_grad_gram", d_out)):
        if kind in kinds:
            added |= _add_key(targets, f"{kind}/{name}", size, max_dim)
    if added:
        by_weight[id(weight), transposed] = targets.layers[name] = layer


def _add_parameter(
    targets: Targets,
    first: str,
    name: str,
    parameter: nn.Parameter,
    kinds: Collection[str],
    max_dim: int,
) -> None:
    for kind in ("diagonal_fisher", "block_fisher"):
        if kind not in kinds or (kind == "block_fisher" and vector_length(parameter.shape) is None):
            continue
        key, own = f"{kind}/{first}", f"{kind}/{name}"
        if key not in targets.keys and not _add_key(
            targets, key, parameter.numel() if kind == "block_fisher" else 0, max_dim
        ):
            continue
        targets.parameters[first] = parameter
        if own != key:
            targets.aliases[own] = key


def _add_key(targets: Targets, key: str, size: int, max_dim: int) -> bool:
    if size > max_dim:
        targets.skipped[key] = f"dimension {size} is above max_dim={max_dim}"
        return False
    targets.keys[key] = None
    return True


def accumulator_bytes(targets: Targets, key: str) -> int:
    """Bytes of a sum's fp64 accumulator."""
    kind, _, name = key.partition("/")
    if kind == "diagonal_fisher":
        return 8 * targets.parameters[name].numel()
    if kind == "block_fisher":
        return 8 * targets.parameters[name].numel() ** 2
    layer = targets.layers[name]
    return 8 * (layer.d_in if kind == "input_gram" else layer.d_out) ** 2


def plan_passes(targets: Targets, limit: int) -> list[list[str]]:
    """Cut the keys into consecutive groups whose accumulators fit `limit` bytes."""
    keys = list(targets.keys)
    groups: list[list[str]] = []
    used = 0
    for key in keys:
        size = accumulator_bytes(targets, key)
        if size > limit:
            raise ValueError(
                f"{argument('memory_limit', limit)} bytes does not hold the accumulator of {key}"
                f" ({size} bytes); pass at least"
                f" {max(accumulator_bytes(targets, k) for k in keys)}, or leave that layer out"
            )
        if not groups or used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += size
    return groups
