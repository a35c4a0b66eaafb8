"""mergekit's merge methods computed by these kernels, wherever mergekit calls them.

mergekit 0.1.5 merges a tensor by `GeneralizedTaskArithmeticMerge.merge_group`, or by the function
that a method was defined with; 0.1.4 by a task of the method's class, which is made by a decorator
for some. These are replaced, so that reading, planning and writing stay mergekit's.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch

from pymerge.backends import registry
from pymerge.compat._mergekit_methods import Bound, bind, run_bound
from pymerge.compat._patching import Replacements
from pymerge.methods import METHODS, Method
from pymerge.ops.tensors import FLOATS
from pymerge.recipe.checks import ZERO_SUM

_METHODS = "mergekit.merge_methods"
_ARITHMETIC = f"{_METHODS}.generalized_task_arithmetic"

# The methods that are functions in 0.1.5: of one tensor, and of several of a shape.
_OF_GROUPS = (
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "nearswap",
    "ram",
    "ramplus_tl",
    "sce",
    "arcee_fusion",
)
_OF_BATCHES = ("linear", "slerp")
# The tasks of 0.1.4: method -> (class in the module of its name, attributes that are parameters).
_TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "linear": ("LinearMergeTask", {"normalize": "normalize"}),
    "slerp": ("SlerpTask", {"t": "t"}),
    "nuslerp": ("NuSlerpTask", {"row_wise": "nuslerp_row_wise", "flatten": "nuslerp_flatten"}),
    "karcher": ("KarcherTask", {"max_iter": "max_iter", "tol": "tol"}),
    "model_stock": ("ModelStockMergeTask", {"filter_wise": "filter_wise"}),
    "arcee_fusion": ("ArceeFusionMergeTask", {}),
}
_MADE_TASKS = ("multislerp", "nearswap", "sce")

Own = Callable[..., Any]


def replacements() -> Replacements:
    """What `patch` puts into the installed mergekit. ImportError where it has neither version's
    places.
    """
    importlib.import_module(_METHODS)
    arithmetic = importlib.import_module(_ARITHMETIC)
    if hasattr(arithmetic, "GTATask"):
        places = _places_of_0_1_4(arithmetic.GTATask)
    elif hasattr(arithmetic.GeneralizedTaskArithmeticMerge, "merge_group"):
        places = _places_of_0_1_5(arithmetic.GeneralizedTaskArithmeticMerge)
    else:
        raise ImportError(
            "this mergekit has neither the merge methods of 0.1.4 nor those of 0.1.5, which"
            " pymerge.compat.mergekit.patch replaces"
        )
    return Replacements("mergekit", [], places)


def _places_of_0_1_5(arithmetic: Any) -> list[tuple[Any, str, Own]]:
    get = importlib.import_module(f"{_METHODS}.registry").get
    places = [(arithmetic, "merge_group", _arithmetic_group(arithmetic.merge_group))]
    for name in _OF_GROUPS:
        method = get(name)
        places.append((method, "implementation", _group(name, method.implementation)))
    for name in _OF_BATCHES:
        method = get(name)
        places.append((method, "implementation", _batch(name, method.implementation)))
    return places


def _places_of_0_1_4(arithmetic: Any) -> list[tuple[Any, str, Own]]:
    places = [(arithmetic, "execute", _arithmetic_task(arithmetic.execute))]
    for name, (task, attributes) in _TASKS.items():
        kind = getattr(importlib.import_module(f"{_METHODS}.{name}"), task)
        places.append((kind, "execute", _task(name, attributes, kind.execute)))
    methods = importlib.import_module(f"{_METHODS}.registry").REGISTERED_MERGE_METHODS
    for name in _MADE_TASKS:
        # The decorator's class is nowhere else than in the function that makes its tasks.
        kind = inspect.getclosurevars(type(methods[name]).make_task).nonlocals["tt_cls"]
        places.append((kind, "execute", _task(name, None, kind.execute)))
    return places


def _merged(
    name: str,
    weight: str,
    tensors: Mapping[Hashable, torch.Tensor],
    base: Hashable | None,
    parameters: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> torch.Tensor | None:
    """A tensor of several models merged by the kernels, or None where that is left to mergekit.

    The kernels compute no gradients, take no integers, no tensors of several shapes or, without
    `dtype`, of several dtypes, no values of parameters that the method's rules leave out, and
    nothing on a device that they are not made for. weight: the tensor's name in messages.
    """
    method = METHODS.get(name)
    if method is None or not tensors or not _take(method, tensors.values(), dtype):
        return None
    if base is not None and base not in tensors:
        return None
    try:
        bound = bind(method, tensors, base, parameters)
        bound.resolve(method)
    except (TypeError, ValueError):  # mergekit takes them, or has its own error
        return None
    if not bound.keys or _divides_by_zero(method, bound):
        return None
    first = next(iter(tensors.values()))
    states = {key: {weight: tensor} for key, tensor in tensors.items()}
    labels = {key: str(key) for key in tensors}
    out = {weight: torch.empty(first.shape, dtype=dtype or first.dtype, device=first.device)}
    run_bound(method, bound, states, labels, out)
    return out[weight]


def _divides_by_zero(method: Method, bound: Bound) -> bool:
    """Whether weights of an average sum to zero as mergekit's do, which then gives infinity."""
    if not method.divides_by_weights or not bound.shared["normalize"]:
        return False
    return bool(abs(sum(values["weight"] for values in bound.per_model)) < ZERO_SUM)


