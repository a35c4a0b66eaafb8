"""`pymerge.analyze`: what a merge of state dicts would do with its models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import Unpack

from pymerge.analysis.analysis import Analysis, Naming, check_densities, is_merged
from pymerge.analysis.blocks import select, vote_balance, zero_like
from pymerge.analysis.figures import DENSITIES
from pymerge.analysis.measure import TensorMeasure, measure_alignment
from pymerge.engine.executor import TensorRules
from pymerge.engine.mappings import DictSink, Mappings, in_turn
from pymerge.engine.state_dict_statistics import Reader
from pymerge.engine.state_dicts import MergeKeywords, StateDict, parse_merge, state_dict_of
from pymerge.messages.arguments import argument, check_flags, of_model, renamed
from pymerge.messages.words import counted, type_of
from pymerge.methods import find_method
from pymerge.ops.tensors import check_list
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.rules.ties import TiesOptions, TiesRule, model_rule
from pymerge.rules.types import OpMethod, TiesMethod
from pymerge.statistics._file import load


def analyze(
    models: Sequence[StateDict | torch.nn.Module],
    base: StateDict | torch.nn.Module | None = None,
    *,
    method: TiesMethod | OpMethod = "ties",
    statistics: Sequence[Reader | str | os.PathLike[str] | None] | None = None,
    densities: Sequence[float] = DENSITIES,
    **parameters: Unpack[MergeKeywords],
) -> Analysis:
    """What a merge would do with its models: how far they are from the base and from each other,
    what is kept, where signs conflict, what each contributes (docs/analyze.md). Nothing is merged.

    models, base, method, parameters: as of `pymerge.merge`, for every method but those that merge
        by statistics.
    statistics: a file or reader per model, or None for one without, as of
        `pymerge.merge_with_statistics`; with them the alignment of task vectors with the inputs of
        the tasks is found.
    densities: at which the share of the mass is given, each in [0, 1].

    Returns an Analysis, which shows itself in notebooks; its `write` makes a report.

    Raises as `pymerge.merge` does; NaN and infinity are counted, not refused.
    """
    points = check_densities(densities)
    check_list(models, base)
    states = [state_dict_of(m, of_model("models", k)) for k, m in enumerate(models)]
    start = None if base is None else state_dict_of(base, argument("base"))
    found = find_method(method)
    if found.statistics:
        raise ValueError(
            f"{method} merges by statistics; analyse its recipe (pymerge analyze), or"
            " another method with these statistics"
        )
    readers = _readers(statistics, len(states))
    strict = parameters.pop("strict", False)
    check_flags(strict=strict)
    given: dict[str, Any] = {"non_finite": "allow", **parameters}
    asked = parse_merge(found, states, start, given)
    with renamed(**asked.names):
        options = asked.resolve()
        inputs = Mappings(asked.models, asked.base)
        plan = asked.plan(inputs, options, strict, stacklevel=2)
    sink = DictSink(plan, inputs)
    merged = [tensor for tensor in in_turn(plan.tensors, sink.owners) if is_merged(tensor)]
    rules = TensorRules(plan, _whole_rule(inputs, merged))
    naming = Naming(plan, inputs.references)
    result = Analysis(found.name, naming.models, naming.base, points)
    if asked.base is None and start is not None:  # the base is the first of the models
        readers = [None, *readers]
    place = {tensor.name: index for index, tensor in enumerate(plan.tensors)}
    for tensor in merged:
        rule = rules.of(place[tensor.name])
        by_op = None if isinstance(tensor.options, TiesOptions) else tensor.options
        measure = TensorMeasure(
            len(tensor.sources), tensor.elements, rule, points, by_op, tensor.key_name
        )
        tensors, of_base = _tensors(inputs, tensor)
        measure.add(tensors, of_base)
        figures = measure.finish()
        if len(tensor.shape) == 2 and any(reader is not None for reader in readers):
            layer = tensor.name.removesuffix(".weight")

            def gram(j: int, layer: str = layer, tensor: PlannedTensor = tensor) -> Any:
                reader = readers[tensor.sources[j].model]
                return None if reader is None else reader.input_gram(layer)

            known = next((gram(j) for j in range(len(tensors)) if gram(j) is not None), None)
            if known is not None:
                turned = len(known) != tensor.shape[1] or _is_transposed(readers, layer)
                measure_alignment(figures, tensors, of_base, gram, turned)
        result.tensors.append(naming.described(tensor, figures))
    return result


def _tensors(
    inputs: Mappings, tensor: PlannedTensor
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    models = [inputs.tensor(source, tensor.shape).detach() for source in tensor.sources]
    if tensor.base is None:
        return models, None
    return models, inputs.tensor(tensor.base, tensor.shape).detach()


def _whole_rule(inputs: Mappings, merged: Sequence[PlannedTensor]) -> TiesRule | None:
    """The rule over all tensors for scope "model" (T7)."""
    own = [t for t in merged if t.options is not None and t.options.over_all_tensors]
    options = own[0].options if own else None
    if not isinstance(options, TiesOptions):
        return None
    segments = [_tensors(inputs, tensor) for tensor in own]

    def ranked(ranks: Sequence[int], with_zero: bool) -> tuple[float, ...]:
        return select([*segments, *([zero_like(segments[0])] if with_zero else [])], ranks)

    def balance_of(whole: TiesRule) -> int:
        rules = TensorRules(Plan((), tuple(own), 0, (), ()), whole)
        balance = 0
        for index, (models, base) in enumerate(segments):
            rule = rules.of(index)
            assert rule is not None
            balance += vote_balance(rule, models, base)
        return balance

    return model_rule(options, sum(tensor.elements for tensor in own), ranked, balance_of)


def _readers(
    given: Sequence[Reader | str | os.PathLike[str] | None] | None, models: int
) -> list[Reader | None]:
    if given is None:
        return [None] * models
    if isinstance(given, (str, os.PathLike)) or not isinstance(given, Sequence):
        raise TypeError(
            f"{argument('statistics')} is {type_of(given)}; pass a list, one entry per model"
        )
    if len(given) != models:
        raise ValueError(
            f"statistics has {counted(len(given), 'entry', 'entries')} for"
            f" {counted(models, 'model')}; pass one per model, in their order"
        )
    readers: list[Reader | None] = []
    for k, entry in enumerate(given):
        if isinstance(entry, (str, os.PathLike)):
            readers.append(load(entry))
        elif entry is None or hasattr(entry, "input_gram"):
            readers.append(entry)
        else:
            raise TypeError(
                f"statistics[{k}] is {type_of(entry)}; pass a file that `pymerge stats` wrote, or"
                " what pymerge.statistics gives"
            )
    return readers


def _is_transposed(readers: Sequence[Reader | None], layer: str) -> bool:
    """Whether a file says that the layer's weight is stored (d_in, d_out)."""
    for reader in readers:
        header = getattr(reader, "header", None)
        if header is not None and layer in header.get("layers", {}):
            return bool(header["layers"][layer].get("transposed", False))
    return False
