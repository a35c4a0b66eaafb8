"""The public op `ties`: validate, choose the backend, call (docs/spec/ties.md)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex, TypeVar

import torch

from pymerge.backends import registry
from pymerge.messages.arguments import argument
from pymerge.messages.words import type_of
from pymerge.ops import registered
from pymerge.ops.differences import NotMerged, warn_of_not_merged
from pymerge.ops.memory import check_readable, new_like
from pymerge.ops.sharded.layout import is_dtensor
from pymerge.ops.sharded.merge import is_sharded, merge_sharded
from pymerge.ops.sharded.owners import agreed_owners
from pymerge.ops.tensors import (
    check_list,
    check_out,
    check_out_dict,
    check_spreads,
    check_state_dicts,
    check_tensors,
    check_weights,
    of_tensor,
    tied_names,
)
from pymerge.ops.ties.overflow import Merged, report_overflow
from pymerge.ops.ties.run import TensorCall, run_all, run_tensor, zero_like
from pymerge.ops.weights import averaged, is_running, mean_of
from pymerge.rules.ties import TiesOptions, TiesRule, TiesStats, model_rule, resolve_options
from pymerge.rules.types import (
    Backend,
    Elect,
    Flavor,
    Merge,
    NonFinite,
    PerModel,
    Rescale,
    Scope,
    Trim,
    ZeroSign,
)

StateDict = Mapping[str, torch.Tensor]
# All arguments of a call are of one kind: tensors give a tensor, state dicts a dict.
Model = TypeVar("Model", torch.Tensor, dict[str, torch.Tensor], Mapping[str, torch.Tensor])


def ties(
    models: Sequence[Model],
    base: Model | None = None,
    *,
    density: PerModel = 0.2,
    weights: PerModel | None = None,
    scaling: SupportsFloat = 1.0,
    flavor: Flavor = "mergekit",
    trim: Trim = "magnitude",
    elect: Elect = "sum",
    merge: Merge | None = None,
    zero_sign: ZeroSign | None = None,
    scope: Scope | None = None,
    rescale: Rescale = "none",
    gamma: PerModel = 0.01,
    epsilon: PerModel = 0.15,
    seed: SupportsIndex = 0,
    non_finite: NonFinite = "error",
    name: str = "",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Merge fine-tuned models into one: trim each task vector, elect a sign per element, average
    those that agree.

    With delta_k = models[k] - base, trimmed to the largest `density` of its magnitudes:

        s      = sign(sum_k e_k * delta_k)
        merged = sum_{k: sign(e_k * delta_k) = s} w_k * delta_k / sum_{k agrees} w_k
        out    = base + scaling * merged

    in one pass over the inputs, without copying or stacking them. Rules T1 to T9 of
    docs/spec/ties.md say what every option means to the bit; all backends and thread counts give
    the same bits.

    models: K tensors of one shape (float32, float16, bfloat16 or float64, each its own dtype), or K
        state dicts.
    base: tensor or state dict of the same kind; None where `models` are task vectors already (T1).
    density: fraction kept, in [0, 1] (T2); one number, or one per model.
    weights: w_k, one number or one per model; 1 by default.
    scaling: the papers' lambda (T6).
    flavor: "mergekit", "peft" or "paper" (the official TIES code): rank rule and election weights
        e_k, and the defaults of merge, zero_sign and scope.
    trim: "magnitude", "outliers" (breadcrumbs: also drops the largest `gamma`), "random" (DARE),
        "magprune" (DELLA: at random, with probabilities from density - epsilon for the smallest
        magnitude of a row to density + epsilon for the largest) or "none" (T3).
    elect: "sum", "count" or "none" (T4).
    merge: "weighted_mean", "mean" (by count), "sum" or "max" (T5).
    zero_sign: "positive" or "majority": the sign where the election's sum is zero (T4).
    scope: "tensor" or "model": what thresholds and the majority sign are taken over (T7).
    rescale: "none", "density" (divide by it), or keep the "l1", "l2" or "linf" norm of the task
        vector (T3r).
    seed, name: key the random trim (T8); for state dicts each tensor's own name is used.
    non_finite: "error" or "allow" (N1 to N3).
    backend: "auto", "reference", "cpu", "cuda" or "triton".
    out: written and returned; contiguous, overlapping no input; its dtype is the output's. By
        default a new tensor of the base's dtype. For state dicts, a mapping that holds such a
        tensor for every name.

    DTensors of one mesh and equal placements give a DTensor of these: a collective call of all
    ranks of the mesh, to the bit the merge of the full tensors (docs/distributed.md).

    Returns a tensor, or for state dicts a dict in the base's order: integer, bool and complex
    tensors are the base's (a warning names those that differ), running means and variances are
    averaged over the models (with a warning), and tensors that are one memory in every state dict
    stay one. In a function that torch.compile or torch.export traces, it is one op of the graph
    (docs/compile.md).

    Raises MismatchError (a ValueError) for state dicts whose names or shapes differ, and for those
    of quantised models and adapters; ValueError and TypeError for options and tensors that do not
    fit, and for NaN or infinity in a task vector or in an fp16 result of finite ones (with
    non_finite="allow" a warning, where the counts are waited for: N4); TypeError for tensors whose
    values are not in their memory (FakeTensor, meta, quantised ones, a DTensor beside plain tensors
    or of placement Partial, ...: E5, E7); RuntimeError for a backend that is not available.

    Source: Yadav et al. 2023, arXiv:2306.01708; DARE: arXiv:2311.03099; breadcrumbs:
        arXiv:2312.06795; DELLA: arXiv:2406.11617.
    """
    given: dict[str, Any] = {
        "density": density,
        "weights": weights,
        "scaling": scaling,
        "flavor": flavor,
        "trim": trim,
        "elect": elect,
        "merge": merge,
        "zero_sign": zero_sign,
        "scope": scope,
        "rescale": rescale,
        "gamma": gamma,
        "epsilon": epsilon,
        "seed": seed,
        "non_finite": non_finite,
    }
    if registered.tracing() and registered.are_plain(given):
        traced: Any = registered.ties(models, base, out, name=name, backend=backend, **given)
        return traced
    check_list(models, base, shards=True)
    if not isinstance(name, str):
        raise TypeError(
            f"{argument('name', name)} is {type_of(name)}; pass the tensor's name, a str"
        )
    options = resolve_options(len(models), **given)
    # A type checker cannot see that the result is of the same kind as the arguments.
    inputs: Any = models
    start: Any = base
    target: Any = out
    merged: Any
    if isinstance(models[0], Mapping) or isinstance(base, Mapping):
        merged = _merge_state_dicts(inputs, start, target, options, backend)
    else:
        merged = _merge_tensors(inputs, start, target, options, backend, name)
    return merged


