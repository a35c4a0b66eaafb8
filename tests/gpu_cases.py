"""Drawn cases of `ties` for backends that run elsewhere than the reference: one seed, one case, the
same on every machine.

Used by tests/ties/test_cuda_emulated.py, where the kernels run on the host, and by
benchmarks/gpu_check.py, where they do not.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ties_cases import DISTRIBUTIONS, family, same_bits, ulp_family

from pymerge.backends import native
from pymerge.engine.summary import merged_stats
from pymerge.reference import ties as reference
from pymerge.rules.ties import MERGES, TiesRule, TiesStats, resolve_options

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Run = Callable[[Sequence[torch.Tensor], "torch.Tensor | None", TiesRule, torch.Tensor], Any]


@dataclass
class Case:
    models: list[torch.Tensor]
    base: torch.Tensor | None
    out_dtype: torch.dtype
    options: dict[str, Any]
    name: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> TiesRule:
        return resolve_options(len(self.models), **self.options).rule(
            self.models[0].numel(), self.name
        )


def draw(seed: int, sizes: Sequence[int], counts: Sequence[int], doubles: bool = True) -> Case:
    """Any option, any mix of dtypes, with and without base, strided by an odd offset, with values
    that are not finite.
    """
    r = random.Random(seed)
    n, count = r.choice(sizes), r.choice(counts)
    choices = [*FLOATS, torch.float64] if doubles and r.random() < 0.2 else list(FLOATS)
    dtypes = r.choices(choices, k=r.choice([1, 1, 2, 3]))
    distribution = r.choice([*DISTRIBUTIONS, "ulp"])
    models, base = _tensors(distribution, n, count, dtypes, seed)
    if r.random() < 0.2 and n > 10:
        for _ in range(5):
            models[r.randrange(count)][r.randrange(n)] = r.choice([math.nan, math.inf, -math.inf])
    offset = r.choice([0, 0, 0, 1, 3]) if n > 3 else 0
    models, base = [m[offset:] for m in models], base[offset:]
    wide = any(t.dtype == torch.float64 for t in (*models, base))

    def unit() -> float:
        return r.choice([0.0, 0.2, 0.2, 0.5, 1.0, r.random()])

    one = unit()
    options = {
        "density": [one if r.random() < 0.5 else unit() for _ in range(count)],
        "weights": [r.choice([1.0, 1.0, 0.0, -0.5, r.uniform(-2, 2)]) for _ in range(count)],
        "scaling": r.choice([1.0, 0.7, -2.0]),
        "flavor": r.choice(["mergekit", "peft", "paper"]),
        "trim": r.choice(["magnitude", "magnitude", "outliers", "random", "none"]),
        "elect": r.choice(["sum", "sum", "count", "none"]),
        "merge": r.choice(MERGES),
        "zero_sign": r.choice(["positive", "majority"]),
        "rescale": r.choice(["none", "none", "density", "l1", "l2", "linf"]),
        "gamma": unit(),
        "seed": r.randrange(2**64),
    }
    like = base.dtype
    keeps_base = r.random() < 0.7
    out_dtype = r.choice([like, like, torch.float32, torch.bfloat16, torch.float16])
    if wide and r.random() < 0.3:
        out_dtype = torch.float64
    about = {
        "seed": seed,
        "n": n - offset,
        "K": count,
        "distribution": distribution,
        "dtypes": dtypes,
    }
    return Case(
        models, base if keeps_base else None, out_dtype, options, r.choice(["", "w", "a.b"]), about
    )


def draw_alike(seed: int, sizes: Sequence[int]) -> Case:
    """One dtype, aligned, 1 to 8 models, mostly of weight 1, no rescaling: what the fast kernels
    take; with values at the ends of the range, sums of which overflow or vanish.
    """
    r = random.Random(seed)
    n, count, dtype = r.choice(sizes), r.randint(1, 8), r.choice(FLOATS)
    distribution = r.choice([*DISTRIBUTIONS, "ulp"])
    models, base = _tensors(distribution, n, count, [dtype], seed)
    if r.random() < 0.4:  # whole stretches: several models have them in the same place
        largest = torch.finfo(dtype).max
        smallest = torch.finfo(dtype).smallest_normal
        ends = [largest, largest / 2, largest / 8, largest / 64, 0.0, -0.0, *_smallest(dtype)]
        ends += [smallest, smallest * 3, -largest / 16, math.nan, math.inf]
        for _ in range(6):
            begin = r.randrange(n)
            for tensor in (*models, base):
                length = len(tensor[begin : begin + 40])
                values = [r.choice(ends) * r.choice([1, 1, -1]) for _ in range(length)]
                if r.random() < 0.8:
                    tensor[begin : begin + 40] = torch.tensor(values, dtype=dtype)
    elect = r.choice(["sum", "sum", "sum", "none"])
    options = {
        "density": r.choice([0.0, 0.2, 0.2, 0.5, 1.0, r.random()]),
        "weights": r.choice([1.0, 1.0, 1.0, 0.5, [r.uniform(-2, 2) for _ in range(count)]]),
        "scaling": r.choice([1.0, 0.7, -2.0]),
        "flavor": r.choice(["mergekit", "peft", "paper"]),
        "trim": r.choice(["magnitude", "magnitude", "magnitude", "none"]),
        "elect": elect,
        "merge": r.choice(["weighted_mean", "mean", "mean", "sum"]),
        "zero_sign": r.choice(["positive", "majority"]),
    }
    about = {"seed": seed, "n": n, "K": count, "distribution": distribution, "dtype": dtype}
    return Case(models, base if r.random() < 0.7 else None, dtype, options, "", about)


def _smallest(dtype: torch.dtype) -> list[float]:
    """A few subnormal numbers."""
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return [step, 3 * step, 7 * step, 12 * step]


def plain(
    n: int,
    count: int,
    dtype: torch.dtype,
    distribution: str = "gaussian",
    with_base: bool = True,
    **options: Any,
) -> Case:
    """One dtype throughout, default options but for those given: the common case."""
    models, base = _tensors(distribution, n, count, [dtype], n + count)
    about = {"n": n, "K": count, "distribution": distribution, "dtype": dtype}
    return Case(models, base if with_base else None, dtype, options, "", about)


def _tensors(
    distribution: str, n: int, count: int, dtypes: Sequence[torch.dtype], seed: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    if distribution == "ulp":
        dtype = next((d for d in dtypes if d != torch.float64), torch.float32)
        return ulp_family(n, count, dtype, seed)
    return family(n, count, distribution, dtypes, seed)


def differences(
    case: Case, run: Run, device: str, want: Run = reference.ties
) -> tuple[list[str], Any]:
    """(what differs between `run` on a device and `want` on the CPU, what `run` returned): bits and
    every count.
    """
    rule = case.rule
    shape = case.models[0].shape
    out = torch.full(shape, math.nan, dtype=case.out_dtype, device=device)
    base = None if case.base is None else _placed(case.base, device)
    pending = run([_placed(m, device) for m in case.models], base, rule, out)
    stats = pending if isinstance(pending, TiesStats) else pending.resolve()
    expected = torch.full(shape, math.nan, dtype=case.out_dtype)
    wanted = want(case.models, case.base, rule, expected)
    wanted = wanted if isinstance(wanted, TiesStats) else wanted.resolve()
    got, found = out.cpu(), []
    if not same_bits(got, expected):
        ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
        wrong = (got.view(ints) != expected.view(ints)).nonzero().flatten()
        first = int(wrong[0])
        found.append(
            f"{len(wrong)} of {got.numel()} elements, the first at {first}: "
            f"{got[first].item()!r} for {expected[first].item()!r}"
        )
    for what in ("kept", "conflicts", "non_finite", "positive", "negative"):
        if getattr(stats, what) != getattr(wanted, what):
            found.append(f"{what}: {getattr(stats, what)} for {getattr(wanted, what)}")
    if repr(stats.thresholds) != repr(wanted.thresholds):  # repr: NaN equals NaN
        found.append(f"thresholds: {stats.thresholds} for {wanted.thresholds}")
    return found, pending


def _placed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """On the device, as far from its memory's beginning as before: what is unaligned stays so."""
    offset = tensor.storage_offset()
    room = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device=device)
    return room[offset:].copy_(tensor.reshape(-1)).reshape(tensor.shape)


