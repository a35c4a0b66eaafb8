"""Methods that are one function of tensors: what other packages register."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pymerge.methods.method import Given, Method, Parameter
from pymerge.rules.function import FunctionOptions
from pymerge.rules.options import OpOptions


def tensor_method(
    name: str,
    function: Callable[..., Any],
    parameters: Sequence[Parameter] = (),
    *,
    title: str = "",
    url: str = "",
    **inputs: Any,
) -> Method:
    """A merge method that calls a function for every tensor, which is read whole.

    function: called as function(models, base, **values) with torch tensors of one shape, in their
        own dtypes and not to be written to; base is None where there is none. values has one value
        of each shared parameter, a tuple of one per model of the others. Returns the merged tensor.
    parameters: what a recipe, or a caller of `pymerge.merge`, may set.
    inputs: takes_base, base_optional, base_first, min_models, max_models and copies of `Method`.
    """

    def make(given: Given) -> OpOptions:
        values = [
            (each.name, given.shared[each.name])
            if each.scope == "shared"
            else (each.name, tuple(model[each.name] for model in given.per_model))
            for each in parameters
        ]
        return FunctionOptions(function, tuple(values), len(given.per_model), given.non_finite)

    return Method(
        name, title or name, url, {}, tuple(parameters), op="function", make=make, **inputs
    )
