"""Merge fine-tuned models at memory bandwidth."""

from __future__ import annotations

# torch imports this module, which Python refuses after the main thread has ended; yet another
# thread may merge for the first time then.
import concurrent.futures.thread as _thread  # noqa: F401
import importlib
import logging
from typing import TYPE_CHECKING, Any

from pymerge.version import __version__

# What is logged goes where the program sends it, and nowhere by itself.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "AnalysisObserver",
    "MatsLayer",
    "__version__",
    "analyze",
    "analyze_checkpoints",
    "arcee_fusion",
    "combine",
    "gram",
    "iso_c",
    "karcher",
    "mats",
    "mats_many",
    "merge",
    "merge_checkpoints",
    "merge_with_statistics",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "plan_checkpoints",
    "ram",
    "ramplus_tl",
    "regmean",
    "sce",
    "select",
    "slerp",
    "stream_with_statistics",
    "sweep",
    "sweep_checkpoints",
    "ties",
    "tsv",
    "weighted_average",
    "wudi",
]

# Public name -> module, imported when first used: `import pymerge` imports neither torch nor numpy.
_PUBLIC = {
    "ties": "pymerge.ops.ties.api",
    "select": "pymerge.ops.ties.select",
    "gram": "pymerge.ops.gram.api",
    "combine": "pymerge.ops.gram.api",
    "mats": "pymerge.ops.mats.api",
    "mats_many": "pymerge.ops.mats.api",
    "MatsLayer": "pymerge.ops.mats.api",
    "regmean": "pymerge.ops.mats.regmean",
    "weighted_average": "pymerge.ops.mats.weighted_average",
    **dict.fromkeys(
        ("nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion"), "pymerge.engine.masked_methods"
    ),
    **dict.fromkeys(("wudi", "tsv", "iso_c"), "pymerge.engine.matrix_methods"),
    "merge": "pymerge.engine.state_dicts",
    "slerp": "pymerge.engine.method_functions",
    "nuslerp": "pymerge.engine.method_functions",
    "multislerp": "pymerge.engine.method_functions",
    "karcher": "pymerge.engine.method_functions",
    "model_stock": "pymerge.engine.method_functions",
    "merge_with_statistics": "pymerge.engine.state_dict_statistics",
    "stream_with_statistics": "pymerge.engine.state_dict_statistics",
    "analyze": "pymerge.analysis.state_dicts",
    "analyze_checkpoints": "pymerge.analysis.folders",
    "AnalysisObserver": "pymerge.analysis.folders",
    "sweep": "pymerge.sweeps.state_dicts",
    "sweep_checkpoints": "pymerge.sweeps.folders",
    "merge_checkpoints": "pymerge.engine.merge",
    "plan_checkpoints": "pymerge.engine.merge",
}
_SUBMODULES = ("compat", "errors", "methods", "reference", "statistics")

# The same for type checkers and editors. They do not run `__getattr__` and should not see it, since
# it seems to promise every name.
if TYPE_CHECKING:
    from pymerge import compat as compat
    from pymerge import errors as errors
    from pymerge import methods as methods
    from pymerge import reference as reference
    from pymerge import statistics as statistics
    from pymerge.analysis.folders import AnalysisObserver as AnalysisObserver
    from pymerge.analysis.folders import analyze_checkpoints as analyze_checkpoints
    from pymerge.analysis.state_dicts import analyze as analyze
    from pymerge.engine.masked_methods import arcee_fusion as arcee_fusion
    from pymerge.engine.masked_methods import nearswap as nearswap
    from pymerge.engine.masked_methods import ram as ram
    from pymerge.engine.masked_methods import ramplus_tl as ramplus_tl
    from pymerge.engine.masked_methods import sce as sce
    from pymerge.engine.matrix_methods import iso_c as iso_c
    from pymerge.engine.matrix_methods import tsv as tsv
    from pymerge.engine.matrix_methods import wudi as wudi
    from pymerge.engine.merge import merge_checkpoints as merge_checkpoints
    from pymerge.engine.merge import plan_checkpoints as plan_checkpoints
    from pymerge.engine.method_functions import karcher as karcher
    from pymerge.engine.method_functions import model_stock as model_stock
    from pymerge.engine.method_functions import multislerp as multislerp
    from pymerge.engine.method_functions import nuslerp as nuslerp
    from pymerge.engine.method_functions import slerp as slerp
    from pymerge.engine.state_dict_statistics import (
        merge_with_statistics as merge_with_statistics,
    )
    from pymerge.engine.state_dict_statistics import (
        stream_with_statistics as stream_with_statistics,
    )
    from pymerge.engine.state_dicts import merge as merge
    from pymerge.ops.gram.api import combine as combine
    from pymerge.ops.gram.api import gram as gram
    from pymerge.ops.mats.api import MatsLayer as MatsLayer
    from pymerge.ops.mats.api import mats as mats
    from pymerge.ops.mats.api import mats_many as mats_many
    from pymerge.ops.mats.regmean import regmean as regmean
    from pymerge.ops.mats.weighted_average import weighted_average as weighted_average
    from pymerge.ops.ties.api import ties as ties
    from pymerge.ops.ties.select import select as select
    from pymerge.sweeps.folders import sweep_checkpoints as sweep_checkpoints
    from pymerge.sweeps.state_dicts import sweep as sweep
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
