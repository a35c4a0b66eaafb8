"""mergekit's Python entry points, computed by pymerge: `run_merge`, `merge_state_dicts`,
`merge_tensors`, `sparsify`; and `patch()`, with which mergekit itself computes by these kernels.

Parameters, defaults and scopes are mergekit's; arithmetic is in fp32 with one rounding at the end,
whatever `dtype` says. Options that pymerge has no equivalent for raise and say so. NaN and infinity
are a ValueError; tensors whose values are not in their memory (DTensor, meta, ...) a TypeError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pymerge.compat._mergekit_methods import StateDict, bind, run_bound
from pymerge.compat._patching import Patch, Replacements
from pymerge.compat._seed import draw_seed
from pymerge.messages.arguments import check_flags, checked_options, entry_point, renamed
from pymerge.messages.words import counted, shown, some_names, type_of
from pymerge.methods import Method, find_method
from pymerge.ops.memory import check_readable, check_tensor
from pymerge.ops.tensors import (
    FLOATS,
    check_floats,
    check_list,
    check_tensors,
)
from pymerge.ops.ties.api import ties
from pymerge.rules.ties import _number
from pymerge.rules.types import Trim

_TRIMS: dict[str, Trim] = {
    "magnitude": "magnitude",
    "random": "random",
    "magnitude_outliers": "outliers",
    "della_magprune": "magprune",
}


def patch() -> Patch:
    """Make mergekit (0.1.4 or 0.1.5) merge by these kernels, until `unpatch()` or the end of a
    `with` block: `mergekit-yaml`, `mergekit-pytorch`, `run_merge`, `merge_state_dicts`,
    `merge_tensors` and whatever else of it merges tensors.

    It is so for every method but passthrough, which computes nothing. Reading, planning and writing
    stay mergekit's, and so do tensors that the kernels do not merge: integers, embeddings that are
    cut to each other, tensors whose gradient is asked for, values of parameters that
    `pymerge.merge` refuses (averages whose weights sum to 0, densities above 1), devices that the
    method has no kernels for. Results are those of this module's functions in the inputs' dtype;
    random masks follow torch's generator.
    ImportError where no mergekit that fits is installed.
    """
    return _patches().apply()


def unpatch() -> None:
    """Give mergekit its own functions back, whichever calls of `patch` replaced them."""
    _patches().undo()


@functools.cache
def _patches() -> Replacements:
    from pymerge.compat._mergekit_patch import replacements

    return replacements()


@entry_point()
def run_merge(
    merge_config: Any, out_path: str, options: Any = None, config_source: str | None = None
) -> None:
    """Merge model folders by a configuration: `pymerge.merge_checkpoints` under mergekit's name.

    merge_config: mergekit's MergeConfiguration, a mapping of the same keys, or the path of a YAML
        file.
    options: mergekit's MergeOptions or None; device, random_seed, num_threads, out_shard_size (a
        number of parameters), copy_tokenizer, write_model_card and transformers_cache are taken
        from it. Truncated embeddings, adapters applied in less than float32 and pickled output are
        a ValueError; what only says how to compute has no effect. No code of a model is run.
    config_source: not needed; the recipe that is written beside the result comes from merge_config.
    """
    from pymerge.checkpoint.hub import cached_in
    from pymerge.engine.merge import merge_checkpoints

    if not isinstance(merge_config, (str, Path, Mapping)):
        merge_config = merge_config.model_dump(
            mode="json", exclude_none=True, exclude_defaults=True
        )
    cache = getattr(options, "transformers_cache", None)
    with cached_in(None if cache is None else Path(cache)):
        merge_checkpoints(merge_config, out_path, **_engine_options(options))


def _engine_options(options: Any) -> dict[str, Any]:
    if getattr(options, "unsafe_truncate_embeddings", False):
        raise ValueError(
            "options.unsafe_truncate_embeddings cuts off rows whatever tokens they are; leave it"
            " out, and choose a tokenizer with tokenizer_source"
        )
    if not getattr(options, "safe_serialization", True):
        raise ValueError(
            "options.safe_serialization=False: pymerge writes safetensors only; leave it out"
        )
    if getattr(options, "lora_merge_dtype", None) not in (None, "float32"):
        raise ValueError(
            f"options.lora_merge_dtype={options.lora_merge_dtype!r}: adapters are applied in"
            " float32; leave it out"
        )
    found: dict[str, Any] = {"overwrite": True}
    shard = getattr(options, "out_shard_size", None)
    if shard is not None:
        found["out_shard_size"] = f"{shard} parameters"
    for name, own in (
        ("random_seed", "seed"),
        ("num_threads", "threads"),
        ("device", "device"),
        ("copy_tokenizer", "copy_tokenizer"),
        ("write_model_card", "write_model_card"),
    ):
        value = getattr(options, name, None)
        if value is not None:
            found[own] = value
    return found


@entry_point()
def merge_state_dicts(
    models: Mapping[Hashable, Any] | Sequence[Any],
    method: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    base: Hashable | None = None,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    batch_options: Any = None,
) -> dict[str, torch.Tensor]:
    """Merge modules or state dicts.

    models: by id, or a sequence, whose ids are 0, 1, ... base: the id of the base among them.
    parameters: by name; those of single models are one value, a sequence in model order, or a
        mapping by id.
    strict: names must agree; otherwise those that all have are merged.
    dtype, out_dtype: the output's is out_dtype, else dtype, else the inputs' promoted dtype.
    batch_options: how mergekit packs tensors; has no effect.

    Returns new tensors in the first model's order. ValueError for names, shapes, integer tensors or
    parameters that do not fit, for NaN and infinity; TypeError for what is no state dict, for
    tensors that are floating point in some models alone and for parameters that the method does not
    have; ConfigError (a ValueError) for an unknown method.
    """
    check_flags(strict=strict)
    if not isinstance(models, (Mapping, Sequence)):
        raise TypeError(f"models is {type_of(models)}; pass a mapping by id, or a list")
    given = checked_options("parameters", parameters)
    items = models.items() if isinstance(models, Mapping) else enumerate(models)
    states = {key: _state_dict(key, model) for key, model in items}
    if not states:
        raise ValueError("models is empty; pass at least one")
    if base is not None and (not isinstance(base, Hashable) or base not in states):
        raise ValueError(
            f"base={shown(base)} is not the id of a model; there are"
            f" {some_names(map(repr, states))}"
        )
    found = find_method(method)
    first = next(iter(states.values()))
    if not strict:
        common = set(first).intersection(*states.values())
        states = {
            key: {name: state[name] for name in first if name in common}
            for key, state in states.items()
        }
        first = next(iter(states.values()))
    labels = {key: f"models[{key!r}]" for key in states}
    buffers = _agreed_buffers(states, first, lambda key, n: f"{labels[key]}[{n!r}]", found.name)
    floats = {
        key: {n: t for n, t in state.items() if n not in buffers} for key, state in states.items()
    }
    merged = _merge(found, floats, labels, base, dict(given), dtype, out_dtype)
    return {name: buffers[name] if name in buffers else merged[name] for name in first}


@entry_point()
def merge_tensors(
    tensors: Sequence[torch.Tensor],
    method: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    ids: Sequence[Hashable] | None = None,
    base_index: int | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Merge tensors of one shape. base_index: which of them is the base. Errors are those of
    `merge_state_dicts`.
    """
    check_list(tensors, None, "tensors")
    keys = list(range(len(tensors))) if ids is None else list(ids)
    if len(keys) != len(tensors) or len(set(keys)) != len(keys):
        raise ValueError(
            f"ids={keys} must be {counted(len(tensors), 'different id')}, one per tensor"
        )
    if base_index is not None and not 0 <= base_index < len(tensors):
        raise ValueError(f"base_index={base_index} is outside [0, {len(tensors)})")
    if not keys:
        raise ValueError("tensors is empty; pass at least one")
    for k, tensor in enumerate(tensors):
        check_tensor(f"tensors[{k}]", tensor)
    key = name or ""
    found = find_method(method)
    states = {i: {key: tensor} for i, tensor in zip(keys, tensors, strict=True)}
    labels = {i: f"tensors[{k}]" for k, i in enumerate(keys)}
    agreed = _agreed_buffers(states, states[keys[0]], lambda key, _: labels[key], found.name)
    if agreed:
        return agreed[key]
    check_tensors(tensors, None, "tensors", found.name, readable=True)
    base = None if base_index is None else keys[base_index]
    given = dict(checked_options("parameters", parameters))
    return _merge(found, states, labels, base, given, dtype, out_dtype)[key]


