"""The public op `select`: exact magnitude thresholds alone (docs/spec/ties.md, "select")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch

from pymerge.backends import registry
from pymerge.ops import registered
from pymerge.ops.tensors import check_list, check_state_dicts, check_tensors, of_tensor
from pymerge.rules.ties import resolve_options
from pymerge.rules.types import Backend, Flavor, PerModel, Scope

StateDict = Mapping[str, torch.Tensor]


@overload
def select(
    models: Sequence[torch.Tensor] | torch.Tensor,
    base: torch.Tensor | None = ...,
    *,
    density: PerModel = ...,
    flavor: Flavor = ...,
    scope: Scope | None = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...
@overload
def select(
    models: Sequence[StateDict],
    base: StateDict | None = ...,
    *,
    density: PerModel = ...,
    flavor: Flavor = ...,
    scope: Literal["tensor"],
    backend: Backend = ...,
) -> dict[str, torch.Tensor]: ...
@overload
def select(
    models: Sequence[StateDict],
    base: StateDict | None = ...,
    *,
    density: PerModel = ...,
    flavor: Flavor = ...,
    scope: Literal["model"],
    backend: Backend = ...,
) -> torch.Tensor: ...
@overload
def select(
    models: Sequence[StateDict],
    base: StateDict | None = ...,
    *,
    density: PerModel = ...,
    flavor: Literal["mergekit", "peft"] = ...,
    scope: None = ...,
    backend: Backend = ...,
) -> dict[str, torch.Tensor]: ...
@overload
def select(
    models: Sequence[StateDict],
    base: StateDict | None = ...,
    *,
    density: PerModel = ...,
    flavor: Literal["paper"],
    scope: None = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...
@overload
def select(
    models: Sequence[StateDict],
    base: StateDict | None = ...,
    *,
    density: PerModel = ...,
    flavor: Flavor = ...,
    scope: Scope | None = ...,
    backend: Backend = ...,
) -> torch.Tensor | dict[str, torch.Tensor]: ...
def select(
    models: Any,
    base: Any = None,
    *,
    density: PerModel = 0.2,
    flavor: Flavor = "mergekit",
    scope: Scope | None = None,
    backend: Backend = "auto",
) -> Any:
    """The threshold t_k of each model: the exact r_k-th largest |models[k] - base| (T2, T3).

    t_k keeps |models[k] - base| >= t_k, with r_k elements or, where magnitudes are equal, more.

    models, base, density, flavor, backend: as in `ties`, tensors or state dicts. scope: "tensor" or
        "model", for state dicts.

    Returns a float32 tensor (K,) on the CPU (float64 where an input is float64); for state dicts
    with scope "tensor" a dict of such tensors by name, over the floating-point tensors. NaN says
    that nothing is kept, 0 that all is.

    Raises ValueError and TypeError for options and tensors that do not fit, TypeError for tensors
    whose values are not in their memory (E5), RuntimeError for a backend that is not available.
    """
    given: dict[str, Any] = {"density": density, "flavor": flavor, "scope": scope}
    if registered.tracing() and registered.are_plain(given) and not isinstance(models[0], Mapping):
        return registered.select(models, base, backend=backend, **given)
    check_list(models, base)
    options = resolve_options(len(models), **given)
    if not isinstance(models[0], Mapping):
        check_tensors(models, base, op="select")
        return _thresholds([(models, base)], models[0].numel(), options, backend)
    like = check_state_dicts(models, base)
    segments = {}
    for name in like:
        if like[name].is_floating_point():
            tensors = [m[name] for m in models]
            base_tensor = None if base is None else base[name]
            with of_tensor(name):
                check_tensors(tensors, base_tensor, op="select")  # it may give others now
            segments[name] = (tensors, base_tensor)
    if options.scope == "model":
        total = sum(tensors[0].numel() for tensors, _ in segments.values())
        return _thresholds(list(segments.values()), total, options, backend)
    return {
        name: _thresholds([segment], segment[0][0].numel(), options, backend)
        for name, segment in segments.items()
    }


def _thresholds(segments: Sequence[Any], n: int, options: Any, backend: str) -> torch.Tensor:
    if not segments:
        return torch.full((len(options.densities),), torch.nan, dtype=torch.float32, device="cpu")
    tensors, _ = segments[0]
    _, function = registry.pick("select", tensors[0].device.type, backend)
    every = [t for models, b in segments for t in (*models, *([] if b is None else [b]))]
    double = any(t.dtype == torch.float64 for t in every)
    values = function(segments, options.rule(n).ranks)
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    return torch.tensor(values, dtype=torch.float64 if double else torch.float32, device="cpu")
