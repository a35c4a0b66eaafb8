"""What a merge method is in terms of ops: a table, and the resolution of its parameters per
tensor.
"""

from __future__ import annotations

from pymerge.methods._table import (
    METHODS,
    NOT_THERE_YET,
    REQUIRED,
    Method,
    Parameter,
    find_method,
    nearest,
)

__all__ = ["METHODS", "NOT_THERE_YET", "REQUIRED", "Method", "Parameter", "find_method", "nearest"]
