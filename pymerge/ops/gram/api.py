"""The public ops `gram` and `combine`: validate, choose the backend, call (docs/spec/gram.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pymerge.backends import registry
from pymerge.messages.arguments import argument
from pymerge.messages.words import type_of
from pymerge.ops import registered
from pymerge.ops.memory import check_readable, new_result
from pymerge.ops.tensors import check_floats, check_list, check_out, check_tensors
from pymerge.ops.ties.overflow import count_non_finite, report_overflow
from pymerge.ops.ties.run import refuse_non_finite
from pymerge.rules.gram import check_per, flat_rule, matrix_of
from pymerge.rules.options import Counts
from pymerge.rules.ties import resolve_options
from pymerge.rules.types import Backend, NonFinite, Per


def gram(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    per: Per = "tensor",
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
) -> torch.Tensor:
    """The dot products of all pairs of models, or of their task vectors, in one read of the inputs.

    With delta_k = models[k] - base (the model itself without a base):

        gram[i, j] = sum_e delta_i[e] * delta_j[e]

    models: K tensors of one shape (float32, float16, bfloat16 or float64, each its own dtype).
    base: a tensor of the same shape, or None.
    per: "tensor" (over all elements), "row" (along the last dimension), "column" (along the first).
    non_finite: "error", or "allow": products with NaN or infinity then are NaN or infinite.
    backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns float64 on the models' device, without copying or stacking the inputs: (K, K);
    (rows, K, K) with per="row", a row for each index of all dimensions but the last; (columns, K,
    K) with per="column", a column for each index of all dimensions but the first. Products are
    exact for inputs other than float64 and added up in float64; on the CPU the bits do not depend
    on the number of threads (G2 to G4 of docs/spec/gram.md).

    Raises ValueError and TypeError for tensors that do not fit or have no values of their own, for
    other words, and for NaN or infinity; RuntimeError for a backend that is not available.
    """
    if registered.tracing():
        return registered.gram(models, base, per=per, non_finite=non_finite, backend=backend)
    check_list(models, base)
    check_tensors(models, base)
    check_per(per)
    resolve_options(len(models), non_finite=non_finite)
    products = gram_checked(models, base, per, backend)
    if non_finite == "error" and not products.isfinite().all():
        bad = count_bad(models, base)
        if any(bad):
            refuse_non_finite(Counts((), 0, bad), models[0].numel(), "")
    count = len(models)
    result = products.new_empty(len(products), count, count)
    rows, columns = torch.triu_indices(count, count, dtype=torch.int64, device=products.device)
    result[:, rows, columns] = products
    result[:, columns, rows] = products
    return result[0] if per == "tensor" else result


def combine(
    models: Sequence[torch.Tensor],
    coefficients: Sequence[float] | torch.Tensor,
    base: torch.Tensor | None = None,
    *,
    per: Per = "tensor",
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear combination of models, or of their task vectors, in one read of the inputs.

        out = base + sum_k c_k * (models[k] - base)

    and sum_k c_k * models[k] without a base; rounded once to the output's dtype (G5 of
    docs/spec/gram.md), to the same bits on every backend.

    models, base: as in `pymerge.gram`.
    coefficients: K numbers; with per="row" a tensor (rows, K), with per="column" (columns, K), in
        the order of the result of `pymerge.gram`.
    non_finite: "error" or "allow" (docs/spec/ties.md, N1 to N4).
    out: written and returned; contiguous, overlapping no input. By default a new tensor of the
        base's dtype, else the first model's.

    Raises as `pymerge.gram`.
    """
    if registered.tracing():
        options = {"per": per, "non_finite": non_finite, "backend": backend}
        return registered.combine(models, coefficients, base, out, **options)
    check_list(models, base)
    check_tensors(models, base)
    check_per(per)
    resolve_options(len(models), non_finite=non_finite)
    like = models[0] if base is None else base
    factors = _coefficients(coefficients, like, len(models), per)
    if out is None:
        out = new_result(like.shape, like.dtype, like.device)
        check_readable("the result", out)
    else:
        check_out(out, models, base)
    combine_checked(models, base, factors, per, out, backend)
    # Whatever is not finite in an input makes its element of the output so too.
    if non_finite == "error" and count_non_finite(out):
        bad = count_bad(models, base)
        if any(bad):
            refuse_non_finite(Counts((), 0, bad), out.numel(), "")
    counts = Counts((), 0, (0,) * len(models))
    report_overflow([("", out, counts)], non_finite, stacklevel=2)
    return out


def _coefficients(given: Any, like: torch.Tensor, count: int, per: str) -> torch.Tensor:
    """(groups, K) in float64. TypeError or ValueError for another shape and for what is not
    finite.
    """
    if isinstance(given, torch.Tensor):
        check_floats(argument("coefficients"), given, "combine")
        found = given.detach()
    else:
        try:
            found = torch.tensor([float(each) for each in given], dtype=torch.float64, device="cpu")
        except OverflowError:  # an integer beyond float64
            raise ValueError(
                f"{argument('coefficients')} has a number beyond float64; pass finite numbers"
            ) from None
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{argument('coefficients')} is {type_of(given)}; pass one number per model, or a"
                " tensor"
            ) from None
    rows, columns = matrix_of(tuple(like.shape), per)
    groups = columns if per == "column" else rows
    wanted = (count,) if per == "tensor" else (groups, count)
    if tuple(found.shape) != wanted:
        raise ValueError(
            f"{argument('coefficients')} has shape {tuple(found.shape)}; with"
            f" {argument('per', per)} it needs {wanted}"
        )
    if not found.isfinite().all():
        raise ValueError(f"{argument('coefficients')} has NaN or infinity; pass finite numbers")
    return found.double().reshape(groups if per != "tensor" else 1, count)


# Of checked tensors.


def gram_checked(
    models: Sequence[torch.Tensor], base: torch.Tensor | None, per: str, backend: str
) -> torch.Tensor:
    """(groups, pairs) products on the models' device."""
    _, function = registry.pick("gram", models[0].device.type, backend)
    products: torch.Tensor = function(
        models, base, matrix_of(tuple(models[0].shape), per), per == "column"
    )
    return products


def combine_checked(
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    coefficients: torch.Tensor,
    per: str,
    out: torch.Tensor,
    backend: str,
) -> None:
    """G5 into `out`. coefficients: (groups, K), float64. A whole tensor is left to `ties`, which
    has this combination among its loops; with NaN for a coefficient it cannot be.
    """
    matrix = matrix_of(tuple(out.shape), per)
    if per == "tensor" and bool(coefficients.isfinite().all()):
        _, function = registry.pick("ties", out.device.type, backend)
        function(models, base, flat_rule(coefficients[0].tolist(), out.numel()), out)
        return
    _, function = registry.pick("combine", out.device.type, backend)
    function(models, base, matrix, per == "column", coefficients, out)


def count_bad(models: Sequence[torch.Tensor], base: torch.Tensor | None) -> tuple[int, ...]:
    """The non-finite elements of each model and of the base, which is in every task vector."""
    in_base = 0 if base is None else count_non_finite(base)
    return tuple(count_non_finite(model) + in_base for model in models)