@entry_point()
def sparsify(
    tensor: torch.Tensor,
    density: float,
    method: str,
    gamma: float = 0,
    epsilon: float = 0,
    rescale_norm: str | None = None,
) -> torch.Tensor:
    """Trim a task vector: "magnitude", "random", "magnitude_outliers" or "della_magprune", keeping
    the "l1", "l2" or "linf" norm if asked. ValueError for another method or norm, for NaN and
    infinity.
    """
    check_tensor("tensor", tensor)
    kind = getattr(method, "value", method)
    if not isinstance(kind, str) or kind not in _TRIMS:
        known = ", ".join(map(repr, _TRIMS))
        raise ValueError(f"method={shown(kind)} is unknown; there are {known}")
    rescale: Any = getattr(rescale_norm, "value", rescale_norm)
    with renamed(models=["tensor"], rescale="rescale_norm"):
        return ties(
            [tensor],
            trim=_TRIMS[kind],
            density=min(1.0, max(0.0, _number("density", density))),
            gamma=gamma,
            epsilon=epsilon,
            rescale="none" if rescale is None else rescale,
            elect="none",
            merge="sum",
            seed=draw_seed(),
        )


def _state_dict(key: Hashable, model: Any) -> StateDict:
    if isinstance(model, torch.nn.Module):
        model = model.state_dict()
    if not isinstance(model, Mapping):
        raise TypeError(f"models[{key!r}] is {type_of(model)}; pass a module or a state dict")
    for name, tensor in model.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"models[{key!r}] has {type_of(tensor)} for {name!r}; leave out what is not"
                " a torch.Tensor"
            )
        check_readable(f"models[{key!r}][{name!r}]", tensor)
    return model


