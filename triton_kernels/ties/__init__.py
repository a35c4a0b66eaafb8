"""`ties` and `select` in Triton (docs/spec/ties.md)."""

from pymerge.triton_kernels.ties._api import DeviceStats, Request, select, ties, ties_many

__all__ = ["DeviceStats", "Request", "select", "ties", "ties_many"]
