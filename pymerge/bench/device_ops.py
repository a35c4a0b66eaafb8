"""What `pymerge bench --device cuda` times beside `ties` on large tensors: many small tensors in
one call, and the vector updates of `mats`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pymerge.backends import registry
from pymerge.backends.cg.iteration import VectorUpdates
from pymerge.bench import cases
from pymerge.bench.places import Gpu
from pymerge.bench.timing import Timing
from pymerge.reference import ties as reference

SMALL_TENSORS, SMALL_SIZES, SMALL_MODELS = 300, (4096, 1024, 14336), 4  # norms and biases
LAYER = (2048, 2048)
FEW, MANY = 2, 8  # iterations, of whose times the difference is taken
MOVED = 11  # vectors that the updates of an iteration read and write

# (op, merge, family, models, elements, bytes, times)
Measured = tuple[str, str, str, int, int, int, Timing]


def measure(place: Gpu, backend: str, repeats: int) -> Iterator[Measured]:
    """Every row after its own correctness gate."""
    for op, rows in (("ties_many", _small), ("cg", _updates)):
        if backend in registry.TABLE[op]:
            yield from rows(place, backend, repeats)


def _small(place: Gpu, backend: str, repeats: int) -> Iterator[Measured]:
    family = cases.FAMILIES["bf16-spread"]
    whole = [
        cases.make(family, n, SMALL_MODELS, seed, place.device)
        for seed, n in enumerate(itertools.islice(itertools.cycle(SMALL_SIZES), SMALL_TENSORS))
    ]
    jobs = [(t.models, t.base, cases.rule_for(t), t.out) for t in whole]
    many = registry.load("ties_many", backend)
    many(jobs)
    for models, base, rule, out in jobs:
        want = torch.empty_like(out)
        reference.ties(models, base, rule, want)
        if not torch.equal(out, want):
            raise RuntimeError(
                f"backend {backend!r} differs from the reference in one of {SMALL_TENSORS} small"
                " tensors; nothing is timed"
            )
    nbytes = sum(t.bytes for t in whole)
    timing = place.alternate(lambda: many(jobs), place.copy_of(nbytes), repeats, out=whole[-1].out)
    elements = sum(t.n for t in whole)
    yield f"{SMALL_TENSORS} small", "ties", family.name, SMALL_MODELS, elements, nbytes, timing


def _updates(place: Gpu, backend: str, repeats: int) -> Iterator[Measured]:
    g = torch.Generator(place.device).manual_seed(0)
    weight = torch.rand((1, *LAYER), generator=g, device=place.device) + 0.5
    first = torch.randn((1, *LAYER), generator=g, device=place.device)
    images: list[torch.Tensor] = []  # of the directions, as plain torch finds them
    step = torch.zeros_like(first)

    def run(kind: type[VectorUpdates], iterations: int) -> VectorUpdates:
        enough = torch.zeros(1, dtype=torch.float64, device=place.device)
        r = first.clone()
        running = kind(step.zero_(), r, r, 0.0, None, enough)
        for i in range(iterations):
            if len(images) == i:
                images.append(running.p * weight)
            running.advance(images[i])
            running.turn(r)
        return running

    run(VectorUpdates, MANY)
    want = step.clone()
    kind = registry.vector_updates(place.device.type, backend)
    run(kind, MANY)
    apart = float((step - want).norm() / want.norm())
    if not apart < 1e-5:
        raise RuntimeError(
            f"backend {backend!r} differs from plain torch by {apart:.1e} after {MANY} iterations;"
            " nothing is timed"
        )
    nbytes = MOVED * first.nbytes
    few, many = (
        place.alternate(_call(run, kind, n), place.copy_of(nbytes), repeats, out=step)
        for n in (FEW, MANY)
    )
    p20, p50, p80 = (
        max(getattr(many, p) - getattr(few, p), 1e-6) / (MANY - FEW) for p in ("p20", "p50", "p80")
    )
    timing = Timing(p20, p50, p80, many.copy_ms)
    yield "cg updates", "mats", "fp32", 1, first.numel(), nbytes, timing


def _call(run: Any, kind: type[VectorUpdates], iterations: int) -> Callable[[], object]:
    return lambda: run(kind, iterations)