def in_parts(
    run: Run, models: Sequence[torch.Tensor], base: torch.Tensor | None, rule: TiesRule, out: torch.Tensor, step: int
) -> TiesStats:  # fmt: skip
    """The merge of a whole contiguous CPU tensor made of parts of `step` elements, the way the
    engine does on a GPU: what the tensor decides as a whole is found first, then every part is
        merged by itself.
    """
    whole = known_rule(models, base, rule, out)
    stats = []
    for first in range(0, out.numel(), step):
        cut = slice(first, first + step)
        part = whole.with_precomputed(first=first)
        if rule.trim == "none":
            part = replace(part, ranks=(out[cut].numel(),) * len(models))
        one = run([m[cut] for m in models], None if base is None else base[cut], part, out[cut])
        stats.append(one if isinstance(one, TiesStats) else one.resolve())
    total = vars(merged_stats(stats))
    signs = {name: sum(getattr(part, name) for part in stats) for name in ("positive", "negative")}
    return TiesStats(**{**total, **signs, "thresholds": stats[0].thresholds})


def known_rule(
    models: Sequence[torch.Tensor], base: torch.Tensor | None, rule: TiesRule, out: torch.Tensor
) -> TiesRule:
    """The rule for parts of a tensor."""
    buffers = [(m.data_ptr(), _name(m)) for m in models]
    based = None if base is None else (base.data_ptr(), _name(base))
    whole = native.precomputed(buffers, based, _name(out), out.numel(), rule)
    if rule.zero_sign == "majority":
        stats = reference.ties(models, base, rule, torch.empty_like(out))
        whole = whole.with_precomputed(majority=1 if stats.positive > stats.negative else -1)
    return whole


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def parts_differ(case: Case, run: Run, step: int) -> str:
    """What differs between a merge in parts and the reference of the whole; empty where nothing
    does.
    """
    models = [m.contiguous() for m in case.models]
    base = None if case.base is None else case.base.contiguous()
    out = torch.full(case.models[0].shape, math.nan, dtype=case.out_dtype)
    want = out.clone()
    stats = in_parts(run, models, base, case.rule, out, step)
    wanted = reference.ties(models, base, case.rule, want)
    if not same_bits(out, want):
        return f"{int((out != want).sum())} of {out.numel()} elements; {case.about}, {case.options}"
    if case.rule.trim not in ("magnitude", "outliers"):
        wanted = replace(wanted, thresholds=stats.thresholds)
    if repr(stats) != repr(wanted):
        return f"{stats} for {wanted}; {case.about}, {case.options}"
    return ""