def _agreed_buffers(
    states: Mapping[Hashable, StateDict],
    first: StateDict,
    label: Callable[[Hashable, str], str],
    op: str,
) -> dict[str, torch.Tensor]:
    """Integer, bool and complex tensors, copied where all models agree on them. TypeError for a
    tensor that is floating point in some models only, or of a dtype that is not merged.

    label: names a model's tensor in messages. op: what takes it.
    """
    buffers = {}
    for name, tensor in first.items():
        named = {label(key, name): state[name] for key, state in states.items() if name in state}
        others = list(named.values())
        if any(other.is_floating_point() for other in others):
            for its_name, other in named.items():
                check_floats(its_name, other, op, readable=True)
            continue
        if any(other.dtype != tensor.dtype or not torch.equal(other, tensor) for other in others):
            which = f"tensor {name!r} is" if name else "tensors are"
            raise ValueError(
                f"{which} not floating point and differ{'s' if name else ''} between the models;"
                " settle it first"
            )
        buffers[name] = tensor.clone()
    return buffers


def _merge(
    method: Method,
    states: Mapping[Hashable, StateDict],
    labels: Mapping[Hashable, str],
    base: Hashable | None,
    parameters: dict[str, Any],
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    for what, value in (("dtype", dtype), ("out_dtype", out_dtype)):
        if value is not None and not (isinstance(value, torch.dtype) and value in FLOATS):
            raise ValueError(f"{what}={shown(value)} is not float32, float16, bfloat16 or float64")
    bound = bind(method, states, base, parameters)
    first = next(iter(states.values()))
    targets = {}
    for name in first:
        kinds = [state[name].dtype for state in states.values() if name in state]
        promoted = kinds[0]
        for kind in kinds[1:]:
            promoted = torch.promote_types(promoted, kind)
        targets[name] = out_dtype or dtype or promoted
    copied = method.copies and all(
        value is None for values in bound.per_model for value in values.values()
    )
    if not bound.keys or copied:
        return {name: tensor.to(targets[name], copy=True) for name, tensor in first.items()}
    out = {
        name: torch.empty(tensor.shape, dtype=targets[name], device=tensor.device)
        for name, tensor in first.items()
    }
    run_bound(method, bound, states, labels, out, stacklevel=3)
    return out
