"""Which tensors of a merge have statistics, what is read for each, and how much memory solving
takes. Headers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def batches(tensors: Sequence[PlannedTensor], order: Sequence[int]) -> Iterator[list[int]]:
    """The tensors of a file in pieces whose layers are solved together, within `WINDOW`."""
    held: list[int] = []
    size = 0
    for index in order:
        need = tensors[index].solve_memory
        if held and size + need > WINDOW:
            yield held
            held, size = [], 0
        held.append(index)
        size += need
    if held:
        yield held


_SHOWN = 4  # of tensors with statistics of another shape
_NO_OUTPUTS = "no output_grad_gram in the statistics of any model"


class SolvePlanner:
    """Decides tensor by tensor, and gathers what is to be said of the whole."""

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
        """What to read and solve for a floating-point tensor; None where no model has statistics of
        it.
        """
        options = task.solve
        assert options is not None
        self._models.update((source.model, options.method) for source in sources)
        found = self._solve(options, shape, sources, task.name)
        self._count(options, shape, sources, task.name, found is not None)
        if found is None:
            self._without.setdefault(task.method, []).append(elements(shape))
            return None
        if found.note:
            self._partly.setdefault(found.note, []).append(task.name)
        if found.outputs is not None and len(sources) > 2 and options.exact:
            what = (
                "solver: exact takes one or two models with output Gram matrices, not"
                f" {len(sources)}; use solver: cg, or output_grams: false"
            )
            self._problems.setdefault(what, []).append(task.name)
        return found

    def _count(
        self,
        options: SolveOptions,
        shape: tuple[int, ...],
        sources: Sequence[Source],
        name: str,
        solved: bool,
    ) -> None:
        """How much of the linear layers is solved, where that is what the statistics are for."""
        held = (self.headers[source.model].statistics for source in sources)
        meant = any(
            s is not None and any(k.startswith("input_gram/") for k in s.tensors) for s in held
        )
        if options.method == "fisher" or options.allow_unsolved or not meant:
            return
        if is_linear(name, shape):
            self._linear += elements(shape)
            self._linear_solved += elements(shape) if solved else 0
            if not solved:
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
            return None
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
            weight = self._weight_name(header.statistics, source.tensor)
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
        content = statistics.content
        for name in (source.tensor, source.tensor.removesuffix(".weight")):
            key = content["aliases"].get(f"{kind}/{name}", f"{kind}/{name}")
            counts = content["tensors"].get(key)
            if counts is None:
                continue
            count = int(counts["tokens" if kind == "input_gram" else "draws"])
            tokens = int(counts["tokens"]) if kind == "output_grad_gram" else count
            if not count or not tokens:
                return None
            return Sum(key, count, 4 * elements(statistics.tensors[key].shape))
        return None

    def _saw_few(self, source: Source) -> bool:
        statistics = self.headers[source.model].statistics
        few = {} if statistics is None else _mapping(statistics.content.get("few"))
        return source.tensor.removesuffix(".weight") in few

    def _transposed(self, source: Source) -> bool:
        statistics = self.headers[source.model].statistics
        if statistics is None:
            return False
        layer = source.tensor.removesuffix(".weight")
        return bool(_mapping(statistics.content["layers"].get(layer)).get("transposed"))

    @staticmethod
    def _weight_name(statistics: StatisticsHeader, tensor: str) -> str:
        layer = _mapping(statistics.content["layers"].get(tensor.removesuffix(".weight")))
        return str(layer.get("weight", tensor))

    def finish(self) -> tuple[list[str], list[str]]:
        """(problems, notes) of the recipe as a whole."""
        problems = [f"{some_names(names)}: {what}" for what, names in self._problems.items()]
        notes: list[str] = []
        if self._shapes:
            rest = len(self._shapes) - _SHOWN
            more = f" and {rest} other{'s' if rest > 1 else ''}" if rest > 0 else ""
            problems.append(
                "statistics of other shapes than the models:"
                f" {'; '.join(self._shapes[:_SHOWN])}{more}; these are statistics of another model"
            )
        for model, method in sorted(self._models.items()):
            problems += self._problems_of(model, method)
        little = too_little(
            self._linear_solved, self._linear, self._lost, "allow_unsolved: true in parameters"
        )
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

    def _problems_of(self, model: int, method: str) -> list[str]:
        header = self.headers[model]
        statistics = header.statistics
        if statistics is None:
            return []
        foreign = self._foreign.get(model)
        if foreign:
            return [
                f"{statistics.path} was not collected on {header.reference}: the values of"
                f" {some_names(foreign)} differ; collect that model's (pymerge stats"
                f" {header.reference} TEXTS --out FILE) and name them in the recipe"
            ]
        if model in self._used or self._shapes:
            return []
        kinds = sorted({key.partition("/")[0] for key in statistics.tensors})
        wanted = "diagonal_fisher" if method == "fisher" else "input_gram"
        if wanted in kinds:
            first = next(key for key in statistics.tensors if key.startswith(wanted))
            return [
                f"{statistics.path} knows no tensor of {header.reference} (it has"
                f" {first.partition('/')[2]}, ...); these are statistics of another model, or of no"
                " data"
            ]
        return [
            f"{statistics.path} holds {', '.join(kinds) or 'nothing'} and merge_method {method}"
            f" needs {wanted}; collect it (pymerge stats {header.reference} TEXTS --kinds {wanted}"
            " --out FILE)"
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


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