# Tensors that guesses about thresholds get wrong, made on the device that they are for.


def _noise(n: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=g, device=g.device)


def _uniform(n: int, g: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=g, device=g.device)


DISTANCES: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "gaussian": lambda n, g: _noise(n, g) * 0.002,
    "all equal": lambda n, g: torch.where(_noise(n, g) > 0, 0.25, -0.25),
    "95 % zeros": lambda n, g: _noise(n, g) * (_uniform(n, g) < 0.05),
    "sorted": lambda n, g: _noise(n, g).sort().values,
    "outliers": lambda n, g: _noise(n, g) * torch.where(_noise(n, g) > 3.1, 1e4, 1.0),
    "heavy tail": lambda n, g: _noise(n, g) / _uniform(n, g).clamp(min=1e-6),
    "rows": lambda n, g: (
        _noise(n, g) * torch.exp(3 * _noise((n + 255) // 256, g)).repeat_interleave(256)[:n]
    ),
}
KINDS = [*DISTANCES, "ulps"]
Plan = tuple[str, int, int, torch.dtype]  # distances, elements, models, dtype


def adversarial(
    kind: str, n: int, count: int, dtype: torch.dtype, seed: int, device: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = torch.Generator(device=device).manual_seed(seed)
    base = (_noise(n, g) * 0.02).to(dtype)
    if kind == "ulps":
        bits = base.view(torch.int32 if dtype == torch.float32 else torch.int16)
        steps = [
            torch.randint(-2, 3, (n,), generator=g, device=g.device, dtype=bits.dtype)
            for _ in range(count)
        ]
        return [(bits + step).view(dtype) for step in steps], base
    return [(base.float() + DISTANCES[kind](n, g)).to(dtype) for _ in range(count)], base


def fixed_plans() -> list[Plan]:
    """Every kind at a size that is guessed, then the largest."""
    pairs = itertools.product(KINDS, (torch.float32, torch.bfloat16))
    found: list[Plan] = [(kind, (1 << 22) + 5, 3, dtype) for kind, dtype in pairs]
    found += [("gaussian", 1 << 26, 4, torch.float32), ("gaussian", 1 << 26, 8, torch.bfloat16)]
    found += [("ulps", (1 << 24) + 1, 4, torch.bfloat16), ("gaussian", 1 << 24, 64, torch.bfloat16)]
    found += [("gaussian", 1 << 28, 2, torch.float32), ("95 % zeros", 1 << 28, 2, torch.bfloat16)]
    return found
