"""`pymerge.slerp` and the like: a function for each method by Gram matrix, of tensors or state
dicts. They call `pymerge.merge` with that method (docs/methods.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeVar

import torch

from pymerge.engine.mappings import merge_each
from pymerge.engine.state_dicts import by_op, check_inputs, check_reports, merge
from pymerge.messages.arguments import argument, renamed
from pymerge.methods import find_method
from pymerge.ops import registered
from pymerge.ops.mats.report import warnings_of
from pymerge.ops.memory import check_readable, new_result
from pymerge.ops.tensors import check_list, check_out, check_tensors
from pymerge.ops.ties.api import merge_many
from pymerge.rules.report import MatsReport
from pymerge.rules.ties import TiesOptions
from pymerge.rules.types import Backend, NonFinite, PerModel

# All arguments of a call are of one kind: tensors give a tensor, state dicts a dict.
Model = TypeVar("Model", torch.Tensor, dict[str, torch.Tensor], Mapping[str, torch.Tensor])
# Whose numbers a case gets that mergekit decides otherwise.
Numbers = Literal["paper", "mergekit"]


def slerp(
    models: Sequence[Model],
    base: Model | None = None,
    *,
    t: SupportsFloat,
    flavor: Numbers = "paper",
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Spherical interpolation between two models, tensor by tensor (G6 of docs/spec/gram.md).

    With the angle theta between the first (a) and the second (b):

        out = (sin((1 - t) theta) * a + sin(t theta) * b) / sin(theta)

    and (1 - t) * a + t * b where they are nearly parallel or opposite, or one of them is zero.

    models: two tensors of one shape, or two state dicts; with base the base is the first, and
        models has one. t: 0 gives the first, 1 the second.
    flavor: "paper", or "mergekit", which scales by sin(t pi / 2) where one is zero.
    non_finite: "error" or "allow". backend: "auto", "reference", "cpu", "cuda" or "triton".
    out: written and returned, as in `pymerge.ties`.

    Returns a tensor, or for state dicts what `pymerge.merge` does; raises as `pymerge.merge`.
    """
    return _run("slerp", models, base, out, locals(), ("t", "flavor"))


def nuslerp(
    models: Sequence[Model],
    base: Model | None = None,
    *,
    weights: PerModel | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    flavor: Numbers = "paper",
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Spherical interpolation between two models, or two task vectors, by weights (G7 of
    docs/spec/gram.md).

    As `pymerge.slerp` with t = w_2 / (w_1 + w_2), 1/2 where the weights cancel; with a base,
    base + the interpolation of models[k] - base.

    models, base, out: tensors of one shape, or state dicts. weights: 1 by default.
    nuslerp_flatten: one angle for a whole tensor. Without it, one for each row (along the last
        dimension), or with nuslerp_row_wise for each column (along the first), as mergekit has it.
    flavor: "paper", or "mergekit", whose numbers differ for zero and for nearly opposite tensors.

    Returns and raises as `pymerge.slerp`.
    """
    names = ("weights", "nuslerp_flatten", "nuslerp_row_wise", "flavor")
    return _run("nuslerp", models, base, out, locals(), names)


def multislerp(
    models: Sequence[Model],
    base: Model | None = None,
    *,
    weights: PerModel | None = None,
    normalize_weights: bool = True,
    eps: SupportsFloat = 1e-8,
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Barycentric interpolation of any number of models, or task vectors, on a sphere (G8 of
    docs/spec/gram.md).

    The unit vectors are averaged in the plane that touches the sphere at their weighted mean, and
    the result gets the weighted mean of their lengths. Where the mean vanishes, the weighted sum.

    models, base, out: tensors of one shape, or state dicts. weights: 1 by default; divided by their
    sum with normalize_weights. eps: what is added to lengths that divide.

    Returns and raises as `pymerge.slerp`; ValueError for weights that cannot be normalized.
    """
    names = ("weights", "normalize_weights", "eps")
    return _run("multislerp", models, base, out, locals(), names)


def karcher(
    models: Sequence[Model],
    *,
    max_iter: SupportsIndex = 10,
    tol: SupportsFloat = 1e-5,
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """The Karcher mean of models on a sphere, times their mean length (G9 of docs/spec/gram.md).

    Iterates on K coefficients, which the Gram matrix makes possible: the tensors are read twice,
    however many iterations there are.

    models, out: tensors of one shape, or state dicts. max_iter: at most so many steps. tol: the
    step at which it has converged, and the length below which a model has no direction.

    Returns and raises as `pymerge.slerp`. Source: arXiv:2603.04972.
    """
    return _run("karcher", models, None, out, locals(), ("max_iter", "tol"))


def model_stock(
    models: Sequence[Model],
    base: Model,
    *,
    filter_wise: bool = False,
    flavor: Numbers = "paper",
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """A point between the base and the average of two or more models, by the angle between their
    task vectors (G10 of docs/spec/gram.md).

        out = t * mean(models) + (1 - t) * base,   t = K cos / (1 + (K - 1) cos)

    with the mean cosine between task vectors.

    models, base, out: tensors of one shape, or state dicts. filter_wise: one ratio for each row
    (along the last dimension) instead of one for a tensor.
    flavor: "paper" keeps t within [0, 1]; "mergekit" does not, and takes small task vectors for
        orthogonal.

    Returns and raises as `pymerge.slerp`. Source: Jang et al. 2024, arXiv:2403.19522.
    """
    return _run("model_stock", models, base, out, locals(), ("filter_wise", "flavor"))


def _run(
    method: str,
    models: Sequence[Any],
    base: Any,
    out: Any,
    given: Mapping[str, Any],
    names: Sequence[str],
    reports: list[MatsReport] | None = None,
) -> Any:
    """given: the caller's arguments, of which `names` are the method's own."""
    parameters = {name: given[name] for name in (*names, "non_finite", "backend")}
    if registered.tracing() and reports is None and registered.are_plain(parameters):
        return registered.merge(method, models, base, out, parameters)
    check_list(models, base)
    check_reports(reports)
    if not isinstance(models[0], torch.Tensor) and not isinstance(base, torch.Tensor):
        keywords: Any = {**parameters, "method": method, "reports": reports, "out": out}
        return merge(models, base, **keywords)
    found = find_method(method)
    swapped = found.base_first and base is not None
    models, base = check_inputs(found, models, base)
    with renamed(models=["base", "models[0]"]) if swapped else nullcontext():
        check_tensors(models, base, op=method)
    options, others, _ = by_op(found, parameters, len(models), base is not None)
    resolved = options()
    like = models[0] if base is None else base
    if out is None:
        out = new_result(like.shape, like.dtype, like.device)
        check_readable("the result", out)
    elif isinstance(out, torch.Tensor):
        check_out(out, models, base)
    else:
        raise TypeError(f"{argument('out')} is no tensor, but models are; pass one")
    assert resolved is not None
    resolved = resolved.of_tensor(tuple(like.shape), linear=like.ndim == 2)
    if isinstance(resolved, TiesOptions):
        merge_many([("", models, base, out)], resolved, others["backend"], stacklevel=3)
        return out
    made = merge_each([("", models, base, out)], resolved, others["backend"], stacklevel=3)
    for sentence in warnings_of(made):
        warnings.warn(sentence, stacklevel=3)
    if reports is not None:
        reports += made
    return out
