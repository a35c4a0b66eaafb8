"""Merge methods in terms of ops: the table of methods, and their parameters for each tensor."""

from __future__ import annotations

from pymerge.methods._table import METHODS, find_method
from pymerge.methods.functions import tensor_method
from pymerge.methods.method import REQUIRED, Given, Method, Parameter, nearest

__all__ = [
    "METHODS",
    "REQUIRED",
    "Given",
    "Method",
    "Parameter",
    "find_method",
    "nearest",
    "tensor_method",
]
