"""Which tensors of a merge have statistics, what is read for each, and how much memory solving takes. Headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge._words import some_names
from pymerge.checkpoint.dtypes import elements
from pymerge.plan import ModelHeader, SolveOptions, Source, StatisticsHeader, TensorTask

if TYPE_CHECKING:
    from pymerge.planner import PlannedTensor

# Layers are solved together as long as that takes no more than this; a larger layer is solved alone.
WINDOW = 256 * 10**6
# Elements of a tensor that Fisher merging takes at a time.
FISHER_CHUNK = 4 << 20


@dataclass(frozen=True)
class Sum:
    """A sum in a model's statistics file: its key, what its mean is taken over, and its bytes."""

    key: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Solve:
    """How a tensor that has statistics is merged.

    inputs: of each model the Gram matrix of its inputs, or its Fisher; None where it has none, which counts as zero.
    outputs: the Gram matrices of the output gradients, or None. transposed: the weight is stored (d_in, d_out).
    """

    options: SolveOptions
    inputs: tuple[Sum | None, ...]
    outputs: tuple[Sum | None, ...] | None
    transposed: bool
    note: str

    @property
    def sums(self) -> Iterator[tuple[int, Sum]]:
        """All that is read of the statistics: (model's place among the sources, sum)."""
        for sums in (self.inputs, self.outputs or ()):
            yield from ((k, each) for k, each in enumerate(sums) if each is not None)

    @property
    def whole(self) -> bool:
        """Whether Fisher merging needs the tensor in one piece: trimming looks at all of it."""
        return self.options.init == "ties"

    @property
    def in_chunks(self) -> bool:
        """Whether the tensor is merged a few elements at a time."""
        return self.options.method == "fisher" and not self.whole

    @property
    def nbytes(self) -> int:
        """Bytes that are read of the statistics."""
        return sum(each.nbytes for _, each in self.sums)

    def memory(self, shape: Sequence[int]) -> int:
        """Bytes that solving takes, beside the mapped inputs, in the precision that takes most of those in use."""
        count, size = len(self.inputs), elements(tuple(shape))
        if self.options.method == "fisher":
            return 8 * (size if self.whole else min(size, FISHER_CHUNK)) * (2 * count + 5)
        d_in = shape[-1] if len(shape) == 1 or not self.transposed else shape[0]
        d_out = size // d_in if d_in else 0
        width = 8 if _exact(self.options) or _precision(self.options) == "fp64" else 4
        # The Grams as read and stacked; weights, their distances from the start, and products, K of each; a dozen vectors.
        squares = 4 * 2 * count * d_in**2 + width * (count + 4) * d_in**2
        if self.outputs is not None:
            squares += 4 * 2 * count * d_out**2 + width * (count + 4) * d_out**2
        return squares + width * size * (4 * count + 12)


def _exact(options: SolveOptions) -> bool:
    return options.method == "regmean" or dict(options.options).get("solver") == "exact"


def _precision(options: SolveOptions) -> str:
    return str(dict(options.options).get("precision", "fp32"))


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

    def plan(
        self, task: TensorTask, shape: tuple[int, ...], sources: Sequence[Source]
    ) -> Solve | None:
        """What to read and solve for a floating-point tensor; None where no model has statistics of it."""
        options = task.solve
        assert options is not None
        self._models.update((source.model, options.method) for source in sources)
        found = self._solve(options, shape, sources, task.name)
        if found is None:
            self._without.setdefault(task.method, []).append(elements(shape))
            return None
        if found.note:
            self._partly.setdefault(found.note, []).append(task.name)
        if found.outputs is not None and len(sources) > 2 and _exact(options):
            what = (
                f"solver: exact takes one or two models with output Gram matrices, not {len(sources)}; "
                "use solver: cg, or output_grams: false"
            )
            self._problems.setdefault(what, []).append(task.name)
        return found

    def _solve(
        self, options: SolveOptions, shape: tuple[int, ...], sources: Sequence[Source], name: str
    ) -> Solve | None:
        if options.method == "fisher":
            sums, note = self._gather("diagonal_fisher", sources, shape, name)
            return Solve(options, sums, None, False, note) if any(sums) else None
        if len(shape) == 1:
            sums, note = self._gather("block_fisher", sources, _triangle(shape[0]), name)
            return Solve(options, sums, None, False, note) if any(sums) else None
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
                    f"{each.key} of {header.statistics.path} has the shape {list(info.shape)}, {name} asks for {list(shape)}"
                )
            weight = self._weight_name(header.statistics, source.tensor)
            if weight in header.statistics.foreign:
                self._foreign.setdefault(source.model, []).append(weight)
        note = f"no {kind} in the statistics of {some_names(lacking)}" if lacking else ""
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
                f"statistics of other shapes than the models: {'; '.join(self._shapes[:_SHOWN])}{more}; "
                "these are statistics of another model"
            )
        for model, method in sorted(self._models.items()):
            problems += self._problems_of(model, method)
        for fallback, sizes in self._without.items():
            one = len(sizes) == 1
            notes.append(
                f"{len(sizes)} tensor{'' if one else 's'} ({sum(sizes):,} parameters) {'has' if one else 'have'} no "
                f"statistics; {'it becomes' if one else 'they become'} {_value_of(fallback)}"
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
                f"{statistics.path} was not collected on {header.reference}: the values of {some_names(foreign)} differ; "
                f"collect that model's (pymerge stats {header.reference} TEXTS --out FILE) and name them in the recipe"
            ]
        if model in self._used or self._shapes:
            return []
        kinds = sorted({key.partition("/")[0] for key in statistics.tensors})
        wanted = "diagonal_fisher" if method == "fisher" else "input_gram"
        if wanted in kinds:
            first = next(key for key in statistics.tensors if key.startswith(wanted))
            return [
                f"{statistics.path} knows no tensor of {header.reference} (it has {first.partition('/')[2]}, ...); "
                "these are statistics of another model, or of no data"
            ]
        return [
            f"{statistics.path} holds {', '.join(kinds) or 'nothing'} and merge_method {method} needs {wanted}; "
            f"collect it (pymerge stats {header.reference} TEXTS --kinds {wanted} --out FILE)"
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
