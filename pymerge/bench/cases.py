"""What `pymerge bench` runs: families of tensors, the calls on them, and the correctness gate
before any timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pymerge.backends import registry
from pymerge.reference import ties as reference
from pymerge.rules.ties import TiesRule, resolve_options

DENSITY = 0.2
GATE_SIZE = 1 << 20


@dataclass(frozen=True)
class Family:
    """A kind of fine-tunes: dtype and how far the models are from their base."""

    name: str
    dtype: torch.dtype
    distance: Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _gaussian(base: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return torch.randn(base.shape, generator=g).mul_(1e-3)


def _light(base: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return torch.randn(base.shape, generator=g).mul_(1.2e-5)


def _ulps(base: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return torch.randn(base.shape, generator=g).mul_(2.0**-8).mul_(base)


# "light": about nine in ten differences round to 0 in bf16, so the rank lies inside the atom at 0.
# "ulps": differences of a few units in the last place, so that many atoms carry the mass and the
# rank lies between some of them.
FAMILIES = {
    "fp32": Family("fp32", torch.float32, _gaussian),
    "bf16-light": Family("bf16-light", torch.bfloat16, _light),
    "bf16-ulps": Family("bf16-ulps", torch.bfloat16, _ulps),
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
        return (len(self.models) + 2) * self.base.numel() * self.base.element_size()

    def head(self, count: int) -> Tensors:
        """The first models only."""
        return Tensors(self.models[:count], self.base, self.out)


def make(family: Family, n: int, count: int, seed: int = 0) -> Tensors:
    """A base of standard deviation 0.02 and `count` models at the family's distance."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=g).mul_(0.02).to(family.dtype)
    wide = base.float()
    models = [family.distance(wide, g).add_(wide).to(family.dtype) for _ in range(count)]
    return Tensors(models, base, torch.zeros_like(base))


def rule_for(tensors: Tensors, flavor: str = "mergekit") -> TiesRule:
    return resolve_options(len(tensors.models), density=DENSITY, flavor=flavor).rule(tensors.n)


def known_rule(tensors: Tensors, backend: str) -> TiesRule:
    """The same rule with its thresholds filled in."""
    rule = rule_for(tensors)
    _, select = registry.pick("select", tensors.base.device.type, backend)
    return rule.with_known(thresholds=tuple(select([(tensors.models, tensors.base)], rule.ranks)))


def gate(tensors: Tensors, backend: str) -> None:
    """RuntimeError unless the backend's output equals the reference's to the bit, on the leading
    million elements.
    """
    n = min(GATE_SIZE, tensors.n)
    small = Tensors(
        [m[:n] for m in tensors.models], tensors.base[:n], torch.zeros_like(tensors.base[:n])
    )
    want = torch.zeros_like(small.out)
    stats = reference.ties(small.models, small.base, rule_for(small), want)
    _, function = registry.pick("ties", small.base.device.type, backend)
    for rule in (rule_for(small), rule_for(small).with_known(thresholds=stats.thresholds)):
        small.out.fill_(float("nan"))
        function(small.models, small.base, rule, small.out)
        if not torch.equal(small.out, want):
            raise RuntimeError(
                f"backend {backend!r} differs from the reference at n={n}; nothing is timed"
            )
