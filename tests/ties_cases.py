"""Inputs for the tests of `ties` and `select`: distributions that have broken selection or election
before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(n: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=g) * 0.02


def all_equal(n: int, g: torch.Generator) -> torch.Tensor:
    return torch.full((n,), 0.25) * torch.randint(0, 2, (n,), generator=g).mul(2).sub(1)


def mostly_zero(n: int, g: torch.Generator) -> torch.Tensor:
    return gaussian(n, g) * (torch.rand(n, generator=g) < 0.05)


def sorted_up(n: int, g: torch.Generator) -> torch.Tensor:
    return gaussian(n, g).sort().values


def outliers(n: int, g: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(n, generator=g) < 0.001, 1e4, 1.0) * gaussian(n, g)


def heavy_tailed(n: int, g: torch.Generator) -> torch.Tensor:
    return gaussian(n, g) / torch.rand(n, generator=g).clamp(min=1e-6)


def blocks(n: int, g: torch.Generator) -> torch.Tensor:
    """Rows of very different sizes, as embeddings have."""
    rows = torch.exp(3 * torch.randn((n + 255) // 256, generator=g)).repeat_interleave(256)[:n]
    return gaussian(n, g) * rows


def few_values(n: int, g: torch.Generator) -> torch.Tensor:
    return torch.randint(-4, 5, (n,), generator=g) * 0.125


def subnormal(n: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=g) * 1e-39


def signed_zero(n: int, g: torch.Generator) -> torch.Tensor:
    return torch.zeros(n) * torch.randint(0, 2, (n,), generator=g).mul(2).sub(1)


DISTRIBUTIONS: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    f.__name__: f
    for f in (
        gaussian,
        all_equal,
        mostly_zero,
        sorted_up,
        outliers,
        heavy_tailed,
        blocks,
        few_values,
        subnormal,
        signed_zero,
    )
}


def family(
    n: int,
    count: int,
    distribution: str = "gaussian",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(models, base): a base of unit Gaussians and `count` models at the distribution's distance
    from it.

    dtypes are dealt round: the base takes the first, models the next ones. In bf16 and fp16 small
    distances become a few units in the last place, most of them zero, as in real fine-tunes.
    """
    g = generator(seed)
    base = torch.randn(n, generator=g)
    make = DISTRIBUTIONS[distribution]
    models = [(base + make(n, g)).to(dtypes[(k + 1) % len(dtypes)]) for k in range(count)]
    return models, base.to(dtypes[0])


def ulp_family(
    n: int, count: int, dtype: torch.dtype, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Models that differ from the base by -2 to 2 units in the last place."""
    g = generator(seed)
    base = torch.randn(n, generator=g).to(dtype)
    bits = base.view(torch.int16 if dtype != torch.float32 else torch.int32)
    models = []
    for _ in range(count):
        step = torch.randint(-2, 3, (n,), generator=g).to(bits.dtype)
        moved = (bits + step).view(dtype)
        models.append(torch.where(moved.isfinite(), moved, base))
    return models, base


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, those of NaN (N2) too."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and bool((a.view(ints) == b.view(ints)).all())
