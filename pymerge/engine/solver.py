"""Merges tensors with statistics, once all they need is in memory: MaTS, RegMean and Fisher, for
folders and state dicts alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from pymerge.dtypes import torch_dtype
from pymerge.errors import NonFiniteError
from pymerge.messages.words import some_names
from pymerge.ops.mats.api import MatsResult, mats_many
from pymerge.ops.mats.layer import Init, MatsLayer
from pymerge.ops.mats.report import told_by_reports
from pymerge.ops.mats.weighted_average import Damage, averaged, fisher_report
from pymerge.planning.plan import PlannedTensor, Solve
from pymerge.rules.report import MatsReport


@dataclass
class Layer:
    """A planned tensor that is solved, with its inputs in memory.

    weights, base: the sources' and the base's, as stored.
    inputs, outputs: one mean per model as a full matrix, zeros for a model without. Layers that
        share their inputs hold the same list.
    """

    tensor: PlannedTensor
    weights: list[torch.Tensor]
    base: torch.Tensor | None
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor] | None


class Solved(NamedTuple):
    """A merged tensor and its report."""

    tensor: torch.Tensor
    report: MatsReport


class LayerSolver(Protocol):
    """Solves layers on some device."""

    def solve(
        self,
        layers: Sequence[MatsLayer],
        tensors: Sequence[PlannedTensor],
        options: Mapping[str, Any],
    ) -> list[MatsResult]:
        """`mats_many` for layers with equal options. tensors: the layers' tensors in the plan."""

    def notes(self) -> list[str]:
        """Notes for the summary on where layers were solved."""


class HostSolver:
    """Solves layers on the device of their tensors."""

    def solve(
        self,
        layers: Sequence[MatsLayer],
        tensors: Sequence[PlannedTensor],
        options: Mapping[str, Any],
    ) -> list[MatsResult]:
        return mats_many(layers, **options)

    def notes(self) -> list[str]:
        return []


def slices_of(tensor: PlannedTensor) -> list[PlannedTensor]:
    """The matrices of a tensor that are solved one by one, as they lie in it (M16)."""
    solve = solve_of(tensor)
    return [
        replace(tensor, name=f"{tensor.name}[{place}]", shape=solve.slice_shape, solve=part)
        for place, part in enumerate(solve.slices)
    ]


def with_zeros(tensor: PlannedTensor, means: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Statistics of every model, zeros of those that have none; of input Gram matrices all may be
    missing, where others of the same tensor's are there.
    """
    like = next((mean for mean in means if mean is not None), None)
    if like is None:
        width = tensor.shape[0 if solve_of(tensor).transposed else 1]
        like = torch.zeros(width, width, dtype=torch.float32, device="cpu")
    return [torch.zeros_like(like) if mean is None else mean for mean in means]


def solve_layers(layers: Sequence[Layer], solver: LayerSolver) -> list[Solved]:
    """The merged layers, in order. Warnings of the ops are dropped, since the reports repeat
    them.
    """
    groups: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        options = solve_of(layer.tensor).options
        groups.setdefault((options.method, options.options), []).append(place)
    solved: dict[int, Solved] = {}
    for (method, options), members in groups.items():
        chosen = dict(options) | ({"solver": "exact"} if method == "regmean" else {})
        tensors = [layers[place].tensor for place in members]
        with told_by_reports():
            results = solver.solve([_for_the_op(layers[p]) for p in members], tensors, chosen)
        for place, tensor, result in zip(members, tensors, results, strict=True):
            turned = result.weight.T if solve_of(tensor).transposed else result.weight
            solved[place] = Solved(
                turned.to(torch_dtype(tensor.dtype)).contiguous(),
                _noted(result.report, solve_of(tensor)),
            )
    return [solved[place] for place in range(len(layers))]


def _for_the_op(layer: Layer) -> MatsLayer:
    solve = solve_of(layer.tensor)

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T if solve.transposed else tensor

    weights = _with_result_dtype(layer.tensor, [turned(weight) for weight in layer.weights])
    base = None if layer.base is None else turned(layer.base)
    return MatsLayer(
        weights,
        layer.inputs,
        layer.outputs,
        base,
        _init_of(solve, base),
        dict(solve.options.init_options),
        layer.tensor.name,
    )


def merge_by_fisher(
    tensor: PlannedTensor,
    weights: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    fishers: Sequence[torch.Tensor],
    damage: Damage,
) -> torch.Tensor:
    """Merge a tensor, or a part of it, by its mean diagonal Fishers. damage: of the whole
    tensor.
    """
    solve = solve_of(tensor)
    merged = averaged(
        _with_result_dtype(tensor, weights),
        fishers,
        damage,
        init=_init_of(solve, base),
        base=base,
        init_options=dict(solve.options.init_options),
        **dict(solve.options.options),
    )
    return merged.to(torch_dtype(tensor.dtype))


def report_of_fisher(
    tensor: PlannedTensor, totals: Sequence[float], damage: Damage, negative: Collection[int]
) -> MatsReport:
    """What happened to a tensor. totals: the sum of each model's Fisher. negative: models whose
    Fisher has negative elements (N5).
    """
    solve = solve_of(tensor)
    shares = dict(solve.options.options).get("task_weights")
    return _noted(fisher_report(tensor.name, totals, damage, shares, negative), solve)


def refuse_non_finite(
    tensor: PlannedTensor, bad: Sequence[int], references: Sequence[str], let_through: str
) -> None:
    """N2: NonFiniteError for NaN or infinity in the base, and in a model unless the recipe lets it
    through and another model is finite.

    bad: places among `tensor.inputs`. references: of all models. let_through: the option that lets
        it through; "" where there is none.
    """
    count = len(tensor.sources)
    allowed = tensor.non_finite == "allow" and count not in bad and len(bad) < count
    if not bad or allowed:
        return
    names = some_names(references[tensor.inputs[place].model] for place in bad)
    way_out = "mend or leave out the model"
    if let_through:
        way_out += (
            f", or let it through ({let_through}): the tensor is then the initialisation without it"
        )
    raise NonFiniteError(f"tensor {tensor.name} holds NaN or infinite values in {names}; {way_out}")


def _with_result_dtype(
    tensor: PlannedTensor, weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The weights, the first one widened where the output has another dtype than it: ops round to
    the first weight's dtype, and the result must be rounded only once.
    """
    first, *others = weights
    if first.dtype != torch_dtype(tensor.dtype):
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        first = first.to(wide)
    return [first, *others]


def _init_of(solve: Solve, base: torch.Tensor | None) -> Init:
    if solve.options.init != "given":
        return solve.options.init
    assert base is not None
    return base


def _noted(report: MatsReport, solve: Solve) -> MatsReport:
    if not solve.note:
        return report
    return replace(report, message="; ".join(filter(None, (report.message, solve.note))))


def solve_of(tensor: PlannedTensor) -> Solve:
    """The solve of a tensor that is known to have one."""
    assert tensor.solve is not None
    return tensor.solve
