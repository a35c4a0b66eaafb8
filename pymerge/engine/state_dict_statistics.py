"""MaTS, RegMean and Fisher merging of whole models: layer by layer, with the next layers'
statistics read ahead.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, get_args

import torch
from typing_extensions import Unpack

from pymerge.checkpoint.weight_tags import tag_like
from pymerge.messages.words import counted, some_names, type_of
from pymerge.ops.differences import NotMerged, warn_of_not_merged
from pymerge.ops.mats.api import MatsResult, mats_many
from pymerge.ops.mats.layer import Init, MatsLayer, check_init, initial, rounded, to_device
from pymerge.ops.mats.report import warnings_of
from pymerge.ops.mats.weighted_average import averaged, damage_of, fisher_report, negative_of
from pymerge.ops.tensors import (
    check_floats,
    check_list,
    check_state_dicts,
    check_tensors,
    of_tensor,
    tied_names,
)
from pymerge.rules.mats import (
    INITS,
    OPTIONS,
    MatsReport,
    off_diagonal_factor,
    resolve,
    vector_length,
)
from pymerge.rules.ties import _choice
from pymerge.rules.types import InitName, StatisticsKeywords, StatisticsMethod
from pymerge.statistics._fit import fitted, sampler

METHODS: tuple[str, ...] = get_args(StatisticsMethod)

StateDict = Mapping[str, torch.Tensor]


class Reader(Protocol):
    """The statistics of one model, by the name of a layer (its weight's name without ".weight") or
    of a parameter.

    None where there are none. `pymerge.statistics.Statistics` is one.
    """

    def input_gram(self, layer: str) -> torch.Tensor | None:
        """(d_in, d_in)."""

    def output_grad_gram(self, layer: str) -> torch.Tensor | None:
        """(d_out, d_out)."""

    def block_fisher(self, parameter: str) -> torch.Tensor | None:
        """(d, d), of a vector parameter."""

    def diagonal_fisher(self, parameter: str) -> torch.Tensor | None:
        """The parameter's shape."""


def merge_with_statistics(
    models: Sequence[StateDict],
    base: StateDict | None,
    statistics: Sequence[Reader | str | os.PathLike[str]],
    method: StatisticsMethod = "mats",
    *,
    init: InitName | StateDict = "average",
    init_options: Mapping[str, Any] | None = None,
    output_grams: bool | None = None,
    allow_unsolved: bool = False,
    device: torch.device | str | None = None,
    window: int = 512 << 20,
    **options: Unpack[StatisticsKeywords],
) -> tuple[dict[str, torch.Tensor], list[MatsReport]]:
    """Merge K state dicts with the statistics of each: `pymerge.mats`, `regmean` or
    `weighted_average` for every tensor.

    models, base: mappings of tensors with the same names and shapes; they may read each tensor when
        it is asked for. base is needed by the initialisations that use it, and gives the integer
        tensors.
    statistics: one reader or statistics file per model, in the order of the models.
    method: "mats", "regmean" or "fisher" (diagonal).
    init: "average", "pretrained", "task_arithmetic", "ties", "zero", or a whole state dict (any
        merged model): where solvers start, and what parameters without statistics become.
        init_options: see `pymerge.mats`.
    output_grams: mats alone; False leaves the output Grams out, True insists on them, None uses
        them where they are.
    allow_unsolved: go on where less than half of the linear layers' elements have statistics.
    device: where to solve; by default where the weights are. The results come back to the weights'
        device.
    window: bytes of statistics that are held at once, beside as many read ahead; a layer larger
        than that is held alone.
    options: of `pymerge.mats` (iterations, damping, flavor, task_weights, ...), of
        `pymerge.regmean` (off_diagonal, task_weights), or of `pymerge.weighted_average` (minimum,
        task_weights).

    Returns (state dict in the base's order, one report per floating-point tensor). Tensors keep the
    first model's dtype; those that are one memory in every state dict stay one. Warns of layers
    that fell back and of large steps.
    Raises ValueError and TypeError for models, statistics and options that do not fit each other,
    TypeError for tensors whose values are not in their memory (DTensor, meta, ...; it says what to
    pass), RuntimeError for a backend that is not available.
    """
    merged, reports = {}, []
    for name, tensor, report in stream_with_statistics(
        models,
        base,
        statistics,
        method,
        init=init,
        init_options=init_options,
        output_grams=output_grams,
        allow_unsolved=allow_unsolved,
        device=device,
        window=window,
        **options,
    ):
        merged[name] = tensor
        if report is not None:
            reports.append(report)
    like = models[0] if base is None else base
    owners = dict(tied_names(like, [*models] if base is None else [base, *models]))
    for sentence in warnings_of(reports):
        warnings.warn(sentence, stacklevel=2)
    return {name: merged[owner] for name, owner in owners.items()}, reports


def stream_with_statistics(
    models: Sequence[StateDict],
    base: StateDict | None,
    statistics: Sequence[Reader | str | os.PathLike[str]],
    method: StatisticsMethod = "mats",
    *,
    init: InitName | StateDict = "average",
    init_options: Mapping[str, Any] | None = None,
    output_grams: bool | None = None,
    allow_unsolved: bool = False,
    device: torch.device | str | None = None,
    window: int = 512 << 20,
    **options: Unpack[StatisticsKeywords],
) -> Iterator[tuple[str, torch.Tensor, MatsReport | None]]:
    """As `merge_with_statistics`, a tensor at a time: (name, merged tensor, report; None for an
    integer tensor).

    Tensors that are one memory in every state dict come once. The order is the base's.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    check_list(models, base)
    like = check_state_dicts(models, base)
    readers = fitted(_readers(statistics, len(models)), models, method, allow_unsolved)
    job = _Job(models, base, readers, method, init, dict(init_options or {}), output_grams, device)
    given: dict[str, Any] = dict(options)
    job.check(given)
    names = [
        name
        for name, owner in tied_names(like, [*models] if base is None else [base, *models])
        if name == owner
    ]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pymerge-statistics") as pool:
        groups = job.groups(names, like, window)
        group = next(groups, None)
        coming: Future[list[_Item]] | None = None if group is None else pool.submit(job.read, group)
        while coming is not None:
            items = coming.result()
            group = next(groups, None)
            coming = None if group is None else pool.submit(job.read, group)
            yield from job.solve(items, given)
    warn_of_not_merged(job.not_merged, base is not None, stacklevel=2)


@dataclass
class _Item:
    """A tensor with all that its merge needs. kind: "plain" (not floating point), "start", "system"
    or "fisher".
    """

    name: str
    kind: str
    weights: list[torch.Tensor] = field(default_factory=list)
    base: torch.Tensor | None = None
    init: Init = "average"
    layer: MatsLayer | None = None
    fishers: list[torch.Tensor] = field(default_factory=list)
    transposed: bool = False
    note: str = ""


@dataclass
class _Job:
    models: Sequence[StateDict]
    base: StateDict | None
    readers: Sequence[Reader]
    method: str
    init: InitName | StateDict
    init_options: dict[str, Any]
    output_grams: bool | None
    device: torch.device | str | None
    not_merged: list[NotMerged] = field(default_factory=list)  # what differs of plain tensors

    def check(self, options: dict[str, Any]) -> None:
        """Options before any work."""
        count = len(self.models)
        if self.output_grams is not None and self.method != "mats":
            raise ValueError(
                f"output_grams={self.output_grams!r} is given; {self.method} uses none"
            )
        if isinstance(self.init, Mapping):
            like = self.models[0] if self.base is None else self.base
            missing = [name for name in like if name not in self.init]
            if missing:
                raise ValueError(f"init lacks {some_names(missing)}; pass a whole state dict")
        elif not isinstance(self.init, str):
            raise TypeError(
                f"init is {type_of(self.init)}; pass {', '.join(map(repr, INITS))} or a state dict"
            )
        elif (
            _choice("init", self.init, INITS) in ("pretrained", "task_arithmetic", "ties")
            and self.base is None
        ):
            raise ValueError(f"init={self.init!r} needs the pretrained model; pass base=")
        allowed = {
            "mats": (*OPTIONS, "backend"),
            "regmean": ("off_diagonal", "task_weights"),
            "fisher": ("minimum", "task_weights"),
        }
        for name in options:
            if name not in allowed[self.method]:
                raise TypeError(
                    f"{self.method} has no option {name!r}; it has"
                    f" {', '.join(allowed[self.method])}"
                )
        if self.method == "mats":
            resolve(count, **{k: v for k, v in options.items() if k != "backend"})
            return
        off_diagonal_factor(options.get("off_diagonal", 1.0))

    def groups(self, names: Sequence[str], like: StateDict, window: int) -> Iterator[list[str]]:
        """Names in order, as many at a time as their statistics fit the window."""
        held: list[str] = []
        size = 0
        for name in names:
            shape = like[name].shape
            need = (
                len(self.models) * 4 * sum(d * d for d in shape[:2]) if like[name].ndim <= 2 else 0
            )
            if self.method == "fisher":
                need = len(self.models) * 4 * like[name].numel()
            if held and size + need > window:
                yield held
                held, size = [], 0
            held.append(name)
            size += need
        if held:
            yield held

    def read(self, names: Sequence[str]) -> list[_Item]:
        """Weights and statistics of some tensors; runs in a thread of its own."""
        shared: dict[tuple[str, ...], tuple[list[torch.Tensor], str]] = {}
        return [self._read(name, shared) for name in names]

    def _read(
        self, name: str, shared: dict[tuple[str, ...], tuple[list[torch.Tensor], str]]
    ) -> _Item:
        weights = [model[name] for model in self.models]
        base = None if self.base is None else self.base[name]
        if not any(w.is_floating_point() for w in weights):
            return _Item(name, "plain", weights, base)
        init: Init = self.init if isinstance(self.init, str) else self.init[name]
        with of_tensor(name):
            check_tensors(weights, base, op=self.method, readable=True)
            if not isinstance(init, str):
                check_floats(f"init[{name!r}]", init, self.method)
                check_init(MatsLayer(weights, (), init=init))
        item = _Item(name, "start", weights, base, init)
        if self.method == "fisher":
            item.fishers, item.note = self._gather("diagonal_fisher", name, weights[0].shape)
            item.kind = "fisher" if item.fishers else "start"
            if item.fishers:
                self._check_own(name, weights)
            return item
        outputs: list[torch.Tensor] = []
        grams: list[torch.Tensor] = []
        length = vector_length(weights[0].shape)
        if length is not None:
            grams, item.note = self._gather("block_fisher", name, (length, length))
            item.transposed = bool(grams) and weights[0].shape[1:] == (1,)
        if not grams and weights[0].ndim == 2:
            layer = name.removesuffix(".weight")
            item.transposed = any(
                _transposed(reader, layer, weights[0].shape) for reader in self.readers
            )
            d_out, d_in = reversed(weights[0].shape) if item.transposed else weights[0].shape
            # Layers that read one input get the very same list, so that they share its memory.
            key = tuple(_input_of(reader, layer) for reader in self.readers)
            if key not in shared:
                shared[key] = self._gather("input_gram", layer, (d_in, d_in))
            grams, item.note = shared[key]
            if self.method == "mats" and self.output_grams is not False and grams:
                outputs, note = self._gather("output_grad_gram", layer, (d_out, d_out))
                item.note = item.note or note
                if not outputs and self.output_grams:
                    grams, item.note = [], "no output Gram matrices"
        if grams:
            self._check_own(name, weights)
            item.kind = "system"
            item.layer = MatsLayer(
                weights, grams, outputs or None, base, init, self.init_options, name
            )
        return item

    def _check_own(self, name: str, weights: Sequence[torch.Tensor]) -> None:
        """S14: whether every statistics file is of the model at its place, as far as it says so."""
        for k, (reader, weight) in enumerate(zip(self.readers, weights, strict=True)):
            header = getattr(reader, "header", None) or {}
            layer = header.get("layers", {}).get(name.removesuffix(".weight"), {})
            tag = header.get("weights", {}).get(layer.get("weight", name))
            if tag is None:
                continue
            own = tag_like(tag, name, weight.shape, sampler({name: weight}))
            if own not in (None, tag):
                raise ValueError(
                    f"statistics[{k}] was not collected on models[{k}]: the values of {name!r}"
                    " differ; pass the statistics in the order of the models, or collect them"
                    " again (pymerge stats)"
                )

    def _gather(self, kind: str, name: str, shape: Sequence[int]) -> tuple[list[torch.Tensor], str]:
        """One matrix per model, zeros for a model that has none, and a note on those; empty where
        no model has one.
        """
        found = [getattr(reader, kind)(name) for reader in self.readers]
        if all(f is None for f in found):
            return [], ""
        without = [f"models[{k}]" for k, f in enumerate(found) if f is None]
        for k, f in enumerate(found):
            if f is not None:
                check_floats(f"{kind} of {name!r} in statistics[{k}]", f, self.method)
            if f is not None and tuple(f.shape) != tuple(shape):
                raise ValueError(
                    f"{kind} of {name!r} in statistics[{k}] has shape {tuple(f.shape)}, the weight"
                    f" asks for {tuple(shape)}; these are statistics of another model"
                )
        grams = [
            torch.zeros(*shape, dtype=torch.float32, device="cpu") if f is None else f
            for f in found
        ]
        return grams, f"{', '.join(without)}: no {kind}" if without else ""

    def solve(
        self, items: Sequence[_Item], options: dict[str, Any]
    ) -> Iterator[tuple[str, torch.Tensor, MatsReport | None]]:
        """Merge what `read` brought."""
        systems = [item for item in items if item.kind == "system"]
        moved: dict[int, Any] = {}
        layers = [self._on_device(item, moved) for item in systems]
        if self.method == "regmean":
            options = {**options, "solver": "exact"}
        with warnings.catch_warnings():  # said once, for all layers, by the caller
            warnings.filterwarnings("ignore", message=".*keeps its initialisation")
            solved: dict[str, MatsResult] = {
                item.name: result
                for item, result in zip(
                    systems, mats_many(layers, **options) if layers else (), strict=True
                )
            }
        for item in items:
            if item.kind == "plain":
                yield item.name, self._plain(item), None
            elif item.kind == "system":
                yield self._back(item, solved[item.name])
            elif item.kind == "fisher":
                yield self._fisher(item, options)
            else:
                tensor = self._start(item)
                yield (
                    item.name,
                    tensor,
                    MatsReport(item.name, "no_statistics", "none", message=item.note),
                )

    def _on_device(self, item: _Item, moved: dict[int, Any]) -> MatsLayer:
        layer = item.layer
        assert layer is not None
        device = layer.weights[0].device if self.device is None else torch.device(self.device)
        there = to_device(layer, device, moved)
        if not item.transposed:
            return there
        return replace(
            there,
            weights=[w.T for w in there.weights],
            base=None if there.base is None else there.base.T,
            init=there.init.T if isinstance(there.init, torch.Tensor) else there.init,
        )

    def _back(self, item: _Item, result: MatsResult) -> tuple[str, torch.Tensor, MatsReport]:
        tensor = result.weight.T if item.transposed else result.weight
        report = _noted(result.report, item.note)
        return item.name, tensor.to(item.weights[0].device).contiguous(), report

    def _start(self, item: _Item) -> torch.Tensor:
        """M4: parameters without statistics."""
        first = item.weights[0]
        work = torch.float64 if first.dtype == torch.float64 else torch.float32
        bad = [k for k, w in enumerate(item.weights) if not bool(w.isfinite().all())]
        if len(bad) == len(item.weights):
            raise ValueError(
                f"tensor {item.name!r} holds NaN or infinity in every model; mend the models (N2)"
            )
        # A norm or a bias of zeros would break the model.
        init: Init = "average" if isinstance(item.init, str) and item.init == "zero" else item.init
        layer = MatsLayer(item.weights, (), None, item.base, init, self.init_options)
        return rounded(initial(layer, work, bad), first.dtype)

    def _fisher(self, item: _Item, options: dict[str, Any]) -> tuple[str, torch.Tensor, MatsReport]:
        fishers = [f.to(item.weights[0].device) for f in item.fishers]
        damage = damage_of(item.weights, fishers)
        tensor = averaged(
            item.weights,
            fishers,
            damage,
            init=item.init,
            base=item.base,
            init_options=self.init_options,
            **options,
        )
        totals = [float(f.sum(dtype=torch.float64)) for f in fishers]
        shares = options.get("task_weights")
        report = fisher_report(item.name, totals, damage, shares, negative_of(fishers))
        return item.name, tensor, _noted(report, item.note)

    def _plain(self, item: _Item) -> torch.Tensor:
        """Integer and bool tensors are the base's, else the first model's."""
        like = item.weights[0] if item.base is None else item.base
        different = [k for k, w in enumerate(item.weights) if not torch.equal(w, like)]
        if different:
            self.not_merged.append((item.name, like.dtype, different))
        return like.clone()


def _noted(report: MatsReport, note: str) -> MatsReport:
    return replace(report, message="; ".join(filter(None, (report.message, note))))


def _readers(given: Sequence[Reader | str | os.PathLike[str]], count: int) -> list[Reader]:
    if isinstance(given, (str, os.PathLike)):
        raise TypeError(f"statistics={str(given)!r} is one file; pass a list, one per model")
    if len(given) != count:
        raise ValueError(
            f"statistics has {counted(len(given), 'entry', 'entries')} for"
            f" {counted(count, 'model')}; pass one per model, in their order"
        )
    readers: list[Reader] = []
    for entry in given:
        if isinstance(entry, (str, os.PathLike)):
            from pymerge.statistics import load

            readers.append(load(entry))
        else:
            readers.append(entry)
    return readers


def _input_of(reader: Reader, layer: str) -> str:
    shares = getattr(reader, "shares_input", None)
    return layer if shares is None else str(shares(layer))


def _transposed(reader: Reader, layer: str, shape: Sequence[int]) -> bool:
    """Whether the weight is stored (d_in, d_out), as in GPT-2's Conv1D: the file says so."""
    header = getattr(reader, "header", None)
    known = {} if header is None else header.get("layers", {})
    return bool(known.get(layer, {}).get("transposed", False))
