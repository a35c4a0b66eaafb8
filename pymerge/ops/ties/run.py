"""Calls of a backend of `ties` on checked tensors, and what is made of their counts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from pymerge.backends import registry
from pymerge.errors import NonFiniteError
from pymerge.messages.arguments import argument, of_model, takes
from pymerge.messages.words import some_names
from pymerge.rules.options import Counts
from pymerge.rules.ties import TiesOptions, TiesRule, TiesStats

Segment = tuple[Sequence[torch.Tensor], "torch.Tensor | None"]
# A tensor that is merged: its name, the models', the base's, the output.
TensorCall = tuple[str, Sequence[torch.Tensor], "torch.Tensor | None", torch.Tensor]
# What a backend is called with: the models', the base's, the rule, the output.
Job = tuple[Sequence[torch.Tensor], "torch.Tensor | None", TiesRule, torch.Tensor]

# Elements merged with one call on a GPU: enough to fill it, while scratch memory stays small beside
# the models.
_TOGETHER = 1 << 26


def run_tensor(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    options: TiesOptions,
    rule: TiesRule,
    out: torch.Tensor,
    backend: str,
    name: str = "",
) -> TiesStats | None:
    """Merge one tensor on the chosen backend. Returns its counts, or None on a GPU where nobody
    waits for them.
    """
    function = pick(options, out.device.type, backend)
    return _counts(function(models, base, rule, out), options, rule, out, name)


def pick(options: TiesOptions, device: str, backend: str) -> Any:
    """The backend's function for these options."""
    if options.trim == "magprune":
        return registry.pick_or_reference("magprune", device, backend, "trim 'magprune'")[1]
    return registry.pick("ties", device, backend)[1]


def _counts(
    stats: Any, options: TiesOptions, rule: TiesRule, out: torch.Tensor, name: str
) -> TiesStats | None:
    """A backend's counts once they are on the host; None where nobody asks. Raises for non-finite
    inputs (N3).
    """
    needed = options.non_finite == "error" or (
        options.zero_sign == "majority" and rule.majority != 0
    )
    if not isinstance(stats, TiesStats):
        if not needed:
            return None
        stats = stats.resolve()
    assert isinstance(stats, TiesStats)
    if options.non_finite == "error" and any(stats.non_finite):
        refuse_non_finite(stats, out.numel(), name)
    return stats


def refuse_non_finite(stats: Counts, elements: int, name: str) -> NoReturn:
    """Raise for the non-finite task vector elements that were counted (N3)."""
    where = f" of tensor {name!r}" if name else ""
    counts = some_names(
        f"{of_model('models', k)}: {c}" for k, c in enumerate(stats.non_finite) if c
    )
    way_out = "mend or leave out what holds them"
    if takes("non_finite"):
        way_out += f", or pass {argument('non_finite', 'allow')} to let them through"
    raise NonFiniteError(
        f"NaN or infinite task vector elements{where} ({counts}, of {elements}); {way_out}"
    )


def run_all(
    calls: Sequence[TensorCall], rules: Sequence[TiesRule], options: TiesOptions, backend: str
) -> Iterator[TiesStats | None]:
    """The counts of every tensor. On a GPU, tensors are merged many to a launch, and nothing waits
    before all are enqueued.
    """
    jobs = [
        (tensors, base, rule, target)
        for (_, tensors, base, target), rule in zip(calls, rules, strict=True)
    ]
    passed = run_jobs(jobs, options, backend)
    for (name, *_, target), rule, stats in zip(calls, rules, passed, strict=True):
        yield _counts(stats, options, rule, target, name)


def run_jobs(jobs: Sequence[Job], options: TiesOptions, backend: str) -> Iterator[Any]:
    """What the backend says of each job: its counts, or on a GPU a promise of them. A job is done
    when its counts are asked for, or before.
    """
    kinds = {target.device.type for *_, target in jobs}
    picked = {kind: pick(options, kind, backend) for kind in kinds}
    if len(kinds) != 1 or not hasattr(_module(*picked.values()), "ties_many"):
        for tensors, base, rule, target in jobs:
            yield picked[target.device.type](tensors, base, rule, target)
        return
    together = _module(*picked.values()).ties_many
    pending: list[Any] = []
    begin = elements = 0
    for end, (*_, target) in enumerate(jobs, 1):
        elements += target.numel()
        if elements >= _TOGETHER or end == len(jobs):
            pending += together(jobs[begin:end])
            begin, elements = end, 0
    yield from pending


def _module(function: Any) -> Any:
    return sys.modules[function.__module__]


def zero_like(segment: Segment) -> list[Segment]:
    """A segment of one element, 0."""
    tensors, base = segment
    return [([x.new_zeros(1) for x in tensors], None if base is None else base.new_zeros(1))]
