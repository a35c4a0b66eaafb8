"""The streaming part of a merge: every output tensor of the plan computed once, in the order of the
output.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pymerge.checkpoint.ahead import (
    RING,
    Loaded,
    ReadAhead,
    Unit,
    copy_bytes,
    same_bytes,
)
from pymerge.checkpoint.folder import OutputFolder
from pymerge.checkpoint.inputs import Inputs
from pymerge.checkpoint.layout import Shard
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import Source
from pymerge.checkpoint.writer import BLOCK, BlockPool, ShardWriter, scratch
from pymerge.dtypes import BITS, MERGEABLE, elements, item_size
from pymerge.engine.non_finite import Watch
from pymerge.engine.summary import MergeSummary, MethodSummary, merged_stats
from pymerge.errors import MismatchError
from pymerge.interrupt import check, on_calling_thread
from pymerge.messages.words import some_names
from pymerge.planning.plan import FISHER_CHUNK, Plan, PlannedTensor
from pymerge.planning.solves import batches
from pymerge.planning.tensor_names import said_of
from pymerge.rules.ties import TiesRule, TiesStats

Buffer = tuple[int, str]
_SMALL = 1 << 20  # bytes that are not worth a file
ShardDone = Callable[[Shard, dict[str, Any]], None]


class Run:
    """One merge. `notes` fills with what was seen in the data."""

    def __init__(
        self,
        plan: Plan,
        models: Sequence[OpenModel],
        folder: OutputFolder,
        summary: MergeSummary,
        threads: int,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.summary = summary
        self.notes: list[str] = []
        self._plan = plan
        self._models = models
        self._folder = folder
        self._threads = threads
        self._progress = progress
        self._native = importlib.import_module("pymerge.backends.native")
        self._lost_pages = self._native.lost_pages()
        self._stored = Inputs(models)
        self._watch = Watch(plan, models, self._stored, threads)
        self._pool = BlockPool()
        self._done_bytes = 0
        self._all_bytes = plan.bytes_read + plan.bytes_written
        self._held: list[Region] = []
        self._whole: TiesRule | None = None  # the rule over all tensors, where the scope is "model"
        self._methods: dict[str, MethodSummary] = {}
        # (dtype, models, the model that is copied) -> tensors that are copied and differ
        self._differing: dict[tuple[str, str, str], list[str]] = {}
        self.solver: Any = None  # pymerge.engine.solver.Solver, where anything is solved
        if any(tensor.solve is not None for tensor in plan.tensors):
            self.solver = self._new_solver()

    def skip(self, shard: Shard, entry: dict[str, Any]) -> None:
        """Account for a file that an earlier run finished."""
        self.summary.resumed += 1
        for method, counts in entry["methods"].items():
            self.summary.methods.setdefault(method, MethodSummary()).include(counts)
        if self.solver is not None:
            self.solver.restore(entry.get("reports", ()))
        for index in shard.tensors:
            self._advance(self._plan.tensors[index])

    def shards(self, shards: Sequence[Shard], shard_done: ShardDone) -> None:
        """Make these files; `shard_done` is called as each is complete."""
        try:
            if shards:
                self._prepare_model_scope()
                self._let_go()
            units = [
                unit
                for shard in shards
                for batch in self._batches(shard)
                for unit in self._batch_units(batch)
            ]
            with ReadAhead(units, self._large) as ahead, self._beside(shards):
                for shard in shards:
                    shard_done(shard, self._shard(shard, ahead))
            for (dtype, others, owner), names in self._differing.items():
                self.notes.append(
                    f"{said_of(names, 'differs', 'differ')} in {others} ({dtype}, which is not"
                    f" merged); taken from {owner}"
                )
            self.notes += self._watch.notes()
            if self.solver is not None:
                self.notes += self.solver.notes()
        finally:
            self._let_go()
            self._pool.close()

    def _let_go(self) -> None:
        """Give back what was held to find what holds for all tensors."""
        for region in self._held:
            region.close()
        self._held.clear()

    def check_inputs(self) -> None:
        """Raise CheckpointError where an input is not what it was at first: what was read of it is
        worth nothing then.
        """
        for model in self._models:
            model.check()

    def _shard(self, shard: Shard, ahead: ReadAhead) -> dict[str, Any]:
        self._methods = {}
        reported = 0 if self.solver is None else len(self.solver.reports)
        with _writing(self._folder, shard, self._pool) as writer:
            for batch in self._batches(shard):
                solved = {} if self.solver is None else self.solver.solve(batch, ahead)
                for index in batch:
                    self._tensor(index, writer, ahead, solved)
            self.check_inputs()
            sha256 = writer.finish()
        self._watch.outputs(writer.non_finite, end=max(shard.tensors, default=-1) + 1)
        for index in shard.tensors:
            tensor = self._plan.tensors[index]
            self._methods[tensor.method].non_finite_out += writer.non_finite.get(tensor.name, 0)
        for name, method in self._methods.items():
            self.summary.methods.setdefault(name, MethodSummary()).include(vars(method))
        methods = {name: dict(vars(method)) for name, method in self._methods.items()}
        entry = {"bytes": shard.nbytes, "sha256": sha256, "methods": methods}
        if self.solver is not None:
            entry["reports"] = [each.as_dict() for each in self.solver.reports[reported:]]
        return entry

    def _batches(self, shard: Shard) -> Iterator[Sequence[int]]:
        """The tensors of a file in their order; those of a batch that are solved are solved
        together.
        """
        if self.solver is None:
            return iter([shard.tensors])
        return batches(self._plan.tensors, shard.tensors)

    def _batch_units(self, batch: Sequence[int]) -> Iterator[Unit]:
        solved: set[int] = set()
        for part in [] if self.solver is None else self.solver.parts(batch):
            solved.add(part.index)
            yield part.unit
        for index in batch:
            if index not in solved and not self._is_elsewhere(index):
                yield from self._units(index)

    # What a run that computes elsewhere than on the CPU replaces.

    def _new_solver(self) -> Any:
        """What merges by statistics; imports torch."""
        solve = importlib.import_module("pymerge.engine.solver")
        return solve.Solver(self._plan, self._models, self._threads)

    def _beside(self, shards: Sequence[Shard]) -> contextlib.AbstractContextManager[object]:
        """What runs while these files are made."""
        return contextlib.nullcontext()

    def _is_elsewhere(self, index: int) -> bool:
        """Whether `_from_elsewhere` makes this tensor."""
        return False

    def _from_elsewhere(self, index: int, writer: ShardWriter) -> list[TiesStats]:
        """Write a tensor; returns the counts of its parts. Called in the order of the output."""
        raise NotImplementedError

    def _tensor(
        self, index: int, writer: ShardWriter, ahead: ReadAhead, solved: Mapping[int, Any]
    ) -> None:
        tensor = self._plan.tensors[index]
        stats: list[TiesStats] = []
        different: set[str] = set()
        rule = self._rule(tensor)
        if index in solved:
            slot = writer.slot(tensor.nbytes)
            copy_bytes(slot.address, solved[index].data_ptr(), tensor.nbytes)
            writer.done(slot, (tensor.name, tensor.dtype))
        elif self._is_elsewhere(index):
            stats += self._from_elsewhere(index, writer)
        for unit in () if index in solved or self._is_elsewhere(index) else self._units(index):
            loaded = ahead.next()
            slot = writer.slot(unit.count * tensor.nbytes // max(1, tensor.elements))
            if tensor.solve is not None:
                self.solver.fisher(index, loaded, slot.view)
            elif rule is None:
                copy_bytes(slot.address, loaded.addresses[0], len(slot.view))
                different |= self._twins(tensor, loaded)
            else:
                stats.append(self._ties(tensor, rule, loaded, (slot.address, tensor.dtype)))
            writer.done(slot, (tensor.name, tensor.dtype))
            ahead.give_back(loaded)
        if self.solver is not None and tensor.solve is None and tensor.dtype in MERGEABLE:
            self.solver.without(tensor)
        if self._native.lost_pages() != self._lost_pages:
            self.check_inputs()  # no need to go on to the end of the file
        total = merged_stats(stats) if stats else None
        self._check(tensor, different)
        if total is not None:
            self._watch.task_vectors(index, total)
        self._watch.outputs(writer.non_finite)
        counted = self._methods.setdefault(tensor.method, MethodSummary())
        counted.add(tensor.elements, total)
        if tensor.solve is not None:
            counted.solved += 1
            counted.non_finite += self.solver.non_finite.get(index, 0)
        self.summary.bytes_read += self._read_bytes(tensor)
        self.summary.bytes_written += tensor.nbytes
        self._advance(tensor)

    def _ties(
        self, tensor: PlannedTensor, rule: TiesRule, loaded: Loaded, out: Buffer
    ) -> TiesStats:
        buffers = [
            (address, stored.info.dtype)
            for address, (stored, _, _) in zip(loaded.addresses, loaded.unit.inputs, strict=True)
        ]
        count = loaded.unit.count
        models = len(tensor.sources)
        if rule.trim == "none":
            rule = replace(rule, ranks=(count,) * models)
        base = buffers[models] if tensor.base is not None else None
        stats: TiesStats = self._native.ties(
            buffers[:models], base, out, count, rule, self._threads
        )
        return stats

    def _rule(self, tensor: PlannedTensor) -> TiesRule | None:
        if tensor.options is None:
            return None
        rule = tensor.options.rule(tensor.elements, tensor.key_name)
        if tensor.options.scope == "model" and self._whole is not None:
            return replace(self._whole, key=rule.key)
        return rule

    def _units(self, index: int) -> list[Unit]:
        """A tensor as a whole, or in parts where every element stands for itself."""
        tensor = self._plan.tensors[index]
        if tensor.solve is not None:
            chunks: list[Unit] = self.solver.chunks(index)
            return chunks
        inputs = [self._stored(source) for source in tensor.inputs]
        rule = self._rule(tensor)
        widest = max(
            [item_size(tensor.dtype), *(item_size(stored.info.dtype) for stored in inputs)]
        )
        step = max(1, tensor.elements)
        narrow = any(BITS[stored.info.dtype] < 8 for stored in inputs)
        if not narrow and (rule is None or is_elementwise(rule)):
            step = BLOCK // widest
            copied = sum(item_size(stored.info.dtype) for stored in inputs if stored.copies)
            if copied:
                step = min(step, RING // 3 // copied)
            step = max(64, step - step % 64)
        units = []
        for begin in range(0, max(1, tensor.elements), step):
            count = min(step, tensor.elements - begin)
            parts = tuple((stored, *_part(stored, begin, count)) for stored in inputs)
            units.append(Unit(index, begin, count, parts))
        return units

    def _reference(self, source: Source) -> str:
        return self._models[source.model].reference

    def _read_bytes(self, tensor: PlannedTensor) -> int:
        read = sum(self._stored(source).nbytes for source in tensor.inputs)
        return read if tensor.solve is None else read + tensor.solve.nbytes

    def _advance(self, tensor: PlannedTensor) -> None:
        self._done_bytes += self._read_bytes(tensor) + tensor.nbytes
        check()
        if self._progress is not None:
            done = (self._done_bytes, self._all_bytes, tensor.name)
            on_calling_thread(functools.partial(self._progress, *done))

    # What the data may show.

    def _twins(self, tensor: PlannedTensor, loaded: Loaded) -> set[str]:
        """The models that hold other values."""
        inputs = zip(loaded.addresses, loaded.unit.inputs, strict=True)
        first, *others = [(at, stored.info.dtype, size) for at, (stored, _, size) in inputs]
        return {
            self._reference(source)
            for source, other in zip(tensor.twins, others, strict=True)
            if not _are_same(first, other)
        }

    def _check(self, tensor: PlannedTensor, different: set[str]) -> None:
        owner = self._reference(tensor.sources[0])
        stored = self._stored(tensor.sources[0]).info.dtype
        if different and tensor.strict:
            raise MismatchError(
                f"tensor {tensor.name} is {stored} and differs between {owner} and"
                f" {some_names(sorted(different))}; {stored} can be copied but not merged. Convert"
                " the models to bfloat16"
            )
        if different:
            key = (stored, some_names(sorted(different)), owner)
            self._differing.setdefault(key, []).append(tensor.name)

    # Scope "model" (T7): what is to be known before the first tensor is made.

    def _prepare_model_scope(self) -> None:
        scoped = [
            index
            for index, tensor in enumerate(self._plan.tensors)
            if tensor.options is not None and tensor.options.scope == "model"
        ]
        if not scoped:
            return
        options = self._plan.tensors[scoped[0]].options
        if options is None:
            return
        whole = options.rule(sum(self._plan.tensors[index].elements for index in scoped))
        if options.trim in ("magnitude", "outliers"):
            segments = [self._segment(self._plan.tensors[index]) for index in scoped]
            select = self._native.select
            whole = whole.with_known(thresholds=tuple(select(segments, whole.ranks, self._threads)))
            if options.trim == "outliers":
                above = [drop + 1 for drop in whole.dropped]
                segments.append(self._one_zero(*segments[0]))
                whole = whole.with_known(bounds=tuple(select(segments, above, self._threads)))
        self._whole = whole
        if options.elect != "none" and options.zero_sign == "majority":
            self._whole = whole.with_known(majority=1)
            self._whole = whole.with_known(majority=self._count_majority(scoped))

    def _segment(self, tensor: PlannedTensor) -> tuple[list[Buffer], Buffer | None, int]:
        models = [self._whole_buffer(source) for source in tensor.sources]
        base = None if tensor.base is None else self._whole_buffer(tensor.base)
        return models, base, tensor.elements

    def _one_zero(
        self, models: Sequence[Buffer], base: Buffer | None, _: int
    ) -> tuple[list[Buffer], Buffer | None, int]:
        """A further segment of one element, 0: the rank of the last of the others, for which
        `select` gives 0, is then not the last, and no other rank is another's.
        """
        region = Region.anonymous(8)
        self._held.append(region)
        return (
            [(region.address, dtype) for _, dtype in models],
            None if base is None else (region.address, base[1]),
            1,
        )

    def _whole_buffer(self, source: Source) -> Buffer:
        check()
        stored = self._stored(source)
        if not stored.copies:
            return stored.address(), stored.info.dtype
        region = self._large(stored.nbytes)
        self._held.append(region)
        stored.read_into(0, region.view())
        return region.address, stored.info.dtype

    def _count_majority(self, scoped: Sequence[int]) -> int:
        """A pass that only counts signs: its outputs go to a scratch file."""
        balance = 0
        units = [unit for index in scoped for unit in self._units(index)]
        widest = max(
            unit.count * item_size(self._plan.tensors[unit.tensor].dtype) for unit in units
        )
        with (
            contextlib.closing(self._large(max(1, widest))) as unused,
            ReadAhead(units, self._large) as ahead,
        ):
            for unit in units:
                tensor = self._plan.tensors[unit.tensor]
                rule = self._rule(tensor)
                loaded = ahead.next()
                if rule is not None:
                    stats = self._ties(tensor, rule, loaded, (unused.address, tensor.dtype))
                    balance += stats.positive - stats.negative
                ahead.give_back(loaded)
        return 1 if balance > 0 else -1

    def _large(self, nbytes: int) -> Region:
        """Memory for a tensor as a whole."""
        return (
            Region.anonymous(nbytes) if nbytes <= _SMALL else scratch(self._folder.partial, nbytes)
        )


def scratch_bytes(plan: Plan, stored: Callable[[Source], StoredTensor]) -> int:
    """Room on the disk for inputs that are needed as a whole, where they are read or do not lie so
    in a file.
    """
    needs, together = [0], 0
    for tensor in plan.tensors:
        inputs = [stored(source) for source in tensor.inputs]
        need = sum(each.nbytes for each in inputs if each.copies)
        if tensor.solve is not None:
            need += tensor.solve.nbytes if need else 0
            if tensor.solve.in_chunks:
                need = need * min(FISHER_CHUNK, tensor.elements) // max(1, tensor.elements)
        elif tensor.options is None or is_elementwise(tensor.options.rule(tensor.elements)):
            continue
        elif tensor.options.scope == "model":
            together += sum(each.nbytes for each in inputs if each.copies)
        needs.append(need)
    return max(*needs, together)


def is_elementwise(rule: TiesRule) -> bool:
    """Whether an output element depends on nothing but its own inputs, so that a tensor can be cut
    anywhere.
    """
    known = rule.trim == "none" or (
        rule.thresholds is not None and (rule.trim == "magnitude" or rule.bounds is not None)
    )
    elected = rule.elect == "none" or rule.zero_sign == "positive" or rule.majority != 0
    return rule.trim != "random" and known and elected and rule.rescale in ("none", "density")


def _are_same(one: tuple[int, str, int], other: tuple[int, str, int]) -> bool:
    """Whether an input, (address, dtype, bytes), is another one, in whatever dtype both are."""
    if one[1] == other[1]:
        return same_bytes(one[0], other[0], one[2])
    same: bool = importlib.import_module("pymerge.checkpoint.gather").same_values(one, other)
    return same


def _part(stored: StoredTensor, begin: int, count: int) -> tuple[int, int]:
    """First byte and bytes of some elements; of all of them where they are narrower than a byte."""
    total = elements(stored.info.shape)
    if count == total:
        return 0, stored.nbytes
    size = item_size(stored.info.dtype)
    return begin * size, count * size


@contextlib.contextmanager
def _writing(folder: OutputFolder, shard: Shard, pool: BlockPool) -> Iterator[ShardWriter]:
    path = folder.partial / shard.file
    create = functools.partial(folder.create, shard.file)
    writer = ShardWriter(path, shard.header, shard.nbytes, pool, create)
    try:
        yield writer
    except BaseException:
        writer.abort()
        folder.remove(shard.file)
        raise