def _merge_tensors(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    out: torch.Tensor | None,
    options: TiesOptions,
    backend: Backend,
    name: str,
) -> torch.Tensor:
    check_tensors(models, base, shards=True)
    like = models[0] if base is None else base
    if out is None:
        out = new_like(like, like.dtype)
        check_readable("the result", out, shards=is_dtensor(like))  # modes of torch make others
    else:
        check_out(out, models, base)
    if is_dtensor(out):
        merge_many([(name, models, base, out)], options, backend, stacklevel=3)
        return out
    rule = options.rule(out.numel(), name, out.shape)
    stats = run_tensor(models, base, options, rule, out, backend, name)
    report_overflow([(name, out, stats)], options.non_finite, stacklevel=3)
    return out


def _merge_state_dicts(
    models: Sequence[StateDict],
    base: StateDict | None,
    out: StateDict | None,
    options: TiesOptions,
    backend: str,
) -> dict[str, torch.Tensor]:
    like = check_state_dicts(models, base, shards=True)
    check_spreads(models, base)
    check_weights(models, base)
    dicts = [*models] if base is None else [base, *models]
    if out is None:
        owners = agreed_owners(dict(tied_names(like, dicts)), like)
    else:  # tied in the inputs only: both are written; tied in `out` only: refused, they overlap
        owners = agreed_owners(check_out_dict(out, like, models, base), like)
    result: dict[str, torch.Tensor] = {}
    calls: list[TensorCall] = []
    running: list[TensorCall] = []
    plain: list[NotMerged] = []
    for name, owner in owners.items():
        if owner != name:
            continue
        if not like[name].is_floating_point():
            different = _copy_plain(name, like, models, out, result)
            if different:
                plain.append((name, like[name].dtype, different))
            continue
        tensors = [m[name] for m in models]
        base_tensor = None if base is None else base[name]
        with of_tensor(name):
            check_tensors(tensors, base_tensor, shards=True)  # a mapping may give others now
            target = None if out is None else out[name]
            if target is not None:
                check_out(target, tensors, base_tensor)
        if target is None:
            target = new_like(like[name], like[name].dtype)
            if not calls:  # a mode of torch may make another kind of tensor
                check_readable("the result", target, shards=is_dtensor(like[name]))
        result[name] = target
        if base is not None and is_running(name):
            running.append((name, tensors, None, target))
        else:
            calls.append((name, tensors, base_tensor, target))
    warn_of_not_merged(plain, base is not None, stacklevel=3)
    merge_many(calls, options, backend, stacklevel=4)
    if running:
        warnings.warn(averaged([name for name, *_ in running], "ties"), stacklevel=3)
        mean = mean_of(len(models), options.non_finite)
        merge_many(running, mean, backend, stacklevel=4)
    return {name: result[owners[name]] for name in like}


