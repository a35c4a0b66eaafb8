"""The streaming part of a merge of folders: makes every output tensor of the plan once, in the
order of the output, by the first executor that takes it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pymerge.backends import native
from pymerge.checkpoint.ahead import ReadAhead, Unit
from pymerge.checkpoint.contents import REPORTS
from pymerge.checkpoint.folder import OutputFolder
from pymerge.checkpoint.inputs import Inputs
from pymerge.checkpoint.layout import Shard
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.writer import BlockPool, ShardWriter, scratch
from pymerge.dtypes import MERGEABLE
from pymerge.engine.cpu import CpuExecutor
from pymerge.engine.executor import Executor, Made, TensorRules, loaded_units, read_ahead
from pymerge.engine.model_scope import rules_of
from pymerge.engine.non_finite import NonFiniteGuard
from pymerge.engine.observer import Observer
from pymerge.engine.sizes import SIZES, Sizes
from pymerge.engine.summary import MergeSummary, MethodSummary, merged_stats
from pymerge.errors import MismatchError
from pymerge.interrupt import check, on_calling_thread
from pymerge.messages.words import names_with_verb, some_names
from pymerge.planning.adapter_plan import factor_bytes
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.planning.solves import batches
from pymerge.rules.report import MatsReport, report_from, without_statistics

ShardDone = Callable[[Shard, dict[str, Any]], None]


@dataclass(frozen=True)
class _Step:
    """Consecutive tensors of one file that are made together.

    executors: of each tensor. together: for each executor, its tensors and the number of units that
        it reads for all of them first. own: number of units that each tensor reads.
    """

    tensors: tuple[int, ...]
    executors: tuple[Executor, ...]
    together: tuple[tuple[Executor, tuple[int, ...], int], ...]
    own: tuple[int, ...]


class MergeRun:
    """One merge of folders.

    observer: looks at the inputs, where there is one. notes: what was found in the data.
    reports: what happened to each tensor of a merge by statistics. gpu: the device, and the bytes
        of its memory to use; None computes on the CPU.
    """

    def __init__(
        self,
        plan: Plan,
        models: Sequence[OpenModel],
        folder: OutputFolder,
        summary: MergeSummary,
        threads: int,
        progress: Callable[[int, int, str], None] | None,
        gpu: tuple[Any, int] | None = None,
        sizes: Sizes = SIZES,
    ) -> None:
        self.summary = summary
        self.notes: list[str] = []
        self.reports: list[MatsReport] = []
        self.by_statistics = any(tensor.solve is not None for tensor in plan.tensors)
        self.reporting = self.by_statistics or any(
            tensor.options is not None and tensor.options.reports for tensor in plan.tensors
        )
        self._plan = plan
        self._models = models
        self._folder = folder
        self._threads = threads
        self._progress = progress
        self._gpu = gpu
        self._sizes = sizes
        self.observer: Observer | None = None
        self._lost_pages = native.lost_pages()
        self._stored = Inputs(models)
        self._guard = NonFiniteGuard(plan, models, self._stored, threads)
        self._pool = BlockPool(sizes.blocks, sizes.block, self._large)
        self._done_bytes = 0
        self._all_bytes = plan.bytes_read + plan.bytes_written
        self._methods: dict[str, MethodSummary] = {}
        # (dtype, models, the model that is copied) -> tensors that are copied and differ
        self._differing: dict[tuple[str, str, str], list[str]] = {}

    def skip(self, shard: Shard, entry: dict[str, Any]) -> None:
        """Account for a file that an earlier merge finished."""
        self.summary.resumed += 1
        for method, counts in entry["methods"].items():
            self.summary.methods.setdefault(method, MethodSummary()).include(counts)
        self.reports += [report_from(each) for each in entry.get("reports", ())]
        for index in shard.tensors:
            self._advance(self._plan.tensors[index])

    def shards(self, shards: Sequence[Shard], shard_done: ShardDone) -> None:
        """Make these files; `shard_done` is called as each is completed."""
        try:
            if shards or self.observer is not None:
                rules = rules_of(self._plan, self._stored, self._threads, self._large, self._sizes)
            else:
                rules = TensorRules(self._plan)
            if self.observer is not None:
                self.observer.begin(self._plan, self._models, self._stored, rules, self._sizes)
            executors = self._executors(rules)
            units: list[Unit] = []
            steps = [[*self._steps(shard, executors, units)] for shard in shards]
            with contextlib.ExitStack() as running:
                ahead = running.enter_context(read_ahead(units, self._large, self._sizes))
                for executor in executors:
                    own = [
                        index
                        for each in steps
                        for step in each
                        for index, by in zip(step.tensors, step.executors, strict=True)
                        if by is executor
                    ]
                    running.enter_context(executor.running(own))
                for shard, each in zip(shards, steps, strict=True):
                    shard_done(shard, self._shard(shard, each, ahead))
            for (dtype, others, owner), names in self._differing.items():
                self.notes.append(
                    f"{names_with_verb(names, 'differs', 'differ')} in {others} ({dtype}, which is"
                    " not"
                    f" merged); taken from {owner}"
                )
            self.notes += self._guard.notes()
            for executor in executors:
                self.notes += executor.notes()
        finally:
            self._pool.close()

    def observe_the_rest(self) -> None:
        """Let the observer read what it did not see."""
        if self.observer is not None:
            self.observer.finish()

    def check_inputs(self) -> None:
        """Raise CheckpointError where an input changed since it was opened: what was read from it
        is then unreliable.
        """
        for model in self._models:
            model.check()

    def write_reports(self) -> None:
        """Write the report of what was solved, as text and as JSON, and note its warnings."""
        from pymerge.ops.mats import report

        place = {tensor.name: index for index, tensor in enumerate(self._plan.tensors)}
        reports = sorted(self.reports, key=lambda report: place[report.name])
        table, data = REPORTS
        self._folder.write_text(table, report.as_table(reports) + "\n")
        self._folder.write_text(data, report.as_json(reports) + "\n")
        self.notes += report.warnings_of(reports)

    def _executors(self, rules: TensorRules) -> list[Executor]:
        """The executors, in the order in which they are asked. Those for statistics and for a GPU
        import torch.
        """
        found: list[Executor] = []
        device, memory = self._gpu or (None, 0)
        if any(tensor.factor is not None for tensor in self._plan.tensors):
            factors = importlib.import_module("pymerge.engine.adapter_merge")
            found.append(factors.AdapterExecutor(self._plan, self._models, self._threads))
        if self.by_statistics:
            solve_on = None
            if device is not None:
                # Solving and the pipeline share the memory.
                share = memory // 2
                memory -= share
                solving = importlib.import_module("pymerge.engine.gpu.solve")
                solve_on = solving.DeviceSolver(device, share)
            by_statistics = importlib.import_module("pymerge.engine.by_statistics")
            found.append(
                by_statistics.StatisticsExecutor(
                    self._plan, self._models, self._threads, self._sizes.fisher_chunk, solve_on
                )
            )
        if device is not None:
            gpu = importlib.import_module("pymerge.engine.gpu.executor")
            found.append(
                gpu.GpuExecutor(
                    self._plan, self._stored, rules, self._threads, self._large, device, memory
                )
            )
        references = [model.reference for model in self._models]
        found.append(
            CpuExecutor(self._plan, references, self._stored, rules, self._threads, self._sizes)
        )
        return found

    def _steps(
        self, shard: Shard, executors: Sequence[Executor], units: list[Unit]
    ) -> Iterator[_Step]:
        """The steps of a file, those tensors that are solved together in one; appends their units
        to `units` in reading order.
        """
        pieces: Iterator[Sequence[int]] = iter([shard.tensors])
        if self.by_statistics:
            needs = [tensor.solve_memory for tensor in self._plan.tensors]
            pieces = batches(needs, shard.tensors, self._sizes.window)
        for piece in pieces:
            by = [next(each for each in executors if each.takes(index)) for index in piece]
            together = []
            for executor in executors:
                own = tuple(
                    index for index, each in zip(piece, by, strict=True) if each is executor
                )
                first = executor.together(own)
                units += first
                together.append((executor, own, len(first)))
            counts = []
            for index, executor in zip(piece, by, strict=True):
                each = executor.units(index)
                units += each
                counts.append(len(each))
            yield _Step(tuple(piece), tuple(by), tuple(together), tuple(counts))

    def _shard(self, shard: Shard, steps: Sequence[_Step], ahead: ReadAhead) -> dict[str, Any]:
        self._methods = {}
        reported = len(self.reports)
        with _writing(self._folder, shard, self._pool) as writer:
            for step in steps:
                for executor, own, count in step.together:
                    executor.begin(own, loaded_units(ahead, count))
                for index, executor, count in zip(
                    step.tensors, step.executors, step.own, strict=True
                ):
                    reads = loaded_units(ahead, count)
                    if self.observer is not None:
                        reads = self.observer.watch(index, reads)
                    made = executor.make(index, reads, writer)
                    self._account(index, made, writer)
            self.check_inputs()
            sha256 = writer.finish()
        self._guard.outputs(writer.non_finite, end=max(shard.tensors, default=-1) + 1)
        for index in shard.tensors:
            tensor = self._plan.tensors[index]
            self._methods[tensor.method].non_finite_out += writer.non_finite.get(tensor.name, 0)
        for name, method in self._methods.items():
            self.summary.methods.setdefault(name, MethodSummary()).include(vars(method))
        methods = {name: dict(vars(method)) for name, method in self._methods.items()}
        entry = {"bytes": shard.nbytes, "sha256": sha256, "methods": methods}
        if self.reporting:
            entry["reports"] = [each.as_dict() for each in self.reports[reported:]]
        return entry

    def _account(self, index: int, made: Made, writer: ShardWriter) -> None:
        """Check and count a finished tensor."""
        tensor = self._plan.tensors[index]
        report = made.report
        for stats in made.stats:
            if stats.report is not None:
                report = replace(stats.report, name=tensor.name)
        if report is None and self.by_statistics and tensor.dtype in MERGEABLE:
            report = without_statistics(tensor.name, tensor.method)
        if report is not None:
            self.reports.append(report)
        if native.lost_pages() != self._lost_pages:
            self.check_inputs()  # rather than at the end of the file
        total = merged_stats(made.stats) if made.stats else None
        self._check(tensor, made.different)
        if total is not None:
            self._guard.task_vectors(index, total)
        self._guard.outputs(writer.non_finite)
        counted = self._methods.setdefault(tensor.method, MethodSummary())
        counted.add(tensor.elements, total)
        if tensor.solve is not None:
            counted.solved += 1
            counted.non_finite += made.non_finite
        self.summary.bytes_read += self._read_bytes(tensor)
        self.summary.bytes_written += tensor.nbytes
        self._advance(tensor)

    def _read_bytes(self, tensor: PlannedTensor) -> int:
        read = sum(self._stored(source).nbytes for source in tensor.inputs)
        if tensor.factor is not None and tensor.factor.which == "A":
            read += factor_bytes(tensor.factor, self._models)
        return read if tensor.solve is None else read + tensor.solve.nbytes

    def _advance(self, tensor: PlannedTensor) -> None:
        self._done_bytes += self._read_bytes(tensor) + tensor.nbytes
        check()
        if self._progress is not None:
            done = (self._done_bytes, self._all_bytes, tensor.name)
            on_calling_thread(functools.partial(self._progress, *done))

    def _check(self, tensor: PlannedTensor, different: set[str]) -> None:
        """Raise or note, as the plan says, that a copied tensor differs between models."""
        if not different:
            return
        owner = self._models[tensor.sources[0].model].reference
        stored = self._stored(tensor.sources[0]).info.dtype
        if tensor.strict:
            raise MismatchError(
                f"tensor {tensor.name} is {stored} and differs between {owner} and"
                f" {some_names(sorted(different))}; {stored} can be copied but not merged. Convert"
                " the models to bfloat16"
            )
        key = (stored, some_names(sorted(different)), owner)
        self._differing.setdefault(key, []).append(tensor.name)

    def _large(self, nbytes: int) -> Region:
        """Memory for a whole tensor: anonymous where it is small, else of an unnamed file."""
        if nbytes <= self._sizes.anonymous:
            return Region.anonymous(nbytes)
        return scratch(self._folder.partial, nbytes)


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
