"""Merge methods in terms of ops: the table of methods, and their parameters for each tensor."""

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
