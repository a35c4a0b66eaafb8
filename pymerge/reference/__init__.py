"""What is right, in plain PyTorch: `pymerge.reference.ties` and `pymerge.reference.mats`, against
which every backend is tested.
"""

from __future__ import annotations

from pymerge.reference import mats, ties

__all__ = ["mats", "ties"]
