"""The methods by Gram matrix on memory of model folders, by the compiled kernels in place. Imports
numpy and not torch.
"""

from __future__ import annotations

import numpy as np

from pymerge.backends import native, native_gram
from pymerge.dtypes import elements
from pymerge.ops.gram.coefficients import coefficients
from pymerge.rules.gram import GramOptions, flat_rule, matrix_of
from pymerge.rules.options import BufferCall, Counts


def merge(call: BufferCall, options: GramOptions) -> Counts:
    """Merge a whole tensor: one read for the Gram matrices, one for the combination."""
    models, base, threads, n = call.models, call.base, call.threads, elements(call.shape)
    matrix, by_column = matrix_of(call.shape, options.per), options.per == "column"
    groups = matrix[1] if by_column else matrix[0]
    products = np.empty((groups, options.count * (options.count + 1) // 2))
    native_gram.gram(models, base, matrix, by_column, products.ctypes.data, threads)
    kept, bad = (n,) * options.count, (0,) * options.count
    if not np.isfinite(products).all():  # a square of NaN or infinity is in the sums
        in_base = 0 if base is None else native.count_non_finite(base, n, threads)
        bad = tuple(native.count_non_finite(model, n, threads) + in_base for model in models)
        if options.non_finite == "error" and any(bad):
            return Counts(kept, 0, bad)  # the caller refuses
    found, remark = coefficients(options, products)
    if options.per == "tensor" and np.isfinite(found).all():
        rule = flat_rule(found[0].tolist(), n)
        native.ties(models, base, call.out, n, rule, threads)
    else:
        ordered = np.ascontiguousarray(found.T if by_column else found)
        at = ordered.ctypes.data
        native_gram.combine(models, base, matrix, by_column, at, call.out, threads)
    return Counts(kept, 0, bad, remark)
