"""Checks a recipe against its models' headers and makes the plan: every output tensor and every
problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.types import ModelHeader, Source, TensorInfo
from pymerge.dtypes import BITS, INTEGERS, MERGEABLE
from pymerge.messages.words import counted, names_with_verb, some_names
from pymerge.methods._settings import Setting
from pymerge.ops.weights import averaged, is_running, mean_of
from pymerge.planning.coverage import Coverage, embedding, is_constant, is_output, own_output, ties
from pymerge.planning.layer_config import carry_layers
from pymerge.planning.name_matching import Matched, match_names
from pymerge.planning.plan import Plan, PlannedTensor, Vocabulary
from pymerge.planning.solves import SolvePlanner, renamed
from pymerge.planning.unmergeable import refusals
from pymerge.planning.vocabulary import EMBEDDINGS, HEADS, beyond, compare, is_vocabulary
from pymerge.recipe.model import MergeRecipe, TensorTask
from pymerge.rules.mats import is_linear
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import TiesOptions

if TYPE_CHECKING:
    from pymerge.planning.token_alignment import TokenAlignment

_SHOWN = 4  # of tensors whose shapes differ


def build_plan(
    recipe: MergeRecipe, headers: Sequence[ModelHeader], notes: Sequence[str] = ()
) -> Plan:
    """Match the recipe with what the models hold. Problems are in the result, not
    raised.

    Raises ConfigError where the recipe itself makes no sense for these models.
    """
    matched = match_names(headers, recipe.base or 0)
    planner = _Planner(recipe, matched, headers)
    planner.notes.extend(notes)
    planner.notes.extend(matched.notes)
    plan = planner.plan()
    return replace(plan, tensors=tuple(matched.stored_tensor(each) for each in plan.tensors))


class _Planner:
    def __init__(
        self, recipe: MergeRecipe, matched: Matched, stored: Sequence[ModelHeader]
    ) -> None:
        """stored: the models under the names of their files, which statistics have too."""
        headers = matched.headers
        self.recipe = recipe
        self.matched = matched
        self.headers = headers
        self.reference = headers[recipe.base or 0]
        self.coverage = Coverage(recipe, headers)
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.shapes: dict[str, list[str]] = {}
        self.counts: dict[str, list[str]] = {}  # weights that are not as many as models -> tensors
        self.vocabulary: dict[str, list[str]] = {}
        self.mixed: dict[str, list[str]] = {}
        self.running: list[str] = []  # statistics of normalisation layers that are averaged
        self.solving = SolvePlanner(stored)
        self.alignment: TokenAlignment | None = None  # where the recipe names a tokenizer
        if recipe.tokenizer is not None:
            from pymerge.planning.token_alignment import open_alignment

            self.alignment, problems = open_alignment(headers, recipe)
            self.problems += problems

    def plan(self) -> Plan:
        for what, dtype in (("dtype", self.recipe.dtype), ("out_dtype", self.recipe.out_dtype)):
            if isinstance(dtype, str) and dtype not in MERGEABLE:
                self.problems.append(f"{what}={dtype!r} is not one of {', '.join(MERGEABLE)}")
        planned = []
        names: set[str] = set()
        twice: list[str] = []
        tasks = self.recipe.tasks(self.headers)
        refused = refusals(self.headers, tasks)
        self.problems += refused
        for task in () if refused else tasks:
            if task.name in names:
                twice.append(task.name)
            names.add(task.name)
            tensor = self._tensor(task)
            if tensor is not None:
                planned.append(tensor)
        if twice:
            self.problems.append(f"the recipe makes more than once: {some_names(twice)}")
        self._report_names()
        problems, notes = self.solving.finish()
        self.problems += problems
        if not self.reference.in_memory:  # in memory, the reports say so for every tensor
            self.notes += notes
        self.notes += [note for header in self.headers for note in renamed(header)]
        self._check_model_scope(planned)
        self._check_tokenizers(planned)
        vocabulary = None
        if self.alignment is not None:
            self.problems += self.alignment.problems + self.alignment.unknown(planned)
            self.notes += self.alignment.notes
            if any(is_vocabulary(tensor.name) for tensor in planned):
                vocabulary = Vocabulary(
                    self.alignment.rows, self.alignment.new_ids(self.recipe.base or 0)
                )
        config: dict[str, Any] = {}
        if self.recipe.num_layers == 0:
            self.problems.append(
                "the slices have no layers; every layer_range ends where it begins"
            )
        elif self.recipe.layers:
            configs = [header.config for header in self.headers]
            config, found = carry_layers(configs, self.recipe.base or 0, self.recipe.layers)
            self.problems += [f"{self.reference.reference}: {problem}" for problem in found]
        if not planned and not self.problems:
            self.problems.append("the recipe makes no tensors")
        if not self.reference.in_memory:
            self._note_filters(planned)
            self._note_dtypes(planned)
        apart = self.reference.in_memory or self.reference.adapter
        if not self.reference.config and not apart:
            self.notes.append(
                f"{self.reference.reference} has no config.json, so the result gets none;"
                " transformers needs one beside the weights"
            )
        read = [self._read_bytes(tensor) for tensor in planned]
        sets = (  # a tensor with all that it is made of
            tensor.nbytes + own
            for tensor, own in zip(planned, read, strict=True)
            if tensor.options is not None and not self.problems
        )
        return Plan(
            models=self.recipe.models,
            tensors=tuple(planned) if not self.problems else (),
            bytes_read=sum(read) + sum(t.solve.nbytes for t in planned if t.solve is not None),
            notes=tuple(dict.fromkeys(self.notes)),
            problems=tuple(dict.fromkeys(self.problems)),
            vocabulary=vocabulary,
            tokenizer=None if self.alignment is None else self.alignment.changes,
            method=self.recipe.method,
            base=self.recipe.base,
            config=config,
            largest_set=max(sets, default=0),
        )

    def _note_filters(self, planned: Sequence[PlannedTensor]) -> None:
        """Filters that fit no tensor of the result. Those of parameters look at the names that
        tensors have in their own models.
        """
        asked: Any = self.recipe.out_dtype
        cases = asked.cases if isinstance(asked, Setting) else ()
        names = [t.name for t in planned]
        unused = [("out_dtype", c.filter) for c in cases if not any(map(c.matches, names))]
        own = {*names, *(source.tensor for t in planned for source in t.inputs)}
        unused += [(p, part) for p, part in self.recipe.filters if not any(part in n for n in own)]
        for parameter, part in unused if planned else ():
            self.notes.append(
                f"{parameter}: no tensor has {part!r} in its name, so this filter does nothing"
            )

    def _note_dtypes(self, planned: Sequence[PlannedTensor]) -> None:
        """Norms in float32 beside bfloat16, and the like."""
        found: dict[str, list[PlannedTensor]] = {}
        for tensor in planned:
            if tensor.dtype in MERGEABLE and not is_constant(tensor.name, tensor.shape):
                found.setdefault(tensor.dtype, []).append(tensor)
        sizes = {dtype: sum(t.elements for t in tensors) for dtype, tensors in found.items()}
        main = max(sizes, key=lambda dtype: sizes[dtype], default="")
        loads = f"; config.json says {main}, in which transformers loads all it does not keep apart"
        for dtype, tensors in found.items():
            if dtype != main:
                self.notes.append(
                    f"{counted(len(tensors), 'tensor')} of the result"
                    f" {'is' if len(tensors) == 1 else 'are'}"
                    f" {dtype}, most {main}: {some_names(t.name for t in tensors)}"
                    f"{loads if self.reference.config else ''}"
                )

    def _info(self, source: Source) -> TensorInfo:
        info = self.headers[source.model].tensors[source.tensor]
        return info if source.rows is None else replace(info, shape=source.rows.shape)

    def _read_bytes(self, tensor: PlannedTensor) -> int:
        """Bytes of all inputs, which have the tensor's shape."""
        count = tensor.elements
        return sum(
            count
            * BITS[self._info(source).dtype if source.rows is None else source.rows.dtype]
            // 8
            for source in tensor.inputs
        )

    def _tensor(self, task: TensorTask) -> PlannedTensor | None:
        if is_output(task.name) and self._is_tied_away(task):
            return None
        resolved = [self.coverage.find(source) for source in task.sources]
        base = self.coverage.find(task.base) if task.base is not None else None
        sources = tuple(source for source in resolved if source is not None)
        if None in resolved or (task.base is not None and base is None):
            own = self.coverage.instead(task, resolved, base)
            if own is None:
                return None
            task = replace(task, sources=(own,), base=None, options=None, solve=None, method="copy")
            sources, base = (own,), None
        else:
            self.coverage.complete(sources if base is None else (*sources, base))
            task = self._averaged(task)
            base = base if task.base is not None else None
        if self.alignment is not None and is_vocabulary(task.name):
            aligned = self.alignment.aligned(task, sources, base)
            if aligned is None:
                return None
            sources, base = aligned
        if not self._same_shapes(task.name, sources, base):
            return None
        return self._typed(task, sources, base)

    def _averaged(self, task: TensorTask) -> TensorTask:
        """Running means and variances are averaged over the models by every method: adding
        differences to a variance could make it negative.
        """
        options = task.options
        if not is_running(task.name) or (options is None and task.solve is None):
            return task
        average = isinstance(options, TiesOptions) and min(options.weights, default=0) >= 0
        if task.base is None and average:
            return task
        self.running.append(task.name)
        non_finite = self.recipe.non_finite if options is None else options.non_finite
        mean = mean_of(len(task.sources), non_finite)
        return replace(task, base=None, options=mean, solve=None, method="average")

    def _is_tied_away(self, task: TensorTask) -> bool:
        """Whether the result has no such output layer, because its config ties it to the
        embedding.
        """
        tokens = embedding(self.reference.tensors, of=task.name)
        if not ties(self.reference.config) or tokens is None:
            return False
        sources = (*task.sources, *([task.base] if task.base else []))
        for source in sources:
            self.coverage.use(source)
            header = self.headers[source.model]
            if ties(header.config) is False and source.tensor in header.tensors:
                way = own_output(header.reference, self.reference.reference)
                self.problems.append(f"{task.name} of {header.reference} would be lost{way}")
        self.notes.append(f"{task.name} is left out: the config ties it to the embedding")
        return True

    def _which(self, found: Iterable[tuple[object, Source]]) -> str:
        """`[3] in base and m1, [4] in m2`: what was found in which models."""
        models: dict[str, list[str]] = {}
        for what, source in found:
            models.setdefault(str(what), []).append(self._name(source))
        return some_names(
            f"{what} in {' and '.join(names) if len(names) <= 4 else some_names(names)}"
            for what, names in models.items()
        )

    def _same_shapes(self, name: str, sources: Sequence[Source], base: Source | None) -> bool:
        inputs = [base, *sources] if base is not None else list(sources)
        if len({self._info(source).shape for source in inputs}) == 1:
            return True
        found = {source: self._info(source).shape for source in inputs}
        listed = self._which((list(shape), source) for source, shape in found.items())
        rows_only = len({shape[1:] for shape in found.values()}) == 1 and all(found.values())
        if rows_only and name.endswith(EMBEDDINGS + HEADS):
            self.vocabulary.setdefault(listed, []).append(name)
        else:
            self.shapes.setdefault(listed, []).append(name)
        return False

    def _typed(
        self,
        task: TensorTask,
        sources: tuple[Source, ...],
        base: Source | None,
        wanted: str | None = None,
    ) -> PlannedTensor | None:
        inputs = [base, *sources] if base is not None else list(sources)
        infos = [self._info(source) for source in inputs]
        dtypes = [info.dtype for info in infos]
        options = self._options(task, infos[0].shape)
        planned = PlannedTensor(
            name=task.name,
            shape=infos[0].shape,
            dtype=infos[0].result_dtype,
            method=task.method if options is task.options else "average",
            sources=sources,
            base=base,
            options=options,
            key_name=task.key_name or task.name,
            non_finite=self.recipe.non_finite if task.options is None else task.options.non_finite,
        )
        out_dtype: Any = self.recipe.out_dtype
        if isinstance(out_dtype, Setting):
            out_dtype = out_dtype.value(task.name, 0.0)
        wanted = out_dtype or self.recipe.dtype or wanted
        if task.solve is not None:  # whatever the initialisation is made from (E1)
            wanted = wanted or self._info(sources[0]).result_dtype
        if all(dtype in MERGEABLE for dtype in dtypes):
            if task.solve is not None:
                stored = [self.matched.as_stored(source) for source in sources]
                solve = self.solving.plan(task, planned.shape, stored)
                if solve is None or solve.asks:
                    start, own = replace(task, solve=None), (sources, base)
                    if task.options is None and base is not None:
                        start, own = replace(start, sources=(base,), base=None), ((base,), None)
                    otherwise = self._typed(start, *own, wanted)
                    if solve is None:
                        return otherwise
                    planned = replace(planned, otherwise=otherwise)
                return replace(
                    planned,
                    dtype=wanted or planned.dtype,
                    method=task.solve.method,
                    options=None,
                    solve=solve,
                )
            dtype = wanted or planned.dtype
            if task.options is None:
                copied = None if dtype == dtypes[0] else _CAST
                return replace(planned, dtype=dtype, sources=sources[:1], base=None, options=copied)
            if task.options.models != len(sources):
                listed = f"{counted(len(sources), 'model')} but options for {task.options.models}"
                self.counts.setdefault(listed, []).append(task.name)
                return None
            return planned if dtype == planned.dtype else replace(planned, dtype=dtype)
        own_base = self._base_beside(task, inputs[0])
        if base is None and own_base is not None:
            inputs, dtypes = [own_base, *inputs], [dtypes[0], *dtypes]
        # A constant may be stored as any kind of number; what is an integer in all is one too.
        integers = [dtype in INTEGERS for dtype in dtypes]
        numbers = [one or dtype in MERGEABLE for one, dtype in zip(integers, dtypes, strict=True)]
        constant = all(integers) or (all(numbers) and is_constant(task.name, planned.shape))
        if len(set(dtypes)) > 1 and not constant:
            listed = self._which(zip(dtypes, inputs, strict=True))
            self.mixed.setdefault(listed, []).append(task.name)
            return None
        return replace(
            planned,
            method="copy",
            sources=(inputs[0],),
            base=None,
            options=None,
            duplicates=tuple(inputs[1:]),
            strict=not constant and not dtypes[0].startswith("complex"),
        )

    @staticmethod
    def _options(task: TensorTask, shape: tuple[int, ...]) -> OpOptions | None:
        """The task's options for a tensor of this name and shape."""
        if task.options is None:
            return None
        linear = is_linear(task.name, shape) and not is_vocabulary(task.name)
        return task.options.of_tensor(shape, linear)

    def _base_beside(self, task: TensorTask, like: Source) -> Source | None:
        """The base's tensor for one that a merge by statistics copies, where the task itself names
        no base.
        """
        if task.solve is None or self.recipe.base is None or self.recipe.sliced:
            return None
        found = self.headers[self.recipe.base].tensors.get(task.name)
        info = self._info(like)
        if found is None or (found.shape, found.dtype) != (info.shape, info.dtype):
            return None
        return Source(self.recipe.base, task.name)

    def _name(self, source: Source) -> str:
        return self.headers[source.model].reference

    def _report_names(self) -> None:
        if self.running:
            self.notes.append(averaged(self.running, self.recipe.method))
        problems, notes = self.coverage.finish()
        self.problems += problems
        self.notes += notes
        for listed, names in self.vocabulary.items():
            if self.recipe.tokenizer is None:
                way = (
                    "give tokenizer_source (base, union, or a model), which moves every model's"
                    " rows to that tokenizer's ids"
                )
            else:
                way = (
                    "rows are moved only to and from tokenizers that can be read; save them as"
                    " tokenizer.json"
                )
            self.problems.append(
                f"vocabulary sizes differ: {names_with_verb(names)} {listed}; {way}"
            )
        for listed, names in self.mixed.items():
            self.problems.append(
                f"{names_with_verb(names)} {listed}; only {', '.join(MERGEABLE)} can be mixed;"
                " store the"
                " models in one dtype"
            )
        if self.shapes:
            different = [name for names in self.shapes.values() for name in names]
            shown = [f"{names[0]} is {listed}" for listed, names in self.shapes.items()][:_SHOWN]
            rest = len(different) - len(shown)
            more = f" and {counted(rest, 'other')}" if rest else ""
            self.problems.append(
                f"shapes differ in {counted(len(different), 'tensor')}: {'; '.join(shown)}{more};"
                " merge"
                " models of one size only"
            )
        for listed, names in self.counts.items():
            self.problems.append(f"{some_names(names)}: {listed}")

    def _check_tokenizers(self, planned: Sequence[PlannedTensor]) -> None:
        """Check that rows of embeddings and heads that are merged belong to the same tokens."""
        alignment = self.alignment
        if alignment and (alignment.problems or any(is_vocabulary(t.name) for t in planned)):
            return
        with_rows = [t for t in planned if t.name.endswith(EMBEDDINGS + HEADS) and t.shape]
        # Without a tensor of a known name, any tensor could be the embedding.
        models = {s.model for t in with_rows or planned for s in t.inputs}
        rows = max((t.shape[0] for t in with_rows), default=None)
        chosen = self.recipe.tokenizer if self.recipe.tokenizer is not None else self.recipe.base
        chosen = chosen or 0
        tokens = {m: self.headers[m].tokens for m in sorted({*models, chosen})}
        if rows is not None:
            header = self.headers[chosen]
            ends = EMBEDDINGS + HEADS
            own = [
                t.shape[0] for name, t in header.tensors.items() if name.endswith(ends) and t.shape
            ]
            notes, problems = beyond(tokens[chosen], rows, max(own, default=None), header.reference)
            self.notes += notes
            self.problems += problems
        first = next((m for m in [chosen, *tokens] if tokens[m] is not None), chosen)
        names = [header.reference for header in self.headers]
        notes, problems = compare(first, tokens, names, rows)
        self.notes += notes
        self.problems += problems

    def _check_model_scope(self, planned: Sequence[PlannedTensor]) -> None:
        """Check that all tensors have the same parameters, since one threshold over all of them
        needs it (T7).
        """
        scoped = [t for t in planned if t.options is not None and t.options.over_all_tensors]
        if not scoped:
            return
        first = scoped[0]
        for tensor in scoped[1:]:
            same = tensor.sources and [s.model for s in tensor.sources] == [
                s.model for s in first.sources
            ]
            if tensor.options != first.options or not same:
                self.problems.append(
                    f'scope "model" (flavor "paper") takes one threshold over all tensors, but'
                    f" {tensor.name} and {first.name} have different parameters or models; give"
                    ' them the same, or have one threshold a tensor (scope "tensor", flavor'
                    ' "mergekit" or "peft")'
                )
                return


# A copy into another dtype: one model, no base.
_CAST = replace(mean_of(1, "allow"), merge="sum")
