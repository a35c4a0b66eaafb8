"""Merge fine-tuned models at the speed of memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "MatsLayer",
    "__version__",
    "mats",
    "mats_many",
    "merge",
    "merge_checkpoints",
    "plan_checkpoints",
    "regmean",
    "select",
    "ties",
    "weighted_average",
]

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
_SUBMODULES = ("compat", "errors", "mats_merge", "methods", "reference", "statistics")

# The same for type checkers and editors, which do not run `__getattr__`, nor should see it: it
# promises every name.
if TYPE_CHECKING:
    from pymerge import compat as compat
    from pymerge import errors as errors
    from pymerge import mats_merge as mats_merge
    from pymerge import methods as methods
    from pymerge import reference as reference
    from pymerge import statistics as statistics
    from pymerge._merge import merge as merge
    from pymerge.engine import merge_checkpoints as merge_checkpoints
    from pymerge.engine import plan_checkpoints as plan_checkpoints
    from pymerge.ops.mats import MatsLayer as MatsLayer
    from pymerge.ops.mats import mats as mats
    from pymerge.ops.mats import mats_many as mats_many
    from pymerge.ops.regmean import regmean as regmean
    from pymerge.ops.select import select as select
    from pymerge.ops.ties import ties as ties
    from pymerge.ops.weighted_average import weighted_average as weighted_average
else:

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return importlib.import_module(f"pymerge.{name}")
        if name in _PUBLIC:
            value = getattr(importlib.import_module(_PUBLIC[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'pymerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_SUBMODULES})
