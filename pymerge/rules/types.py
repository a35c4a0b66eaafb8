"""The words that options take, as types. The tables of allowed values and the public signatures are
derived from them, so that each set is written once.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, SupportsFloat, SupportsIndex, TypedDict

# One number, or one per model: a list, an array or a tensor of them (the latter two have __float__
# too).
PerModel = SupportsFloat | Sequence[SupportsFloat]

Backend = Literal["auto", "reference", "cpu", "cuda", "triton"]

# Of `ties` (docs/spec/ties.md).
Flavor = Literal["mergekit", "peft", "paper"]
Trim = Literal["magnitude", "none", "outliers", "random", "magprune"]
Elect = Literal["sum", "count", "none"]
Merge = Literal["weighted_mean", "mean", "sum", "max"]
ZeroSign = Literal["positive", "majority"]
Scope = Literal["tensor", "model"]
Rescale = Literal["none", "density", "l1", "l2", "linf"]
NonFinite = Literal["error", "allow"]

# Of `gram` and `combine` (docs/spec/gram.md).
Per = Literal["tensor", "row", "column"]

# Of `mats` (docs/spec/mats.md).
MatsFlavor = Literal["default", "paper"]
Solver = Literal["cg", "exact"]
TaskWeights = Literal["raw", "trace"]
InitName = Literal["average", "pretrained", "task_arithmetic", "ties", "zero"]
Precision = Literal["fp32", "tf32", "bf16x3", "fp64"]

# Of `merge`: the methods that stand for options of `ties`, and those that merge by statistics.
TiesMethod = Literal[
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "passthrough",
]
# Those of `masked` (docs/spec/masked.md).
MaskedMethod = Literal["nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion"]
MaskedFlavor = Literal["mergekit", "paper"]
# Those of `matrix` (docs/spec/matrix.md).
MatrixMethod = Literal["wudi", "tsv", "iso_c"]
# Those that have an op of their own.
OpMethod = Literal[
    "slerp", "nuslerp", "multislerp", "karcher", "model_stock", MaskedMethod, MatrixMethod
]
StatisticsMethod = Literal["mats", "regmean", "fisher"]

# Of `pymerge.statistics` (docs/spec/statistics.md).
Kind = Literal["input_gram", "output_grad_gram", "diagonal_fisher", "block_fisher"]
PackedKind = Literal["input_gram", "output_grad_gram", "block_fisher"]
Labels = Literal["true", "empirical", "exact"]
Task = Literal[
    "causal-lm",
    "masked-lm",
    "token-classification",
    "sequence-classification",
    "image-classification",
    "seq2seq",
    "embedding",
]


class MatsKeywords(TypedDict, total=False):
    """The options of `pymerge.mats`."""

    flavor: MatsFlavor
    solver: Solver
    iterations: SupportsIndex | None
    preconditioner: bool | None
    damping: SupportsFloat
    off_diagonal: SupportsFloat
    task_weights: TaskWeights | Sequence[SupportsFloat]
    step_limit: SupportsFloat | None
    objective_tolerance: SupportsFloat | None
    residual_tolerance: SupportsFloat | None
    precision: Precision | None
    backend: Backend


class StatisticsKeywords(MatsKeywords, total=False):
    """Further options of the methods that merge by statistics; each method takes some."""

    minimum: SupportsFloat
