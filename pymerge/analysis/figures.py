"""The figures of one tensor or of several together: sums that can be added, and what follows from
them (docs/analyze.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# The densities at which the share of the mass is given.
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass
class Figures:
    """Sums over the elements of some tensors, for K models. Arrays are on the CPU; float64 where
    they are measured, int64 where they are counted.

    considered: (K,), the elements that a model has a part in. products: (K, K), of task vectors.
    base_square: (K,), the base's squared norm over what a model is considered in. largest: (K,).
    kept, agreed, non_finite: (K,). both_kept: (K, K). signs: (K + 1, K + 1), elements for which p
    models vote for + and q for -, at [p, q]. mass: (K,), and mass_above (K, D) of it. parts: (K,),
    the products of each model's contribution with the update, over tensors for which it is known;
    update_square: that of the update. seen, seen_square: (K, K), the alignment's numerators and
    denominators.
    """

    models: int
    densities: tuple[float, ...] = DENSITIES
    tensors: int = 0
    elements: int = 0
    update_square: float = 0.0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def zeros(
            dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]
        ) -> dict[str, torch.Tensor]:
            return {
                name: torch.zeros(shape, dtype=dtype, device="cpu")
                for name, shape in shapes.items()
            }

        k = self.models
        counts = {
            "considered": (k,),
            "kept": (k,),
            "agreed": (k,),
            "non_finite": (k,),
            "both_kept": (k, k),
            "signs": (k + 1, k + 1),
        }
        sums = {
            "products": (k, k),
            "base_square": (k,),
            "largest": (k,),
            "mass": (k,),
            "mass_above": (k, len(self.densities)),
            "parts": (k,),
            "seen": (k, k),
            "seen_square": (k, k),
        }
        self.sums = self.sums or {**zeros(torch.int64, counts), **zeros(torch.float64, sums)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.sums[name]

    def include(self, other: Figures, places: Sequence[int]) -> None:
        """Add the figures of further tensors. places: of its models among these."""
        self.tensors += other.tensors
        self.elements += other.elements
        self.update_square += other.update_square
        at = torch.tensor(places, dtype=torch.int64, device="cpu")
        for name, theirs in other.sums.items():
            own = self.sums[name]
            if name == "largest":
                own[at] = torch.maximum(own[at], theirs)
            elif name == "signs":
                size = len(theirs)
                own[:size, :size] += theirs
            elif theirs.dim() == 2 and name != "mass_above":
                own[at[:, None], at] += theirs
            else:
                own[at] += theirs

    # What follows from the sums.

    @property
    def norms(self) -> list[float]:
        return [math.sqrt(x) if x >= 0 else math.nan for x in self["products"].diagonal().tolist()]

    @property
    def relative_norms(self) -> list[float]:
        """NaN without a base."""
        bases = self["base_square"].tolist()
        return [
            norm / math.sqrt(base) if base > 0 else math.nan
            for norm, base in zip(self.norms, bases, strict=True)
        ]

    @property
    def cosines(self) -> list[list[float]]:
        """NaN where a task vector is 0."""
        products, norms = self["products"].tolist(), self.norms
        return [
            [
                max(-1.0, min(1.0, products[i][j] / (norms[i] * norms[j])))
                if norms[i] * norms[j] > 0
                else math.nan
                for j in range(self.models)
            ]
            for i in range(self.models)
        ]

    @property
    def kept_shares(self) -> list[float]:
        return _shares(self["kept"], self["considered"])

    @property
    def agreed_shares(self) -> list[float]:
        """Of what is kept."""
        return _shares(self["agreed"], self["kept"])

    @property
    def overlaps(self) -> list[list[float]]:
        """|M_i and M_j| / |M_i or M_j|; NaN where both masks are empty."""
        both, kept = self["both_kept"], self["kept"]
        either = kept[:, None] + kept - both
        return torch.where(either > 0, both.double() / either, math.nan).tolist()

    @property
    def voting(self) -> list[int]:
        """The elements for which exactly m models vote, for m = 0 to K."""
        signs = self["signs"].tolist()
        return [sum(signs[p][m - p] for p in range(m + 1)) for m in range(self.models + 1)]

    @property
    def conflicts(self) -> list[int]:
        """Those among them for which models vote for both signs."""
        signs = self["signs"].tolist()
        return [sum(signs[p][m - p] for p in range(1, m)) for m in range(self.models + 1)]

    @property
    def conflict_share(self) -> float:
        """Of all elements."""
        return sum(self.conflicts) / self.elements if self.elements else math.nan

    @property
    def contributions(self) -> list[float]:
        """NaN where nothing changes, or nothing is known of the result."""
        square = self.update_square
        return [x / square if square > 0 else math.nan for x in self["parts"].tolist()]

    @property
    def mass_shares(self) -> list[list[float]]:
        """(K, D)."""
        shares = self["mass_above"] / self["mass"][:, None]  # 0 / 0 is NaN
        return shares.tolist()

    @property
    def alignment(self) -> list[list[float]] | None:
        """(K, K): of task vector i with the inputs of model j's task; None without statistics."""
        if not bool((self["seen_square"] > 0).any()):
            return None
        return (self["seen"] / self["seen_square"]).tolist()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not known is None."""
        found = {
            "tensors": self.tensors,
            "elements": self.elements,
            "norms": self.norms,
            "relative_norms": self.relative_norms,
            "largest": self["largest"].tolist(),
            "kept": self["kept"].tolist(),
            "kept_shares": self.kept_shares,
            "agreed": self["agreed"].tolist(),
            "agreed_shares": self.agreed_shares,
            "voting": self.voting,
            "conflicts": self.conflicts,
            "conflict_share": self.conflict_share,
            "cosines": self.cosines,
            "both_kept": self["both_kept"].tolist(),
            "overlaps": self.overlaps,
            "contributions": self.contributions,
            "mass_shares": self.mass_shares,
            "non_finite": self["non_finite"].tolist(),
            "alignment": self.alignment,
        }
        return {name: _plain(value) for name, value in found.items()}


def _shares(part: torch.Tensor, whole: torch.Tensor) -> list[float]:
    return torch.where(whole > 0, part.double() / whole, math.nan).tolist()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
