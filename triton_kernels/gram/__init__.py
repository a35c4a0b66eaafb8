"""`gram` and `combine` by Triton kernels."""

from pymerge.triton_kernels.gram.api import combine, gram

__all__ = ["combine", "gram"]