def _take(method: Method, tensors: Iterable[torch.Tensor], dtype: torch.dtype | None) -> bool:
    """Whether there are kernels for such tensors."""
    first, *others = tensors
    if torch.is_grad_enabled() and any(each.requires_grad for each in (first, *others)):
        return False
    ops = {"gram": ("gram", "combine")}.get(method.op, (method.op,))
    if method.fixed.get("trim") == "magprune":
        ops = ("magprune",)
    device = first.device.type
    backends = [
        each
        for each in registry.order(device)
        if each != "reference"
        and all(each in registry.TABLE[op] for op in ops)
        and registry.why_not(each) is None
    ]
    return bool(backends) and all(
        each.dtype in FLOATS
        and each.shape == first.shape
        and each.device == first.device
        and (dtype is not None or each.dtype == first.dtype)
        for each in (first, *others)
    )


def _arithmetic_group(original: Own) -> Own:
    @functools.wraps(original)
    def merge_group(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        found = _merged_group(self.method_name, group, parameters)
        return original(self, group, **parameters) if found is None else found

    return merge_group


def _group(name: str, original: Own) -> Own:
    @functools.wraps(original)
    def implementation(group: Any, **parameters: Any) -> torch.Tensor:
        found = _merged_group(name, group, parameters)
        return original(group, **parameters) if found is None else found

    return implementation


def _merged_group(name: str, group: Any, parameters: dict[str, Any]) -> torch.Tensor | None:
    tensors = {entry.id: entry.tensor for entry in group.entries}
    base = next((entry.id for entry in group.entries if entry.is_base), None)
    return _merged(name, group.metadata.name or "", tensors, base, parameters)


def _batch(name: str, original: Own) -> Own:
    """The function of a method that merges several tensors of each model at once."""

    @functools.wraps(original)
    def implementation(batch: Any, **parameters: Any) -> torch.Tensor:
        ids = [f"input {k}" for k in range(len(batch.tensors))]
        base = None if batch.base_index is None else ids[batch.base_index]
        outputs = []
        for place in range(len(batch.tensors[0])):
            held = (each[place] for each in batch.tensors)
            tensors: dict[Hashable, torch.Tensor] = dict(zip(ids, held, strict=True))
            values = {
                key: value[place].tolist() if isinstance(value, torch.Tensor) else value
                for key, value in parameters.items()
            }
            merged = _merged(name, "", tensors, base, values)
            if merged is None:
                return original(batch, **parameters)
            outputs.append(merged)
        return outputs[0][None] if len(outputs) == 1 else torch.stack(outputs)

    return implementation


def _arithmetic_task(original: Own) -> Own:
    @functools.wraps(original)
    def execute(self: Any, tensors: dict[Any, torch.Tensor], **more: Any) -> Any:
        name, base = self.method.method_name, self.base_model
        found = None
        if base in tensors and name in METHODS:
            parameters = {
                "int8_mask": self.int8_mask,
                "normalize": self.normalize,
                "lambda": self.lambda_,
                "rescale": self.rescale_norm is not None,
                **_of_each(METHODS[name], self.tensor_parameters),
            }
            weight, dtype = self.weight_info.name, tensors[base].dtype
            found = _merged(name, weight, tensors, base, parameters, dtype)
        return original(self, tensors, **more) if found is None else found

    return execute


def _task(name: str, attributes: dict[str, str] | None, original: Own) -> Own:
    """attributes: the task's attributes that are parameters of the method; None where it has all of
    them in one.
    """

    @functools.wraps(original)
    def execute(self: Any, tensors: dict[Any, torch.Tensor], **more: Any) -> Any:
        if attributes is None:
            parameters = {**getattr(self, "parameters", {})}
        else:
            parameters = {ours: getattr(self, theirs) for theirs, ours in attributes.items()}
        each = getattr(self, "tensor_parameters", None)
        if each is not None:
            parameters |= _of_each(METHODS[name], each)
        base = getattr(self, "base_model", None)
        weight = getattr(self, "weight_info", None)
        label = "" if weight is None else weight.name
        # A single model is copied by most methods, and an error of others.
        found = _merged(name, label, tensors, base, parameters) if len(tensors) > 1 else None
        return original(self, tensors, **more) if found is None else found

    return execute


def _of_each(method: Method, values: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """The parameters that each model has its own value of: parameter -> model -> value."""
    return {
        parameter.name: {
            model: values[model][parameter.name]
            for model in values
            if parameter.name in values[model]
        }
        for parameter in method.parameters
        if parameter.scope != "shared"
    }
