"""NaN and infinity in a merge of folders: which models have them, and which the recipe lets
through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pymerge.backends import native
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import Source
from pymerge.checkpoint.writer import BLOCK
from pymerge.dtypes import MERGEABLE, item_size
from pymerge.errors import NonFiniteError
from pymerge.messages.arguments import argument, takes
from pymerge.messages.words import counted, some_names
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.rules.options import Counts

# Bytes of the affected models that are searched for more before the error is raised.
_FURTHER = 4 << 30


def _or_let_through() -> str:
    if not takes("allow_non_finite"):
        return ""
    return f", or let them through ({argument('allow_non_finite', True)})"


class NonFiniteGuard:
    """Receives the counts of each tensor as it is merged. Raises NonFiniteError, or remembers what
    the recipe lets through.
    """

    def __init__(
        self,
        plan: Plan,
        models: Sequence[OpenModel],
        stored: Callable[[Source], StoredTensor],
        threads: int,
    ) -> None:
        self._plan = plan
        self._models = models
        self._stored = stored
        self._threads = threads
        self._index = {tensor.name: index for index, tensor in enumerate(plan.tensors)}
        self._task_vectors: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        # Overflow of finite models that the recipe does not allow
        self._overflowed: dict[str, int] = {}

    def task_vectors(self, index: int, stats: Counts) -> None:
        """Check one tensor's counts, before any of its output is kept."""
        tensor = self._plan.tensors[index]
        if not any(stats.non_finite):
            return
        if tensor.non_finite == "error":
            found, count = self._inputs(tensor), sum(stats.non_finite)
            raise NonFiniteError(
                self._damaged(index, found)
                if found
                else (
                    f"tensor {tensor.name}: {counted(count, 'difference')} from the base"
                    f" overflow{'s' * (count == 1)} to infinity, though every model is finite;"
                    f" leave out the model{_or_let_through()}"
                )
            )
        self._task_vectors[tensor.name] = sum(stats.non_finite)

    def outputs(self, found: Mapping[str, int], end: int | None = None) -> None:
        """Check the non-finite elements of the outputs so far, by tensor name.

        end: where a file is complete, the place of the first tensor after it. Overflow is reported
            only then, so that the message counts all of it in the file.
        """
        for name, elements in list(found.items()):
            index = self._index[name]
            tensor = self._plan.tensors[index]
            if tensor.non_finite != "error":
                self._outputs[name] = elements
            elif name not in self._overflowed:
                inputs = self._inputs(tensor)
                if inputs:
                    raise NonFiniteError(self._damaged(index, inputs))
                self._overflowed[name] = elements
        if end is not None and self._overflowed:
            raise NonFiniteError(self._overflow(len(self._plan.tensors) - end))

    def notes(self) -> list[str]:
        """Notes on what was let through."""
        return [
            f"{sum(found.values())} {what} are NaN or infinite, in {len(found)} tensor"
            f"{'' if len(found) == 1 else 's'}: {some_names(found)}"
            for what, found in (
                ("task vector elements", self._task_vectors),
                ("elements of the result", self._outputs),
            )
            if found
        ]

    def _overflow(self, later: int) -> str:
        """The error for outputs that overflow. later: how many tensors were not made yet."""
        found = self._overflowed
        dtypes = sorted({self._plan.tensors[self._index[name]].dtype for name in found})
        wide = (
            "choose a dtype with a wider range (dtype: bfloat16 or float32)"
            if dtypes == ["float16"]
            else "choose smaller weights"
        )
        rest = f" (later files, with {later} more, were not made)" if later else ""
        total = sum(found.values())
        return (
            f"tensor{'s' * (len(found) > 1)} {some_names(found)}{rest}:"
            f" {counted(total, 'value')} of the result overflow{'s' * (total == 1)}"
            f" {' and '.join(dtypes)} to infinity, though every model"
            f" is finite; {wide}{_or_let_through()}"
        )

    def _damaged(self, index: int, found: Mapping[int, int]) -> str:
        """The error for non-finite inputs: the tensor, its models, and how much more these hold."""
        tensor = self._plan.tensors[index]
        blamed = some_names(f"{n} in {self._models[m].reference}" for m, n in found.items())
        more, seen, left = [], 0, _FURTHER
        for other in self._plan.tensors[index + 1 :]:
            sources = [s for s in other.inputs if s.model in found]
            left -= sum(self._stored(source).nbytes for source in sources)
            if left < 0:
                break
            seen += 1
            if any(map(self._in_source, sources)):
                more.append(other.name)
        all_seen = index + 1 + seen == len(self._plan.tensors)
        after = "the tensors" if all_seen else f"the {counted(seen, 'tensor')}"
        also = f" (and {len(more)} of {after} after it: {some_names(more)})" if more else ""
        return (
            f"tensor {tensor.name} holds NaN or infinite values: {blamed}{also}; mend or leave out"
            f" the model{_or_let_through()}"
        )

    def _inputs(self, tensor: PlannedTensor) -> dict[int, int]:
        """Model -> number of non-finite elements, for the models that have any."""
        found: dict[int, int] = {}
        for source in tensor.inputs:
            count = self._in_source(source)
            if count:
                found[source.model] = found.get(source.model, 0) + count
        return found

    def _in_source(self, source: Source) -> int:
        return count_non_finite(self._stored(source), self._threads)


def count_non_finite(stored: StoredTensor, threads: int) -> int:
    """Number of NaN and infinite elements of a tensor; reads all of it."""
    dtype = stored.info.dtype
    if dtype not in MERGEABLE:
        return 0
    count = native.count_non_finite
    size = item_size(dtype)
    if not stored.copies:
        return count((stored.address(), dtype), stored.nbytes // size, threads)
    total = 0
    region = Region.anonymous(BLOCK)
    try:
        for begin in range(0, stored.nbytes, BLOCK):
            length = min(BLOCK, stored.nbytes - begin)
            stored.read_into(begin, region.view(0, length))
            total += count((region.address, dtype), length // size, threads)
    finally:
        region.close()
    return total
