"""The backends that the spec suite runs on, and what it asks of them: the reference's bits and
counts.

Without a GPU the CUDA kernels are emulated on the host ("emulated"), and the Triton kernels run
where TRITON_INTERPRET=1 says
so, which counts when a kernel is defined: tests/backends/test_interpreted.py runs the suite again in
such a process. Both take smaller tensors.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Sequence

import torch
from ties_cases import same_bits

import pymerge
from pymerge.backends import cuda, native, registry
from pymerge.rules.ties import TiesStats, resolve_options

CPU_LEVELS = [level for level, usable in native.cpu_levels().items() if usable]
# Every level at two threads; the number of threads changes no code that the level changes, so the
# best one alone is run at one and three, too.
FAST = [f"cpu-{level}-2" for level in CPU_LEVELS]
FAST += [f"cpu-{level}-{threads}" for level in CPU_LEVELS[-1:] for threads in (1, 3)]
FAST += [name for name in ("cuda", "triton") if registry.why_not(name) is None]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "cuda" not in FAST and not INTERPRETED and shutil.which("c++") is not None
FAST += ["emulated"] * EMULATED


class Backend:
    """A backend as the tests see it: pinned level and threads, outputs NaN-filled before the
    call.
    """

    def __init__(self, spec: str) -> None:
        self.name, *detail = spec.split("-")
        self.threads = int(detail[1]) if detail else 0
        self.on_a_device = self.name in ("cuda", "triton") and not INTERPRETED
        self.device = "cuda" if self.on_a_device else "cpu"

    def size(self, n: int) -> int:
        """As many elements as a test asks for, or fewer, where kernels run a step at a time."""
        limit = {"triton": 1300, "emulated": 5100}.get(self.name, n)
        return n if self.on_a_device or n <= limit else limit + n % 97

    def distinct(self, sizes: Sequence[int]) -> list[int]:
        """Of the sizes that a test asks for those that are taken: all but the second and later ones
        of those that `size` makes alike.
        """
        smaller = [n for n in sizes if self.size(n) != n]
        return [n for n in sizes if n not in smaller[1:]]

    def function(self, op):
        if self.name == "emulated":
            return getattr(cuda, op)
        return registry.pick(op, self.device, self.name)[1]

    def run(self, models, base=None, *, out_dtype=None, rule=None, **options):
        """(out on the CPU, stats) by the backend's own function, past the public checks."""
        n = models[0].numel()
        if rule is None:
            name = options.pop("name", "")
            rule = resolve_options(len(models), **options).rule(n, name)
        like = models[0] if base is None else base
        out = torch.full(like.shape, math.nan, dtype=out_dtype or like.dtype, device=self.device)
        stats = self.function("ties")(
            [m.to(self.device) for m in models],
            None if base is None else base.to(self.device),
            rule,
            out,
        )
        return out.cpu(), stats if isinstance(stats, TiesStats) else stats.resolve()

    def states(self, models, base, **options):
        """State dicts, or tensors, by the public function."""

        def moved(state):
            if isinstance(state, dict):
                return {name: tensor.to(self.device) for name, tensor in state.items()}
            return None if state is None else state.to(self.device)

        name = {"emulated": "cuda"}.get(self.name, self.name)
        merged = pymerge.ties([moved(m) for m in models], moved(base), backend=name, **options)
        if isinstance(merged, dict):
            return {name: tensor.cpu() for name, tensor in merged.items()}
        return merged.cpu()

    def select(self, tensors, ranks):
        moved = [
            ([m.to(self.device) for m in models], None if base is None else base.to(self.device))
            for models, base in tensors
        ]
        return [float(t) for t in self.function("select")(moved, ranks)]


def make_backend(spec, monkeypatch, request):
    backend = Backend(spec)
    if backend.name == "emulated":
        emulated = request.getfixturevalue("emulated")
        monkeypatch.setattr(native, "cuda", lambda: emulated.cuda)
        monkeypatch.setattr(cuda, "place", lambda device: (0, 3, 0))  # multiprocessors, no stream
        monkeypatch.setitem(registry.ORDER, "cpu", ("cuda",))
        monkeypatch.setattr(registry, "why_not", lambda backend: None)
    if backend.name == "cpu":
        monkeypatch.setenv("PYMERGE_CPU_LEVEL", spec.split("-")[1])
        before = torch.get_num_threads()
        torch.set_num_threads(backend.threads)
        return backend, lambda: torch.set_num_threads(before)
    return backend, lambda: None


_EXPECTED: dict[tuple, tuple] = {}


def expected(models, base, options):
    """The reference's answer, computed once for all backends, levels and thread counts."""
    tensors = [*models] if base is None else [*models, base]
    digest = hashlib.blake2b()
    for tensor in tensors:
        digest.update(
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    shapes = tuple((t.dtype, t.shape) for t in tensors)
    key = (digest.digest(), shapes, base is None, repr(sorted(options.items(), key=str)))
    if key not in _EXPECTED:
        _EXPECTED[key] = Backend("reference").run(models, base, **options)
    return _EXPECTED[key]


def check_equal(fast, models, base=None, **options):
    """The backend against the reference: output bits and every count."""
    want, wanted = expected(models, base, options)
    got, stats = fast.run(models, base, **options)
    assert same_bits(got, want), f"{int((got != want).sum())} of {got.numel()} elements differ"
    if options.get("rule") is None and options.get("trim", "magnitude") in (
        "magnitude",
        "outliers",
    ):
        assert same_bits(
            torch.tensor(stats.thresholds, dtype=torch.float64),
            torch.tensor(wanted.thresholds, dtype=torch.float64),
        )
    assert (stats.kept, stats.conflicts, stats.non_finite) == (
        wanted.kept,
        wanted.conflicts,
        wanted.non_finite,
    )
    assert (stats.positive, stats.negative) == (wanted.positive, wanted.negative)
