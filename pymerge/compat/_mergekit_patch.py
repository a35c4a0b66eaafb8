"""mergekit's merge methods computed by these kernels, wherever mergekit calls them.

mergekit 0.1.5 merges a tensor by `GeneralizedTaskArithmeticMerge.merge_group` and by the function
that `linear` was defined with; 0.1.4 by the tasks `GTATask` and `LinearMergeTask`. These are
replaced, so that reading, planning and writing stay mergekit's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pymerge.compat._patching import Replacements
from pymerge.messages.arguments import renamed
from pymerge.methods import METHODS, find_method
from pymerge.ops.tensors import FLOATS
from pymerge.ops.ties.api import ties

_ARITHMETIC = "mergekit.merge_methods.generalized_task_arithmetic"
_LINEAR = "mergekit.merge_methods.linear"
_ZERO_SUM = 1e-8

# merge(method, names, tensors, base, parameters, dtype): compat.mergekit's merge of one tensor.
Merge = Callable[..., torch.Tensor]


def replacements(merge: Merge) -> Replacements:
    """What `patch` puts into the installed mergekit. ImportError where it has neither version's
    places.
    """
    importlib.import_module("mergekit.merge_methods")
    arithmetic = importlib.import_module(_ARITHMETIC)
    linear = importlib.import_module(_LINEAR)
    if hasattr(arithmetic, "GTATask"):
        places: list[tuple[Any, str, Any]] = [
            (arithmetic.GTATask, "execute", _task(merge, arithmetic.GTATask.execute)),
            (linear.LinearMergeTask, "execute", _linear_task(linear.LinearMergeTask.execute)),
        ]
    elif hasattr(linear, "linear_merge"):
        kind = arithmetic.GeneralizedTaskArithmeticMerge
        own = linear.linear_merge
        places = [
            (kind, "merge_group", _group(merge, kind.merge_group)),
            (own, "implementation", _batch(own.implementation)),
        ]
    else:
        raise ImportError(
            "this mergekit has neither the merge methods of 0.1.4 nor those of 0.1.5, which"
            " pymerge.compat.mergekit.patch replaces"
        )
    return Replacements("mergekit", [], places)


def _is_ours(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels merge these tensors: they hold no gradients, and take no integers. What
    is left is merged by mergekit itself.
    """
    recorded = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    fit = all(each.dtype in FLOATS and each.shape == tensors[0].shape for each in tensors)
    return fit and not recorded


def _group(merge: Merge, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def merge_group(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        tensors = {entry.id: entry.tensor for entry in group.entries}
        if self.method_name not in METHODS or not _is_ours([*tensors.values()]):
            return original(self, group, **parameters)
        base = next(entry for entry in group.entries if entry.is_base)
        return merge(
            find_method(self.method_name),
            group.metadata.name or "",
            tensors,
            base.id,
            parameters,
            base.tensor.dtype,
        )

    return merge_group


def _task(merge: Merge, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def execute(self: Any, tensors: dict[Any, torch.Tensor], **more: Any) -> torch.Tensor:
        name = self.method.method_name
        if name not in METHODS or not _is_ours([*tensors.values()]):
            return original(self, tensors, **more)
        models = [model for model in tensors if model != self.base_model]
        parameters: dict[str, Any] = {
            "int8_mask": self.int8_mask,
            "normalize": self.normalize,
            "lambda": self.lambda_,
            "rescale": self.rescale_norm is not None,
        }
        for each in find_method(name).parameters:
            if each.scope != "shared":
                parameters[each.name] = {m: self.tensor_parameters[m][each.name] for m in models}
        base = tensors[self.base_model]
        weight = self.weight_info.name
        return merge(find_method(name), weight, tensors, self.base_model, parameters, base.dtype)

    return execute


def _linear(tensors: Sequence[torch.Tensor], weights: Sequence[float], normalize: bool) -> Any:
    """The average, or the sum, of tensors; None where that is left to mergekit."""
    if not _is_ours(tensors) or (normalize and abs(sum(weights)) < _ZERO_SUM):
        return None
    return ties(
        tensors,
        trim="none",
        elect="none",
        merge="weighted_mean" if normalize else "sum",
        weights=list(weights),
    )


def _batch(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def implementation(batch: Any, weight: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        outputs = []
        for place, weights in enumerate(weight.tolist()):
            with renamed(models=[f"input {k}" for k in range(len(weights))]):
                merged = _linear([each[place] for each in batch.tensors], weights, normalize)
            if merged is None:
                return original(batch, weight=weight, normalize=normalize)
            outputs.append(merged)
        return outputs[0][None] if len(outputs) == 1 else torch.stack(outputs)

    return implementation


def _linear_task(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def execute(self: Any, tensors: Mapping[Any, torch.Tensor], **more: Any) -> torch.Tensor:
        weights = [self.tensor_parameters[model]["weight"] for model in tensors]
        held = [*tensors.values()]
        promoted = functools.reduce(torch.promote_types, [each.dtype for each in held])
        merged = None
        if all(each.dtype == promoted for each in held):  # it refuses others by itself
            with renamed(models=[str(model) for model in tensors]):
                merged = _linear(held, weights, self.normalize)
        return original(self, tensors, **more) if merged is None else merged

    return execute
