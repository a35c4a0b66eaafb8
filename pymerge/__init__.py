"""Merge fine-tuned models at the speed of memory."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module, imported when first used: `import pymerge` imports neither torch nor numpy.
_PUBLIC = {
    "ties": "pymerge.ops.ties",
    "select": "pymerge.ops.select",
    "mats": "pymerge.ops.mats",
    "mats_many": "pymerge.ops.mats",
    "MatsLayer": "pymerge.ops.mats",
    "regmean": "pymerge.ops.regmean",
    "weighted_average": "pymerge.ops.weighted_average",
    "merge": "pymerge._merge",
    "merge_checkpoints": "pymerge.engine",
    "plan_checkpoints": "pymerge.engine",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pymerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
