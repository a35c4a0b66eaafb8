"""The reference in plain PyTorch, against which every backend is tested: `pymerge.reference.ties`,
`pymerge.reference.mats` and `pymerge.reference.low_rank`.
"""

from __future__ import annotations

from pymerge.reference import low_rank, mats, ties

__all__ = ["low_rank", "mats", "ties"]
