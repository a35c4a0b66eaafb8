"""`pymerge.merge`: a merge method by name over state dicts."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat, SupportsIndex, TypedDict, cast

import torch
from typing_extensions import Unpack

from pymerge.checkpoint.nested import state_dict_in
from pymerge.checkpoint.types import ModelHeader, Source
from pymerge.engine.mappings import DictSink, Mappings, OpExecutor, in_turn
from pymerge.engine.state_dict_statistics import Reader, merge_with_statistics
from pymerge.engine.weight_gradients import (
    check_differentiable,
    tracked_weights,
    with_gradient,
)
from pymerge.messages.arguments import argument, check_flags, of_model, renamed
from pymerge.messages.words import shown, type_of
from pymerge.methods import Method, find_method
from pymerge.methods.method import FLAGS, Given
from pymerge.methods.values import values_of
from pymerge.ops import registered
from pymerge.ops.mats.report import warnings_of
from pymerge.ops.tensors import check_list
from pymerge.planning.plan import Plan
from pymerge.recipe.model import MergeRecipe, TensorTask
from pymerge.rules.options import OpOptions
from pymerge.rules.report import MatsReport
from pymerge.rules.ties import _plain, resolve_options
from pymerge.rules.types import (
    Backend,
    Elect,
    Flavor,
    InitName,
    MaskedFlavor,
    MatsFlavor,
    Merge,
    NonFinite,
    OpMethod,
    PerModel,
    Precision,
    Rescale,
    Scope,
    Solver,
    StatisticsMethod,
    TaskWeights,
    TiesMethod,
    ZeroSign,
)

StateDict = Mapping[str, torch.Tensor]

# Options of `ties` that every method accepts.
_COMMON = (
    "scaling",
    "seed",
    "scope",
    "flavor",
    "merge",
    "zero_sign",
    "non_finite",
    "backend",
    "out",
)


class MergeKeywords(TypedDict, total=False):
    """The parameters of all methods together: a method refuses those that it does not have."""

    # For methods that stand for options of `ties`; None counts as not given.
    weight: PerModel | None
    weights: PerModel | None
    density: PerModel | None
    gamma: PerModel | None
    epsilon: PerModel | None
    scale: PerModel | None
    normalize: bool | None
    rescale: bool | Rescale | None
    scaling: SupportsFloat | None
    elect: Elect | None
    merge: Merge | None
    zero_sign: ZeroSign | None
    scope: Scope | None
    seed: SupportsIndex | None
    non_finite: NonFinite | None
    out: StateDict | None
    # For methods by Gram matrix, and for methods under masks, which take epsilon too.
    t: SupportsFloat | None
    nuslerp_flatten: bool | None
    nuslerp_row_wise: bool | None
    normalize_weights: bool | None
    eps: SupportsFloat | None
    max_iter: SupportsIndex | None
    tol: SupportsFloat | None
    filter_wise: bool | None
    r: SupportsFloat | None
    alpha: SupportsFloat | None
    select_topk: SupportsFloat | None
    # For all kinds of methods.
    strict: bool
    flavor: Flavor | MaskedFlavor | MatsFlavor | None
    backend: Backend
    # For methods that merge by statistics.
    init: InitName | StateDict
    init_options: Mapping[str, Any] | None
    output_grams: bool | None
    allow_unsolved: bool
    device: torch.device | str | None
    window: int
    solver: Solver
    iterations: SupportsIndex | None
    preconditioner: bool | None
    damping: SupportsFloat
    off_diagonal: SupportsFloat
    task_weights: TaskWeights | Sequence[SupportsFloat]
    step_limit: SupportsFloat | None
    objective_tolerance: SupportsFloat | None
    residual_tolerance: SupportsFloat | None
    precision: Precision | None
    minimum: SupportsFloat


def merge(
    models: Sequence[StateDict | torch.nn.Module],
    base: StateDict | torch.nn.Module | None = None,
    *,
    method: TiesMethod | OpMethod | StatisticsMethod = "ties",
    statistics: Sequence[Reader | str | os.PathLike[str]] | None = None,
    reports: list[MatsReport] | None = None,
    **parameters: Unpack[MergeKeywords],
) -> dict[str, torch.Tensor]:
    """Merge state dicts by a method's name; the method stands for options of `pymerge.ties`
    (docs/configuration.md).

    models: K mappings of tensors of the same names and shapes, floating-point tensors in any mix of
        dtypes. Names that differ by a prefix or a known conversion are matched; what not all models
        have is copied from the base or left out, with a warning (docs/checkpoints.md). What a
        training loop saved will do too: the state dict in it is found by what it holds. A module
        stands for its state_dict().
    base: what task vectors are taken from. Required, except by `linear`, `karcher` and
        `passthrough`, which take none (a base model that is to be averaged is one of the models),
        and by `nuslerp` and `multislerp`, which merge the models themselves without one; for
        `slerp` it is the first of the two models.
    method: linear, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties,
        della, della_linear or passthrough, which are options of `pymerge.ties`; slerp, nuslerp,
        multislerp, karcher, model_stock, nearswap, ram, ramplus_tl, sce, arcee_fusion, wudi, tsv or
        iso_c, which are functions of these names too; mats, regmean or fisher, which merge by
        statistics; or one that an installed package registers (docs/methods.md).
    statistics: for those three, one file or reader per model (docs/statistics.md). Their parameters
        are those of `pymerge.merge_with_statistics`; base is needed by some of their
        initialisations.
    reports: for those three and for wudi, a list that gets what happened to each tensor.
    parameters: the method's, named as in a recipe or as in `pymerge.ties`: weight or weights,
        density, gamma and epsilon (one number, or one per model), scale (passthrough), normalize
        and rescale (true or false; rescale also takes the norm's name or "density"), scaling (a
        recipe's lambda). Further options of `pymerge.ties`: scope, flavor, elect, merge, zero_sign,
        seed, non_finite, backend, out. strict makes an error of tensors that not all models have.
        What is left out has `pymerge.ties`' default (density 0.2, weights 1); normalize and rescale
        have the method's. A flavor other than "mergekit" brings its own merge rule instead of
        normalize.

    Weights that require a gradient get one where they choose no element (linear, task_arithmetic,
    dare_linear, breadcrumbs): scaling * <gradient, trimmed task vector k>, which the backward pass
    computes anew from the models. Elsewhere, and for other parameters, that is a ValueError.

    Returns a dict in the base's order (else the first model's) and dtypes: new tensors, tied where
    they are one memory in every state dict; integer and bool tensors are the base's, with a warning
    where they differ. DTensors give DTensors of their placements, by methods that are options of
    `pymerge.ties` (docs/distributed.md). Under torch.compile it is one op of the graph
    (docs/compile.md).

    Raises MismatchError (a ValueError) for quantised models, adapters, and names or shapes that
    differ (every difference, of many names a few), ValueError for values that are not allowed and
    for NaN or infinity; TypeError for parameters that the method does not have, and for tensors
    whose values are not in their memory (meta, DTensors of other methods, ...; it says what to
    pass); ConfigError (a ValueError) for an unknown method; RuntimeError for a backend that is not
    available.
    """
    if registered.tracing() and statistics is None and reports is None:
        own = {name: value for name, value in parameters.items() if name != "out"}
        if registered.are_plain(own):
            own["method"] = method
            out = parameters.get("out")
            traced: dict[str, torch.Tensor] = registered.merge("merge", models, base, out, own)
            return traced
    check_list(models, base)
    check_reports(reports)
    labels = [of_model("models", k) for k in range(len(models))]
    states: Sequence[StateDict] = [
        state_dict_of(model, label) for model, label in zip(models, labels, strict=True)
    ]
    start = None if base is None else state_dict_of(base, argument("base"))
    found = find_method(method)
    if found.statistics:
        if statistics is None:
            raise ValueError(
                f"statistics is missing; {method} needs a file per model (pymerge stats), in their"
                " order"
            )
        given: Any = parameters
        solved = cast(StatisticsMethod, method)
        merged, made = merge_with_statistics(states, start, statistics, solved, **given)
        if reports is not None:
            reports += made
        return merged
    if statistics is not None:
        raise TypeError(f"{method} has no parameter 'statistics'; mats, regmean and fisher do")
    strict = parameters.pop("strict", False)
    check_flags(strict=strict)
    tracked = None
    for name in ("weights", "weight", "scale") if found.op == "ties" else ():
        tracked = tracked_weights(parameters.get(name), len(states))
        if tracked is not None:
            parameters = {**parameters, name: tracked.detach()}  # type: ignore[misc]
            break
    asked = parse_merge(found, states, start, parameters)
    with renamed(**asked.names):
        resolved = asked.resolve()
        if reports is not None and not (resolved is not None and resolved.reports):
            raise TypeError(
                f"{method} has no parameter 'reports'; mats, regmean, fisher and wudi do"
            )
        if tracked is not None:
            check_differentiable(resolved, method)
        inputs = Mappings(asked.models, asked.base, shards=found.op == "ties" and tracked is None)
        plan = asked.plan(inputs, resolved, strict, stacklevel=2)
        sink = DictSink(plan, inputs, asked.others["out"])
        executor = OpExecutor(inputs, sink, asked.others["backend"])
        computed = [*in_turn(plan.tensors, sink.owners)]
        executor.make(computed, stacklevel=3)
        executor.warn(stacklevel=2)
        for sentence in warnings_of(executor.reports):
            warnings.warn(sentence, stacklevel=2)
        if reports is not None:
            reports += executor.reports
    if tracked is not None:
        return with_gradient(tracked, sink.ordered(), computed, inputs, resolved)
    return sink.ordered()


@dataclass(frozen=True)
class AskedMerge:
    """What a call of `merge` asks for, by a method that does not need statistics.

    models, base: as the op takes them. resolve: gives the op's options, None to copy, and fills in
        `others`: non_finite, backend, out.
    names: argument -> what messages call it.
    """

    method: Method
    models: Sequence[StateDict]
    base: StateDict | None
    resolve: Callable[[], OpOptions | None]
    others: dict[str, Any]
    names: Mapping[str, Any]

    def plan(
        self, inputs: Mappings, options: OpOptions | None, strict: bool, stacklevel: int
    ) -> Plan:
        """The plan of this merge; errors and warnings are those of `Mappings.plan`."""
        recipe = _recipe(inputs, self.method, options, self.others["non_finite"])
        return inputs.plan(replace(recipe, strict=strict), stacklevel + 1)


def parse_merge(
    method: Method,
    models: Sequence[StateDict],
    base: StateDict | None,
    parameters: Mapping[str, Any],
) -> AskedMerge:
    """A call's parameters by the names of the op's options. TypeError for those that the method
    does not have.
    """
    swapped = method.base_first and base is not None
    states, start = check_inputs(method, models, base)
    options, others, given = (_by_ties if method.op == "ties" else by_op)(
        method, parameters, len(states), start is not None
    )
    # The base is the first of the models from here on.
    names = {**given, "models": ["base", "models[0]"]} if swapped else given
    return AskedMerge(method, states, start, options, others, names)


def check_reports(reports: object) -> None:
    """TypeError for what reports cannot be added to."""
    if reports is not None and not isinstance(reports, list):
        raise TypeError(f"reports is {type_of(reports)}; pass a list, which is added to")


def check_inputs(method: Method, models: Sequence[Any], base: Any) -> tuple[Sequence[Any], Any]:
    """(models, base) as the op takes them. ValueError for too few or too many models, and for a
    base that is missing or that the method does not take.
    """
    with_base = method.base_first and base is not None
    if with_base:
        models, base = [base, *models], None
    wrong = method.wrong_count(len(models))
    if wrong:
        given = f"models has {len(models) - with_base} entries{' beside base' if with_base else ''}"
        raise ValueError(f"{given}; {method.name} {wrong.partition(',')[0]}")
    if method.needs_base and method.takes_base and base is None:
        raise ValueError(
            f"base is missing; {method.name} merges task vectors, the differences from a base model"
        )
    if not method.takes_base and base is not None:
        raise ValueError(
            f"{method.name} takes no base; if it is to be an input, put it among the models"
        )
    return models, base


def _recipe(
    inputs: Mappings, method: Method, options: OpOptions | None, non_finite: str
) -> MergeRecipe:
    """The recipe for these inputs. options: None copies the first model."""

    def tasks(headers: Sequence[ModelHeader]) -> list[TensorTask]:
        base = inputs.base_index
        return [
            TensorTask(
                name,
                tuple(Source(model, name) for model in range(len(inputs.models))),
                None if base is None else Source(base, name),
                options,
                method.name,
            )
            for name in headers[base or 0].tensors
        ]

    return MergeRecipe(
        tuple(inputs.references),
        inputs.base_index,
        method.name,
        tasks,
        non_finite=non_finite,
    )


def state_dict_of(model: StateDict | torch.nn.Module, label: str) -> StateDict:
    """The model's state dict, extracted where a module or a training loop's checkpoint was
    passed.
    """
    if isinstance(model, torch.nn.Module):
        return model.state_dict()
    # Tensors first: asking whether something is a mapping takes longer.
    if not isinstance(model, dict) or not any(
        type(x) is not torch.Tensor and isinstance(x, Mapping) for x in model.values()
    ):
        return model
    try:
        found = state_dict_in(model)
    except ValueError as error:
        raise ValueError(f"{label} {error}") from None
    if found.note is not None:
        warnings.warn(f"{label}: {found.note}", stacklevel=3)
    return found.content


# Gives the op's options, or None to copy; non_finite, backend and out; option -> the parameter
# that set it.
_Parsed = tuple[Callable[[], "OpOptions | None"], dict[str, Any], dict[str, str]]


def _by_ties(method: Method, parameters: Mapping[str, Any], count: int, base: bool) -> _Parsed:
    options, given = _options(method, parameters)
    others = {
        "backend": options.pop("backend", "auto"),
        "out": options.pop("out", None),
        "non_finite": options.get("non_finite", "error"),
    }

    def resolved() -> OpOptions | None:
        if method.divides_by_weights and _is_word(options.get("merge"), "weighted_mean"):
            _check_sum(options.get("weights"), method.name)
        found = resolve_options(count, **options)
        others["non_finite"] = found.non_finite
        return None if method.copies and "weights" not in options else found

    return resolved, others, given


def by_op(method: Method, parameters: Mapping[str, Any], count: int, base: bool) -> _Parsed:
    names = ("non_finite", "backend", "out", "seed")
    others: dict[str, Any] = {"non_finite": "error", "backend": "auto", "out": None, "seed": 0}
    others |= {name: parameters[name] for name in names if parameters.get(name) is not None}
    own = {name: value for name, value in parameters.items() if name not in names}
    shared, per_model = values_of(method, own, count, names)

    def resolved() -> OpOptions:
        checked = resolve_options(1, non_finite=others["non_finite"], seed=others["seed"])
        return method.resolve(
            Given(shared, per_model, base, checked.seed, checked.non_finite, recipe=False)
        )

    return resolved, others, {}


def _is_word(value: object, word: str) -> bool:
    """Whether a value that is yet to be checked is this word."""
    return isinstance(value, str) and value == word


def _options(
    method: Method, parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(keyword arguments of `ties`, option -> parameter that set it)."""
    options = dict(method.fixed)
    allowed = {name: name for name in _COMMON}
    if method.fixed["elect"] != "none":
        allowed["elect"] = "elect"
    for parameter in method.parameters:
        if parameter.option:
            allowed[parameter.name] = parameter.option
            if parameter.kind != "flag":
                allowed[parameter.option] = parameter.option
            elif parameter.option != "merge" or _is_word(
                parameters.get("flavor", "mergekit"), "mergekit"
            ):
                options[parameter.option] = FLAGS[parameter.name][parameter.default]
    given: dict[str, str] = {}
    for name, value in parameters.items():
        option = allowed.get(name)
        if option is None:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(_of(method))}"
            raise TypeError(f"{method.name} has no parameter {name!r}{hint}")
        if option in given:
            raise TypeError(f"{name} and {given[option]} say the same; pass one of the two")
        given[option] = name
        if value is None and name != "out":
            continue
        if name in FLAGS and isinstance(value, bool):
            value = FLAGS[name][value]
        elif name == "normalize":
            raise TypeError(f"normalize={shown(value)} is {type_of(value)}; pass True or False")
        options[option] = value
    return options, given


def _of(method: Method) -> list[str]:
    """The parameters that affect a method, its own first. Other options of `ties` are accepted and
    change nothing.
    """
    trim, elects = method.fixed["trim"], method.fixed["elect"] != "none"
    names = [each.name for each in method.parameters if each.option and each.name != "lambda"]
    also = {
        "scaling": method.takes_base,
        "seed": trim in ("random", "magprune"),
        "elect": elects,
        "zero_sign": elects,
        "scope": elects or trim in ("magnitude", "outliers"),
        "merge": method.takes_base,
        "flavor": method.takes_base,
    }
    return [
        *names,
        *(name for name, counts in also.items() if counts),
        "non_finite",
        "backend",
        "out",
    ]


def _check_sum(weights: Any, method: str) -> None:
    weights = _plain("weights", weights)
    if weights is None or not isinstance(weights, (list, tuple)):
        weights = [1.0 if weights is None else weights]
    if all(isinstance(weight, (int, float)) for weight in weights) and abs(sum(weights)) < 1e-8:
        raise ValueError(
            f"{argument('weights', list(weights))} sum to zero, so {method} has no average; change"
            " a weight, or pass normalize=False"
        )