def merge_many(
    calls: Sequence[TensorCall], options: TiesOptions, backend: str, stacklevel: int
) -> None:
    """Merge checked tensors with the same options; with scope "model" thresholds span all of them
    (T7).
    """
    if is_sharded(calls):
        stats = merge_sharded(calls, options, backend)
        report_overflow(_merged(calls, stats), options.non_finite, stacklevel=stacklevel)
        return
    counted: list[TiesStats | None] = []

    def merge_all(whole: TiesRule | None) -> int:
        """How many more elements have S > 0 than S < 0."""
        rules = [options.rule(target.numel(), name, target.shape) for name, *_, target in calls]
        if whole is not None:
            rules = [whole.of_tensor(rule) for rule in rules]
        counted[:] = run_all(calls, rules, options, backend)
        return sum(each.positive - each.negative for each in counted if each is not None)

    if options.scope == "model" and calls:
        segments = [(tensors, base) for _, tensors, base, _ in calls]
        _, select = registry.pick("select", calls[0][3].device.type, backend)

        def ranked(ranks: Sequence[int], with_zero: bool) -> Iterable[float]:
            more = zero_like(segments[0]) if with_zero else []
            found: Iterable[float] = select([*segments, *more], ranks)
            return found

        whole = model_rule(options, sum(c[3].numel() for c in calls), ranked, merge_all)
        # Not after a counting pass with the same sign: its outputs are the result.
        if not counted or whole.majority == -1:
            merge_all(whole)
    else:
        merge_all(None)
    report_overflow(_merged(calls, counted), options.non_finite, stacklevel=stacklevel)


def _merged(calls: Sequence[TensorCall], counted: Sequence[TiesStats | None]) -> list[Merged]:
    return [(name, target, stats) for (name, *_, target), stats in zip(calls, counted, strict=True)]


def _copy_plain(
    name: str,
    like: StateDict,
    models: Sequence[StateDict],
    out: StateDict | None,
    result: dict[str, torch.Tensor],
) -> list[int]:
    """E3: integer, bool and complex tensors are the base's. Returns the models that differ."""
    different = [k for k, m in enumerate(models) if not torch.equal(m[name], like[name])]
    result[name] = like[name].clone() if out is None else out[name].copy_(like[name])
    return different
