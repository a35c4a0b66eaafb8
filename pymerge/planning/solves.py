"""Which tensors of a merge have statistics, what is read for each, and how much memory solving
takes. Reads headers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.types import ModelHeader, Source, StatisticsHeader
from pymerge.dtypes import elements
from pymerge.messages.words import some_names
from pymerge.methods._statistics import SolveOptions
from pymerge.planning.plan import WINDOW, Solve, Sum
from pymerge.recipe.model import TensorTask
from pymerge.rules.mats import is_linear, too_little, vector_length

if TYPE_CHECKING:
    from pymerge.planning.plan import PlannedTensor


def batches(
    needs: Mapping[int, int] | Sequence[int], order: Sequence[int], window: int = WINDOW
) -> Iterator[list[int]]:
    """The tensors in order, in batches that are solved together within `window` bytes. needs: the
    bytes that each takes.
    """
    held: list[int] = []
    size = 0
    for index in order:
        need = needs[index]
        if held and size + need > window:
            yield held
            held, size = [], 0
        held.append(index)
        size += need
    if held:
        yield held


def leaders(tensors: Mapping[int, PlannedTensor]) -> dict[int, int | None]:
    """For each tensor that is solved as a system: the earlier one that has the same input
    statistics, if any.
    """
    found: dict[int, int | None] = {}
    first: dict[Any, int] = {}
    for index, tensor in tensors.items():
        solve = tensor.solve
        if solve is None or solve.in_parts:
            continue
        key = tuple(
            None if each is None else (source.model, each.key)
            for source, each in zip(tensor.sources, solve.inputs, strict=True)
        )
        leader = first.setdefault(key, index)
        found[index] = None if leader == index else leader
    return found


_SHOWN = 4  # of tensors with statistics of another shape
_NO_OUTPUTS = "no output_grad_gram in the statistics of any model"


class SolvePlanner:
    """Decides for each tensor how it is solved, and collects notes and problems."""

    def __init__(self, headers: Sequence[ModelHeader]) -> None:
        self.headers = headers
        self._used: set[int] = set()
        self._models: dict[int, str] = {}  # models that should have statistics -> the method
        self._without: dict[
            str, list[int]
        ] = {}  # fallback -> elements of tensors without statistics
        self._partly: dict[str, list[str]] = {}
        self._shapes: list[str] = []
        self._problems: dict[str, list[str]] = {}  # what is wrong -> tensors
        self._foreign: dict[int, list[str]] = {}
        self._linear = self._linear_solved = 0  # elements of linear layers
        self._lost: list[str] = []

    def plan(
        self, task: TensorTask, shape: tuple[int, ...], sources: Sequence[Source]
    ) -> Solve | None:
        """How to solve a floating-point tensor; None where no model has statistics for it."""
        options = task.solve
        assert options is not None
        if any(self.headers[source.model].asks for source in sources):
            return self._most(options, shape, len(sources))
        found = self.found(task, shape, sources)
        self._count(options, shape, sources, task.name, _share(found))
        return found

    def found(
        self, task: TensorTask, shape: tuple[int, ...], sources: Sequence[Source]
    ) -> Solve | None:
        """As `plan`, from the statistics themselves, which are requested where no header describes
        them.
        """
        options = task.solve
        assert options is not None
        self._models.update((source.model, options.method) for source in sources)
        found = self._solve(options, shape, sources, task.name)
        if found is None:
            self._without.setdefault(task.method, []).append(elements(shape))
            return None
        if _share(found) < 1:
            lacking = round((1 - _share(found)) * elements(shape))
            self._without.setdefault(task.method, []).append(lacking)
        if found.note:
            self._partly.setdefault(found.note, []).append(task.name)
        outputs = any(each.outputs is not None for each in (found, *found.slices))
        if outputs and len(sources) > 2 and options.exact:
            what = (
                "solver: exact takes one or two models with output Gram matrices, not"
                f" {len(sources)}; use solver: cg, or output_grams: false"
            )
            self._problems.setdefault(what, []).append(task.name)
        return found

    @staticmethod
    def _most(options: SolveOptions, shape: tuple[int, ...], count: int) -> Solve | None:
        """What may be there, for its memory."""
        vector = vector_length(shape) is not None
        if not vector and len(shape) != 2 and options.method != "fisher":
            return None
        both = options.method == "mats" and options.output_grams is not False and len(shape) == 2
        none = (None,) * count
        return Solve(options, none, none if both else None, False, "", asks=True)

    def _count(
        self,
        options: SolveOptions,
        shape: tuple[int, ...],
        sources: Sequence[Source],
        name: str,
        solved: float,
    ) -> None:
        """How much of the linear layers is solved, where that is what the statistics are for.
        solved: the share of the tensor.
        """
        held = (self.headers[source.model].statistics for source in sources)
        meant = any(
            s is not None and any(k.startswith("input_gram/") for k in s.tensors) for s in held
        )
        if options.method == "fisher" or options.allow_unsolved or not meant:
            return
        if is_linear(name, shape) or (solved > 0 and vector_length(shape) is None):
            self._linear += elements(shape)
            self._linear_solved += round(solved * elements(shape))
            if solved < 1:
                self._lost.append(name)

    def _solve(
        self, options: SolveOptions, shape: tuple[int, ...], sources: Sequence[Source], name: str
    ) -> Solve | None:
        if options.method == "fisher":
            sums, note = self._gather("diagonal_fisher", sources, shape, name)
            return Solve(options, sums, None, False, note) if any(sums) else None
        length = vector_length(shape)
        if length is not None:
            sums, note = self._gather("block_fisher", sources, _triangle(length), name)
            if any(sums):
                return Solve(options, sums, None, len(shape) == 2 and shape[1] == 1, note)
        if len(shape) != 2:
            return self._sliced(options, shape, sources, name)
        transposed = any(self._transposed(source) for source in sources)
        d_out, d_in = reversed(shape) if transposed else shape
        sums, note = self._gather("input_gram", sources, _triangle(d_in), name)
        if not any(sums):
            return None
        outputs = None
        if options.method == "mats" and options.output_grams is not False:
            outputs, missing = self._gather("output_grad_gram", sources, _triangle(d_out), name)
            note = note or (missing if any(outputs) else _NO_OUTPUTS)
            if not any(outputs):
                if options.output_grams:
                    what = (
                        "output_grams is true and no statistics file has their output_grad_gram; "
                        "collect them (pymerge stats, without --kinds), or leave output_grams out"
                    )
                    self._problems.setdefault(what, []).append(name)
                outputs = None
        return Solve(options, sums, outputs, transposed, note)

    def _sliced(
        self, options: SolveOptions, shape: tuple[int, ...], sources: Sequence[Source], name: str
    ) -> Solve | None:
        """A tensor of several matrices, or of one whose rows have more than one dimension (M16)."""
        layers = [self._slices(source, shape) for source in sources]
        count = max(map(len, layers), default=0)
        if not count:
            return None
        rows = shape[0] // count if count == 1 else shape[0] * shape[1] // count
        size = (rows, elements(shape) // (count * rows))
        parts: list[Solve | None] = []
        for place in range(count):
            own = [
                replace(source, tensor=names[place] if len(names) == count else source.tensor)
                for source, names in zip(sources, layers, strict=True)
            ]
            parts.append(self._solve(options, size, own, name))
        solved = [part for part in parts if part is not None]
        if not solved:
            return None
        nothing = (None,) * len(sources)
        rest = replace(
            solved[0],
            # M4: what has no statistics is not zero.
            options=replace(options, init="average") if options.init == "zero" else options,
            inputs=nothing,
            outputs=None,
            note="no statistics",
        )
        slices = tuple(rest if part is None else part for part in parts)
        note = "; ".join(dict.fromkeys(part.note for part in solved if part.note))
        return Solve(options, nothing, None, False, note, slices=slices, slice_shape=size)

    def _slices(self, source: Source, shape: tuple[int, ...]) -> tuple[str, ...]:
        statistics = self.headers[source.model].statistics
        return () if statistics is None else statistics.slices(source.tensor, shape)

    def _gather(
        self, kind: str, sources: Sequence[Source], shape: tuple[int, ...], name: str
    ) -> tuple[tuple[Sum | None, ...], str]:
        found = [self._find(kind, source) for source in sources]
        lacking = []
        for source, each in zip(sources, found, strict=True):
            header = self.headers[source.model]
            if each is None or header.statistics is None:
                lacking.append(header.reference)
                continue
            if kind != "output_grad_gram":
                self._used.add(source.model)
            info = header.statistics.tensors[each.key]
            if info.shape != shape or info.dtype != "float32":
                self._shapes.append(
                    f"{each.key} of {header.statistics.path} has the shape {list(info.shape)},"
                    f" {name} asks for {list(shape)}"
                )
            weight = header.statistics.weight_of(source.tensor)
            if weight in header.statistics.foreign:
                self._foreign.setdefault(source.model, []).append(weight)
        note = f"no {kind} in the statistics of {some_names(lacking)}" if lacking else ""
        few = [self.headers[source.model].reference for source in sources if self._saw_few(source)]
        if few:
            pooled = f"few tokens in the statistics of {some_names(few)}, which are all experts'"
            note = f"{note}; {pooled}" if note else pooled
        return tuple(found), note

    def _find(self, kind: str, source: Source) -> Sum | None:
        statistics = self.headers[source.model].statistics
        if statistics is None:
            return None
        found = statistics.find(kind, source.tensor)
        if found is None:
            return None
        key, count = found
        return Sum(key, count, 4 * elements(statistics.tensors[key].shape))

    def _saw_few(self, source: Source) -> bool:
        statistics = self.headers[source.model].statistics
        return statistics is not None and statistics.saw_few(source.tensor)

    def _transposed(self, source: Source) -> bool:
        statistics = self.headers[source.model].statistics
        return statistics is not None and statistics.transposed(source.tensor)

    def seen(self) -> list[str]:
        """Problems of the tensors whose statistics were requested."""
        problems = [f"{some_names(names)}: {what}" for what, names in self._problems.items()]
        if self._shapes:
            rest = len(self._shapes) - _SHOWN
            more = f" and {rest} other{'s' if rest > 1 else ''}" if rest > 0 else ""
            problems.append(
                "statistics of other shapes than the models:"
                f" {'; '.join(self._shapes[:_SHOWN])}{more}; these are statistics of another model"
            )
        return problems + [
            self._not_of(model) for model in sorted(self._models) if model in self._foreign
        ]

    def _not_of(self, model: int) -> str:
        header = self.headers[model]
        assert header.statistics is not None
        way_out = (
            "pass the statistics in the order of the models, or collect them again (pymerge stats)"
            if header.in_memory
            else f"collect that model's (pymerge stats {header.reference} TEXTS --out FILE) and"
            " name them in the recipe"
        )
        return (
            f"{header.statistics.path} was not collected on {header.reference}: the values of"
            f" {some_names(self._foreign[model])} differ; {way_out}"
        )

    def finish(self) -> tuple[list[str], list[str]]:
        """(problems, notes) on the recipe as a whole."""
        problems = self.seen()
        notes: list[str] = []
        for model, method in sorted(self._models.items()):
            problems += self._problems_of(model, method)
        in_memory = any(header.in_memory for header in self.headers)
        option = "allow_unsolved=True" if in_memory else "allow_unsolved: true in parameters"
        little = too_little(self._linear_solved, self._linear, self._lost, option)
        if little and not problems:
            problems.append(little)
        for fallback, sizes in self._without.items():
            one = len(sizes) == 1
            notes.append(
                f"{len(sizes)} tensor{'' if one else 's'} ({sum(sizes):,} parameters)"
                f" {'has' if one else 'have'} no statistics;"
                f" {'it becomes' if one else 'they become'} {_value_of(fallback)}"
            )
        for note, names in self._partly.items():
            then = "input Grams alone" if note == _NO_OUTPUTS else "the other models"
            notes.append(f"{note}: {some_names(names)}; {then} decide there")
        return problems, notes

    def unused(self) -> list[str]:
        """Problems of described statistics of which no tensor that was asked about had any."""
        return [
            problem
            for model, method in sorted(self._models.items())
            if not self.headers[model].asks
            for problem in self._problems_of(model, method)
        ]

    def _problems_of(self, model: int, method: str) -> list[str]:
        header = self.headers[model]
        statistics = header.statistics
        if statistics is None or model in self._used or self._shapes or model in self._foreign:
            return []
        kinds = sorted({key.partition("/")[0] for key in statistics.tensors})
        wanted = "diagonal_fisher" if method == "fisher" else "input_gram"
        if wanted in kinds:
            first = next(key for key in statistics.tensors if key.startswith(wanted))
            return [
                f"{statistics.path} knows no tensor of {header.reference} (it has"
                f" {first.partition('/')[2]}, ...); these are statistics of another model, or of no"
                " data; collect that model's, with rename= where its tensors have other names"
            ]
        return [
            f"{statistics.path} holds {some_names(kinds) or 'nothing'} and merge_method {method}"
            f" needs {wanted}; collect it (pymerge stats {header.reference} TEXTS --kinds {wanted}"
            " --out FILE)"
        ]


def _share(solve: Solve | None) -> float:
    """How much of a tensor has statistics: of several matrices, perhaps some."""
    if solve is None or not solve.slices:
        return float(solve is not None)
    return sum(any(part.sums) for part in solve.slices) / len(solve.slices)


def renamed(header: ModelHeader) -> list[str]:
    """What is to be said of names that were found by content."""
    statistics = header.statistics
    if not isinstance(statistics, StatisticsHeader) or not statistics.renamed:
        return []
    own = sorted({key.partition("/")[2] for key in statistics.tensors})
    one = len(statistics.renamed) == 1
    return [
        f"{statistics.path} names tensors otherwise than {header.reference} ({some_names(own)}"
        f" there); {some_names(statistics.renamed)} {'was' if one else 'were'} found by"
        f" {'its' if one else 'their'} values"
    ]


def _value_of(fallback: str) -> str:
    """What a tensor without statistics becomes, in words."""
    named = {
        "pretrained": "the base's",
        "init model": "the initialisation model's",
        "task_arithmetic": "the merge by task arithmetic",
        "ties": "the TIES merge",
    }
    return named.get(fallback, f"the {fallback}")


def _triangle(size: int) -> tuple[int, ...]:
    return (size * (size + 1) // 2,)
