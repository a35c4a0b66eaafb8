"""Statistics of a running model that MaTS, RegMean and Fisher merging need (docs/statistics.md,
docs/spec/statistics.md).

    kinds = ("input_gram", "output_grad_gram")
    stats = collect(model, batches, loss="causal-lm", kinds=kinds, out="stats.safetensors")
    stats.input_gram("model.layers.0.mlp.up_proj")       # (d_in, d_in), mean over tokens
"""

from __future__ import annotations

from pymerge.checkpoint.schemas import KINDS
from pymerge.statistics._collect import collect
from pymerge.statistics._file import Counts, Statistics, load, merge_files
from pymerge.statistics._loss import Prediction
from pymerge.statistics._options import Progress

__all__ = [
    "KINDS",
    "Counts",
    "Prediction",
    "Progress",
    "Statistics",
    "collect",
    "load",
    "merge_files",
]
