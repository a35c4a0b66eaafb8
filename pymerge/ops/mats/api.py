"""The public op `mats`: merged weights that solve sum_k w_k B_k W A_k = sum_k w_k B_k W_k A_k
(docs/spec/mats.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from typing_extensions import Unpack

from pymerge.dtypes import name_of
from pymerge.interrupt import check
from pymerge.messages.arguments import argument, checked_options
from pymerge.messages.words import type_of
from pymerge.ops.mats import direct
from pymerge.ops.mats.layer import (
    Init,
    MatsLayer,
    Prepared,
    prepare,
    rounded,
    step_ratio,
    step_scale,
)
from pymerge.ops.mats.report import warn_of_layer
from pymerge.ops.mats.solve import Objective, solve_stack
from pymerge.ops.mats.system import Operator, System, build, scaled, working_precision
from pymerge.ops.tensors import check_list, check_tensors
from pymerge.rules.mats import OPTIONS, MatsRule, resolve, trace_shares
from pymerge.rules.report import MatsReport
from pymerge.rules.types import MatsKeywords

__all__ = ["MatsLayer", "MatsReport", "MatsResult", "mats", "mats_many"]

# Layers of equal shape up to this width are solved as one stack of at most this many elements of X
# and K.
_STACK_WIDTH, _STACK_ELEMENTS = 1024, 1 << 26

_DTYPES = {"fp64": torch.float64}

_MESSAGES = {
    "breakdown": "conjugate gradient broke down; the last good iterate is kept",
    "initialisation": "no step lowered the objective; the initialisation is kept",
}


class MatsResult(NamedTuple):
    """The merged weight, in the first weight's dtype, and the layer's report."""

    weight: torch.Tensor
    report: MatsReport


def mats(
    weights: Sequence[torch.Tensor],
    input_grams: Sequence[torch.Tensor] | torch.Tensor,
    output_grams: Sequence[torch.Tensor] | torch.Tensor | None = None,
    *,
    init: Init = "average",
    base: torch.Tensor | None = None,
    init_options: Mapping[str, Any] | None = None,
    name: str = "",
    **options: Unpack[MatsKeywords],
) -> MatsResult:
    """Merge K weights of one layer by matching them in the subspaces that their tasks use (MaTS).

    Takes a few preconditioned conjugate-gradient steps from `init` towards the W with

        sum_k w_k B_k W A_k = sum_k w_k B_k W_k A_k

    A_k the Gram matrix of the layer's inputs on task k, B_k that of the gradients at its output.
    Without `output_grams` (B_k = I) it is RegMean's system. Few steps are better than many:
    stopping early is the method's regularisation.

    weights: K tensors (d_out, d_in), float32, float16, bfloat16 or float64; or vectors (d,), whose
        (d, d) block Fisher matrices are passed as `input_grams` ((IA)^3).
    input_grams: K matrices (d_in, d_in), symmetric positive semidefinite, or one (K, d_in, d_in)
        tensor; best in fp32. A triangle is a ValueError.
    output_grams: K matrices (d_out, d_out), or None.
    init: "average", "pretrained", "task_arithmetic", "ties", "zero" or a tensor (M4); what a
        direction without evidence keeps (M5), and what a failed solve returns. base: the pretrained
        weight where init needs it.
    init_options: {"scaling": ...} for task_arithmetic; options of `pymerge.ties` for ties.
    name: for the report.

    Options, as keywords:

    flavor: "default", or "paper": the official code's solver (M12).
    solver: "cg", or "exact" (M11: K <= 2, or no output_grams).
    iterations: at most; 5 by default, 100 with flavor "paper".
    preconditioner: True by default, False with flavor "paper" (M7).
    damping: of the preconditioner, in units of the mean diagonal; 0.01 (M7).
    off_diagonal: factor on the off-diagonal elements of all A_k and B_k, in [0, 1] (M2).
    task_weights: "raw", "trace" or K numbers (M3).
    step_limit: stop where ||W - W0|| reaches this multiple of max_k ||W_k - mean|| (M8).
    objective_tolerance, residual_tolerance: M8.
    precision: "fp32", "tf32", "bf16x3" or "fp64" (M13).
    backend: of the vector updates, "auto", "reference" (plain torch), "cpu" or "triton"; "cuda" is
        "triton" where there is Triton, else "reference". Matrix products are torch's.

    Returns (weight, report). A layer that cannot be solved is its initialisation and the report's
    status says why; the result is never NaN. Raises ValueError and TypeError for arguments that do
    not fit each other, TypeError for tensors whose values are not in their memory (DTensor, meta,
    ...; it says what to pass), RuntimeError for a backend that is not available.

    Source: Tam, Bansal, Raffel 2023, arXiv:2312.04339; RegMean: arXiv:2212.09849.
    """
    start = checked_options("init_options", init_options)
    layer = MatsLayer(weights, input_grams, output_grams, base, init, start, name)
    return mats_many([layer], **options)[0]


def mats_many(layers: Iterable[MatsLayer], **options: Unpack[MatsKeywords]) -> list[MatsResult]:
    """`mats` for many layers, in order, with the options of `mats`.

    Layers of equal shapes up to a width of 1024 are solved as one stack; layers given the same
    `input_grams` object (q, k and v; gate and up) share its memory, and without output Grams its
    factorisation. Errors are those of `mats`.
    """
    given: dict[str, Any] = dict(options)
    backend = given.pop("backend", "auto")
    for name in given:
        if name not in OPTIONS:
            raise TypeError(f"mats has no option {name!r}; it has {', '.join(OPTIONS)}, backend")
    todo = list(layers)
    stacked: dict[int, torch.Tensor] = {}
    groups: dict[Any, list[tuple[int, Prepared, MatsRule, str]]] = {}
    results: list[MatsResult | None] = [None] * len(todo)
    for index, layer in enumerate(todo):
        check()
        if not isinstance(layer, MatsLayer):
            raise TypeError(f"layers[{index}] is {type_of(layer)}; pass a MatsLayer")
        if not isinstance(layer.name, str):
            raise TypeError(f"{argument('name', layer.name)} is {type_of(layer.name)}; pass a str")
        check_list(layer.weights, layer.base, "weights")
        check_tensors(layer.weights, layer.base, "weights", "mats")
        rule = resolve(len(layer.weights), **given)
        precision = working_precision(rule.precision, layer.weights)
        ready = prepare(layer, _DTYPES.get(precision, torch.float32), stacked)
        if rule.solver == "exact" and ready.output_grams is not None and len(layer.weights) > 2:
            raise ValueError(
                "solver='exact' takes one or two models with output_grams, not"
                f" {len(layer.weights)}; pass solver='cg', or leave output_grams out"
            )
        if ready.bad or ready.negative:
            status = "non_finite" if ready.bad else "not_positive"
            message = ready.bad or ready.negative
            results[index] = _unchanged(ready, rule, precision, status, message)
            continue
        key = (ready.key, precision) if _stackable(ready) else index
        groups.setdefault(key, []).append((index, ready, rule, precision))
    for members in groups.values():
        _, first, rule, precision = members[0]
        size = max(1, _STACK_ELEMENTS // max(1, first.weights.numel()))
        for at in range(0, len(members), size):
            check()
            part = members[at : at + size]
            # Products have the requested precision, whatever the caller's settings of torch.
            with torch.autocast(first.weights.device.type, enabled=False):
                solved = _solve([ready for _, ready, _, _ in part], rule, precision, backend)
            for (index, *_), result in zip(part, solved, strict=True):
                results[index] = result
    return [result for result in results if result is not None]


def _stackable(ready: Prepared) -> bool:
    return max(ready.weights.shape[1:]) <= _STACK_WIDTH


def _solve(
    layers: list[Prepared], rule: MatsRule, precision: str, backend: str
) -> list[MatsResult]:
    """Build, solve and report the system of layers of equal shape."""
    if rule.solver == "exact":
        return [_exact(layer, rule) for layer in layers]
    first = layers[0]
    if first.weights.numel() == 0:
        return [_unchanged(layer, rule, precision, "no_statistics") for layer in layers]
    same = all(layer.sharing == first.sharing for layer in layers)
    outputs = [layer.output_grams for layer in layers if layer.output_grams is not None]
    if same:
        inputs = [first.input_grams]
    else:
        inputs = [layer.input_grams for layer in layers]
    system = build(inputs, outputs or None, rule, first.start.dtype, len(layers))
    shares = [trace_shares(w, p) for w, p in zip(system.weights, system.products, strict=True)]
    known = [bool(s) for s in shares]
    if not all(known):
        return [
            (
                _solve_known([layer], system.layer(i), rule, precision, [shares[i]], backend)[0]
                if known[i]
                else _unchanged(
                    layer,
                    rule,
                    precision,
                    "no_statistics",
                    "no task has statistics of positive trace",
                )
            )
            for i, layer in enumerate(layers)
        ]
    return _solve_known(layers, system, rule, precision, shares, backend)


def _solve_known(
    layers: list[Prepared],
    system: System,
    rule: MatsRule,
    precision: str,
    shares: list[tuple[float, ...]],
    backend: str,
) -> list[MatsResult]:
    apart = torch.stack([layer.weights for layer in layers])
    scales = [step_scale(w) for w in apart]
    norm = torch.zeros(len(layers), dtype=torch.float64, device=apart.device)
    if rule.residual_tolerance > 0:
        norm = rule.residual_tolerance * system.apply_each(apart).flatten(1).norm(dim=1).double()
    apart.sub_(torch.stack([layer.start for layer in layers])[:, None])
    rest, energy = system.apply_apart(apart)
    # M8: what rounding leaves of a residual, in a system of unit scale.
    small = apart.flatten(2).norm(dim=2).amax(1).double() * (torch.finfo(rest.dtype).eps / 2)
    small = torch.maximum(small, norm)
    del apart
    limit = [
        scale * rule.step_limit if rule.step_limit < math.inf else math.inf for scale in scales
    ]

    def exactly(index: int, step: torch.Tensor) -> tuple[float, float]:
        layer = layers[index]
        points = (layer.start, layer.start + step)
        start, end = (_objective(layer, rule, system.weights[index], x) for x in points)
        return start, end

    objective = Objective((energy / system.scale).tolist(), exactly)
    step, outcomes = solve_stack(system, rest, rule, precision, limit, small, objective, backend)
    results = []
    for i, (layer, got) in enumerate(zip(layers, outcomes, strict=True)):
        report = MatsReport(
            name=layer.name,
            status=got.status,
            solver="cg",
            iterations=got.iterations,
            residual_start=got.residual_start,
            residual_exit=got.residual_exit,
            objective_decrease=got.decrease,
            damping=got.damping,
            breakdowns=got.breakdowns,
            step=step_ratio(got.length, scales[i]),
            trace_shares=shares[i],
            precision=precision,
            message=_MESSAGES.get(got.status, ""),
        )
        results.append(_result(layer, layer.start + step[i], report))
    return results


def _objective(layer: Prepared, rule: MatsRule, weights: Sequence[float], x: torch.Tensor) -> float:
    """f(X) in float64, of weights and statistics as given (M1, M10). One model's matrices are
    converted at a time.
    """
    total = 0.0
    for k, weight in enumerate(weights):
        apart = x.double() - layer.weights[k].double()
        image = apart @ scaled(layer.input_grams[k].double(), rule.off_diagonal)
        if layer.output_grams is not None:
            image = scaled(layer.output_grams[k].double(), rule.off_diagonal) @ image
        total += weight * float((apart * image).sum()) / 2
    return total


def _exact(layer: Prepared, rule: MatsRule) -> MatsResult:
    """M11 and M14, in float64."""
    count = layer.weights.shape[0]
    system = build(
        [layer.input_grams],
        None if layer.output_grams is None else [layer.output_grams],
        rule,
        torch.float64,
    )
    shares = trace_shares(system.weights[0], system.products[0])
    if not shares or layer.weights.numel() == 0:
        return _unchanged(
            layer, rule, "fp64", "no_statistics", "no task has statistics of positive trace"
        )
    start = layer.start.double()
    rest = system.apply_each((layer.weights.double() - start)[None])[0]
    if layer.output_grams is None:
        assert system.total_a is not None
        step, singular = direct.solve_right(rest, system.total_a[0])
    else:
        assert system.b is not None
        d_out = rest.shape[0]
        b = system.b[0].view(d_out, count, d_out).transpose(0, 1)
        if count == 1:
            step, singular = direct.solve_one(rest, system.a[0, 0], b[0])
        else:
            step, singular = direct.solve_two(rest, list(system.a[0]), list(b))
    image = Operator(system, rest.shape[0], "fp64")(step[None], torch.empty_like(step)[None])[0]
    scale = float(system.scale[0])
    decrease = float((step * rest).sum() - (step * image).sum() / 2) / scale
    if not decrease >= 0 or not bool(step.isfinite().all()):
        return _unchanged(
            layer, rule, "fp64", "initialisation", "the exact solution does not lower the objective"
        )
    report = MatsReport(
        name=layer.name,
        status="singular" if singular else "exact",
        solver="exact",
        residual_start=float(rest.norm()) / scale,
        residual_exit=float((rest - image).norm()) / scale,
        objective_decrease=decrease,
        step=step_ratio(float(step.norm()), step_scale(layer.weights)),
        trace_shares=shares,
        precision="fp64",
        message="directions without evidence keep the initialisation" if singular else "",
    )
    return _result(layer, start + step, report)


def _unchanged(
    layer: Prepared, rule: MatsRule, precision: str, status: str, message: str = ""
) -> MatsResult:
    """The initialisation, and why."""
    if status in ("non_finite", "not_positive"):
        where = f" of {layer.name!r}" if layer.name else ""
        warn_of_layer(f"{message}{where}; the layer", stacklevel=3)
    report = MatsReport(layer.name, status, rule.solver, precision=precision, message=message)
    return MatsResult(_start(layer), report)


def _result(layer: Prepared, solved: torch.Tensor, report: MatsReport) -> MatsResult:
    """N4: the initialisation, where the output's dtype cannot hold the solution."""
    weight = _output(layer, solved)
    if weight.dtype == solved.dtype or bool(weight.isfinite().all()):
        return MatsResult(weight, report)
    dtype = name_of(layer.dtype)
    report = replace(
        report,
        status="initialisation",
        iterations=0,
        residual_exit=report.residual_start,
        objective_decrease=0.0,
        step=0.0,
        message=f"the solution is beyond {dtype}; the initialisation is kept",
    )
    return MatsResult(_start(layer), report)


def _start(layer: Prepared) -> torch.Tensor:
    return rounded(layer.start, layer.dtype).reshape(layer.shape)


def _output(layer: Prepared, result: torch.Tensor) -> torch.Tensor:
    return result.to(layer.dtype).reshape(layer.shape)
