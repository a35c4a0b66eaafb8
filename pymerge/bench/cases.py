"""What `pymerge bench` runs: families of tensors, the calls on them, and the correctness gate
before any timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pymerge.backends import native, registry
from pymerge.reference import ties as reference
from pymerge.rules.ties import TiesRule, resolve_options

DENSITY = 0.2
GATE_SIZE = 1 << 20


@dataclass(frozen=True)
class Family:
    """A kind of fine-tunes: the models' dtype, the base's and the result's, and how far the models
    are from their base.
    """

    name: str
    dtype: torch.dtype
    base: torch.dtype
    distance: Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _noise(base: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return torch.randn(base.shape, generator=g, device=base.device)


def _gaussian(base: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return _noise(base, g).mul_(1e-3)


def _light(base: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return _noise(base, g).mul_(1.2e-5)


def _ulps(base: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return _noise(base, g).mul_(2.0**-8).mul_(base)


# "light": about nine in ten differences round to 0 in bf16, so the rank lies inside the atom at 0.
# "ulps": differences of a few units in the last place, so that many atoms carry the mass and the
# rank lies between some of them.
# "spread": Gaussian differences as those of fp32, which bf16 rounds to a few hundred values.
# "mixed": bf16 models of an fp32 base.
FAMILIES = {
    family.name: family
    for family in (
        Family("fp32", torch.float32, torch.float32, _gaussian),
        Family("bf16-light", torch.bfloat16, torch.bfloat16, _light),
        Family("bf16-ulps", torch.bfloat16, torch.bfloat16, _ulps),
        Family("bf16-spread", torch.bfloat16, torch.bfloat16, _gaussian),
        Family("fp16", torch.float16, torch.float16, _gaussian),
        Family("mixed", torch.bfloat16, torch.float32, _gaussian),
    )
}

# Options of `ties` for the methods that recipes name, and for those of its options that change what
# the loops do.
MERGES: dict[str, dict[str, Any]] = {
    "ties": {},
    "linear": {"trim": "none", "elect": "none", "merge": "sum"},
    "weights": {"weights": 0.7},
    "count": {"elect": "count"},
    "max": {"merge": "max"},
    "breadcrumbs": {"trim": "outliers", "elect": "none", "merge": "sum"},
    "dare-linear": {"trim": "random", "elect": "none", "merge": "sum", "rescale": "density"},
    "dare-ties": {"trim": "random", "rescale": "l1"},
    "ties-l1": {"rescale": "l1"},
}


@dataclass(frozen=True)
class Tensors:
    models: list[torch.Tensor]
    base: torch.Tensor
    out: torch.Tensor

    @property
    def n(self) -> int:
        return self.base.numel()

    @property
    def bytes(self) -> int:
        """Moved by one merge: K + 1 reads and one write."""
        return self.n * sum(t.element_size() for t in (*self.models, self.base, self.out))

    def head(self, count: int) -> Tensors:
        """The first models only."""
        return Tensors(self.models[:count], self.base, self.out)


def make(
    family: Family, n: int, count: int, seed: int = 0, device: torch.device | None = None
) -> Tensors:
    """A base of standard deviation 0.02 and `count` models at the family's distance."""
    place = torch.device("cpu") if device is None else device
    g = torch.Generator(place).manual_seed(seed)
    base = torch.randn(n, generator=g, device=place).mul_(0.02).to(family.base)
    wide = base.float()
    models = [family.distance(wide, g).add_(wide).to(family.dtype) for _ in range(count)]
    return Tensors(models, base, torch.zeros_like(base))


def rule_for(tensors: Tensors, merge: str = "ties") -> TiesRule:
    options = {"density": DENSITY, **MERGES[merge]}
    return resolve_options(len(tensors.models), **options).rule(tensors.n)


def buffers(tensors: Tensors) -> tuple[list[native.Buffer], native.Buffer, native.Buffer]:
    """Models, base and output as the compiled kernels take them."""
    named = [
        (t.data_ptr(), str(t.dtype).removeprefix("torch."))
        for t in (*tensors.models, tensors.base, tensors.out)
    ]
    return named[:-2], named[-2], named[-1]


def known_rule(tensors: Tensors, merge: str = "ties") -> TiesRule:
    """The same rule with its thresholds and factors filled in; on a GPU with its thresholds, where
    they are all there is to find, else as it is.
    """
    rule = rule_for(tensors, merge)
    if tensors.base.device.type == "cpu":
        models, base, out = buffers(tensors)
        return native.precomputed(models, base, out[1], tensors.n, rule)
    if rule.trim != "magnitude" or rule.rescale != "none":
        return rule
    _, select = registry.pick("select", tensors.base.device.type)
    found = select([(tensors.models, tensors.base)], rule.ranks)
    return rule.with_precomputed(thresholds=tuple(map(float, found)))


def gate(tensors: Tensors, backend: str, merge: str = "ties") -> None:
    """RuntimeError unless the backend's output equals the reference's to the bit, on the leading
    million elements.
    """
    n = min(GATE_SIZE, tensors.n)
    small = Tensors(
        [m[:n] for m in tensors.models], tensors.base[:n], torch.zeros_like(tensors.base[:n])
    )
    want = torch.zeros_like(small.out)
    reference.ties(small.models, small.base, rule_for(small, merge), want)
    _, function = registry.pick("ties", small.base.device.type, backend)
    for rule in (rule_for(small, merge), known_rule(small, merge)):
        small.out.fill_(float("nan"))
        function(small.models, small.base, rule, small.out)
        if not torch.equal(small.out, want):
            raise RuntimeError(
                f"backend {backend!r} differs from the reference in {merge!r} at n={n}; nothing is"
                " timed"
            )
