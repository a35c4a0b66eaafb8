"""`pymerge.analyze_checkpoints`: what a merge of model folders would do with its models, from one
read of their files; and the same on the way of a merge.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pymerge.analysis.analysis import (
    Analysis,
    Naming,
    base_of,
    check_densities,
    check_report,
    is_merged,
)
from pymerge.analysis.figures import DENSITIES, Figures
from pymerge.analysis.measure import TensorMeasure, measure_alignment
from pymerge.backends import native
from pymerge.checkpoint.ahead import Loaded, Unit
from pymerge.checkpoint.inputs import Inputs
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import Source
from pymerge.engine.card import ShortNames
from pymerge.engine.cpu import units_of
from pymerge.engine.executor import TensorRules, loaded_units, read_ahead
from pymerge.engine.merge import Config, Progress, close_inputs, open_plan
from pymerge.engine.model_scope import rules_of
from pymerge.engine.sizes import SIZES, Sizes
from pymerge.engine.views import tensor_at
from pymerge.errors import MismatchError, as_resource_errors
from pymerge.interrupt import Uninterrupted, check, on_calling_thread
from pymerge.messages.arguments import check_flags
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.rules.ties import TiesOptions, is_elementwise
from pymerge.statistics._file import unpack


@as_resource_errors()
def analyze_checkpoints(
    config: Config,
    out: str | os.PathLike[str] | None = None,
    *,
    densities: Sequence[float] = DENSITIES,
    seed: int = 0,
    strict: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """What a merge of model folders would do with its models (docs/analyze.md), from one read of
    their files and with the memory of a merge. Nothing is merged.

    config, seed, strict, threads: as of `merge_checkpoints`. A recipe by statistics gives the
        alignment of task vectors with the inputs of the tasks too.
    out: where to write the report, an HTML file; its figures go beside it as JSON.
    densities: at which the share of the mass is given, each in [0, 1].
    progress: called with (bytes done, bytes in all, tensor name) after every tensor, on the calling
        thread.

    Returns an Analysis, which shows itself in notebooks.

    Raises as `merge_checkpoints` does; NaN and infinity are counted, not refused.
    """
    points = check_densities(densities)
    check_flags(strict=strict)
    if out is not None:
        check_report(Path(out))
    work = functools.partial(_analyze, config, points, seed, strict, threads, progress)
    found = Uninterrupted(work).run()
    if out is not None:
        found.write(out)
    return found


def _analyze(
    config: Config,
    densities: tuple[float, ...],
    seed: int,
    strict: bool,
    threads: int,
    progress: Progress | None,
    sizes: Sizes = SIZES,
) -> Analysis:
    native.check_variables(threads)
    models, plan = open_plan(config, seed, strict)
    try:
        if plan.problems:
            raise MismatchError(plan.problems)
        observer = AnalysisObserver(densities)
        stored = Inputs(models)
        rules = rules_of(plan, stored, threads, Region.anonymous, sizes)
        observer.begin(plan, models, stored, rules, sizes)
        observer.read_all(progress)
        for model in models:
            model.check()
    finally:
        close_inputs(models)
    return observer.analysis


class AnalysisObserver:
    """Analyses a merge of folders while it runs: pass it to `merge_checkpoints` as `observer`.

    It looks at the inputs of each tensor while they are in memory. What the merge does not read
    this way (files taken over from an interrupted merge, layers that are solved, tensors that a GPU
    makes) is read once more at the end.

    densities: as of `analyze_checkpoints`. analysis: the result, once the merge is done.
    """

    def __init__(self, densities: Sequence[float] = DENSITIES) -> None:
        self._densities = check_densities(densities)
        self.analysis = Analysis("", (), None, self._densities)

    def begin(
        self,
        plan: Plan,
        models: Sequence[OpenModel],
        stored: Inputs,
        rules: TensorRules,
        sizes: Sizes,
    ) -> None:
        """The merge begins. rules: of its tensors."""
        self._plan, self._models, self._stored = plan, models, stored
        self._rules, self._sizes = rules, sizes
        self._found: dict[int, Figures] = {}
        self._bases = {
            index: self._base_of(tensor)
            for index, tensor in enumerate(plan.tensors)
            if is_merged(tensor)
        }
        references = [model.reference for model in models]
        names = ShortNames(references)  # people pass reports on
        naming = Naming(plan, [names.of(reference) for reference in references])
        self._naming = naming
        self.analysis = Analysis(plan.method, naming.models, naming.base, self._densities)

    def _base_of(self, tensor: PlannedTensor) -> Source | None:
        """The base as it is stored; none where the base model lacks the tensor."""
        found = base_of(self._plan, tensor)
        if found is None or found is tensor.base:
            return found
        stored = self._models[found.model].tensors.get(found.tensor)
        fits = stored is not None and stored.info.shape == tensor.shape
        return found if fits else None

    def watch(self, index: int, reads: Iterator[Loaded]) -> Iterator[Loaded]:
        """The same reads of one tensor; each is looked at once it was used."""
        tensor = self._plan.tensors[index]
        if not is_merged(tensor) or self._bases[index] is not tensor.base:
            yield from reads
            return
        measure, seen = self._measure(index), 0
        for loaded in reads:
            yield loaded
            self._add(measure, index, loaded)
            seen += loaded.unit.count
        if seen == tensor.elements:
            self._found[index] = self._finished(measure, index)

    def finish(self) -> None:
        """The merge is done, and its inputs are still open."""
        self.read_all(None)

    def read_all(self, progress: Progress | None) -> None:
        """Read what was not seen yet."""
        merged = [i for i, tensor in enumerate(self._plan.tensors) if is_merged(tensor)]
        left = [index for index in merged if index not in self._found]
        units = [self._units(index) for index in left]
        total = sum(unit.nbytes for own in units for unit in own)
        done = 0
        with read_ahead([u for own in units for u in own], Region.anonymous, self._sizes) as ahead:
            for index, own in zip(left, units, strict=True):
                tensor = self._plan.tensors[index]
                measure = self._measure(index)
                for loaded in loaded_units(ahead, len(own)):
                    self._add(measure, index, loaded)
                    done += loaded.unit.nbytes
                self._found[index] = self._finished(measure, index)
                check()
                if progress is not None:
                    on_calling_thread(functools.partial(progress, done, total, tensor.name))
        self.analysis.tensors = [
            self._naming.described(self._plan.tensors[index], self._found[index])
            for index in merged
        ]

    def _units(self, index: int) -> list[Unit]:
        tensor, rule = self._plan.tensors[index], self._rules.of(index)
        base = self._bases[index]
        sources = [*tensor.sources, *(() if base is None else (base,))]
        inputs = [self._stored(source) for source in sources]
        may_be_cut = tensor.solve is not None
        if rule is not None:
            may_be_cut = is_elementwise(rule)
        elif tensor.options is not None:
            may_be_cut = tensor.options.may_be_cut(tensor.shape)
        return units_of(index, tensor, inputs, may_be_cut, self._sizes)

    def _measure(self, index: int) -> TensorMeasure:
        tensor = self._plan.tensors[index]
        rule = self._rules.of(index)
        by_op = None if isinstance(tensor.options, TiesOptions) else tensor.options
        return TensorMeasure(
            len(tensor.sources), tensor.elements, rule, self._densities, by_op, tensor.key_name
        )

    def _add(self, measure: TensorMeasure, index: int, loaded: Loaded) -> None:
        tensor, with_base = self._plan.tensors[index], self._bases[index] is not None
        unit = loaded.unit
        whole = unit.count == tensor.elements
        shape = tensor.shape if whole else (unit.count,)
        count = len(tensor.sources)
        inputs = count + with_base
        views = [
            tensor_at((address, stored.info.dtype), shape)
            for address, (stored, _, _) in zip(
                loaded.addresses[:inputs], unit.inputs[:inputs], strict=True
            )
        ]
        base = views[count] if with_base else None
        measure.add(views[:count], base, unit.begin, whole)

    def _finished(self, measure: TensorMeasure, index: int) -> Figures:
        figures, tensor = measure.finish(), self._plan.tensors[index]
        if len(tensor.shape) == 2:
            self._align(figures, tensor, self._bases[index])
        return figures

    def _align(self, figures: Figures, tensor: PlannedTensor, start: Source | None) -> None:
        """Where models have statistics of the layer's inputs, which are read here."""
        keys = []
        for source in tensor.sources:
            statistics = self._models[source.model].header.statistics
            found = None if statistics is None else statistics.find("input_gram", source.tensor)
            keys.append(found)
        holder = next((s.model for s, k in zip(tensor.sources, keys, strict=True) if k), None)
        if holder is None:
            return
        header = self._models[holder].header.statistics
        assert header is not None
        with contextlib.ExitStack() as held:

            def view(stored: StoredTensor) -> torch.Tensor:
                return _view(stored, held)

            def gram(j: int) -> torch.Tensor | None:
                found = keys[j]
                if found is None:
                    return None
                key, divisor = found
                packed = view(self._models[tensor.sources[j].model].statistics[key])
                return unpack(packed.reshape(-1)) / divisor

            weights = [view(self._stored(source)) for source in tensor.sources]
            base = None if start is None else view(self._stored(start))
            turned = header.transposed(tensor.sources[keys.index(next(filter(None, keys)))].tensor)
            measure_alignment(figures, weights, base, gram, turned)


def _view(stored: StoredTensor, held: contextlib.ExitStack) -> torch.Tensor:
    """A stored tensor where it is mapped, or read into memory that `held` gives back."""
    shape = stored.info.shape
    if not stored.copies:
        return tensor_at((stored.address(), stored.info.dtype), shape)
    region = held.enter_context(contextlib.closing(Region.anonymous(stored.nbytes)))
    stored.read_into(0, region.view(0, stored.nbytes))
    return tensor_at((region.address, stored.info.dtype), shape)
