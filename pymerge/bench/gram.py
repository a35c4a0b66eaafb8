"""Rows of `gram` and `combine`, and of the methods that need nothing else, for `pymerge bench`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pymerge.backends import native
from pymerge.bench.cases import GATE_SIZE, Tensors
from pymerge.dtypes import name_of
from pymerge.engine import method_functions as methods
from pymerge.ops.gram.api import combine_checked, gram_checked
from pymerge.reference import gram as reference
from pymerge.rules.gram import matrix_of

# What `--merge` calls them, and what the products are of.
PER = {"gram": "tensor", "gram-rows": "row", "gram-columns": "column"}
_COLUMNS = 4096
Rows = Iterator[tuple[str, Callable[[], object], Callable[[], object], int]]


def matrix(tensors: Tensors, n: int | None = None) -> Tensors:
    """The leading elements as a matrix of 4096 columns."""
    n = tensors.n if n is None else n
    columns = min(n, _COLUMNS)
    rows = n // columns

    def shaped(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: rows * columns].view(rows, columns)

    return Tensors([*map(shaped, tensors.models)], shaped(tensors.base), shaped(tensors.out))


def gate(tensors: Tensors, backend: str, merge: str) -> None:
    """RuntimeError unless products agree with the reference's to G4 and combinations to the bit, on
    the leading million elements.
    """
    small, per = matrix(tensors, min(GATE_SIZE, tensors.n)), PER[merge]
    shape, by_column = matrix_of(tuple(small.base.shape), per), per == "column"
    got = gram_checked(small.models, small.base, per, backend)
    want = reference.gram(small.models, small.base, shape, by_column)
    size = want.abs().amax()
    factors = _factors(small, per)
    out = torch.zeros_like(small.out)
    combine_checked(small.models, small.base, factors, per, small.out, backend)
    reference.combine(small.models, small.base, shape, by_column, factors, out)
    if (got - want).abs().max() > 2.0**-40 * size or not torch.equal(out, small.out):
        raise RuntimeError(
            f"backend {backend!r} differs from the reference in {merge!r}; nothing is timed"
        )


def calls(tensors: Tensors, backend: str, merge: str, place: Any) -> Rows:
    """(op, call, what moves the same bytes and does nothing else, bytes) of each row. Products are
    one read; products and a combination two reads and one write.

    place: a `Place`. On a GPU the bytes are those of a copy, half of them read and half written.
    """
    whole, per = matrix(tensors), PER[merge]
    factors = _factors(whole, per)
    inputs = [*whole.models, whole.base]
    read = sum(tensor.nbytes for tensor in inputs)
    copies = place.copy(whole)

    def products() -> None:
        gram_checked(whole.models, whole.base, per, backend)

    def combination() -> None:
        combine_checked(whole.models, whole.base, factors, per, whole.out, backend)

    def both() -> None:
        products()
        combination()

    def looks() -> None:  # reads every element, and nothing else
        for tensor in inputs:
            buffer = tensor.data_ptr(), name_of(tensor.dtype)
            native.count_non_finite(buffer, tensor.numel(), torch.get_num_threads())

    def reads_and_copies() -> None:
        looks()
        copies()

    on_host = place.device.type == "cpu"
    reads = looks if on_host else place.copy_of(read)
    mix = reads_and_copies if on_host else place.copy_of(read + whole.bytes)
    yield "gram", products, reads, read
    yield "combine", combination, copies, whole.bytes
    yield "gram + combine", both, mix, read + whole.bytes


def _factors(tensors: Tensors, per: str) -> torch.Tensor:
    rows, columns = matrix_of(tuple(tensors.base.shape), per)
    g = torch.Generator().manual_seed(0)
    groups = columns if per == "column" else rows
    return torch.rand(groups, len(tensors.models), generator=g, dtype=torch.float64)


def peers() -> dict[str, tuple[Callable[[Tensors], object], Callable[[Tensors], object]]]:
    """Method -> (mergekit's own function, this package's), where mergekit is installed."""
    if importlib.util.find_spec("mergekit") is None:
        return {}
    ones = {"weight": 1.0}
    flags: dict[str, Any] = {"nuslerp_flatten": False, "nuslerp_row_wise": False}
    cases: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], object]]] = {
        "slerp": (
            "slerp",
            {"t": 0.3},
            lambda x: methods.slerp(x.models[:1], x.base, t=0.3, out=x.out),
        ),
        "nuslerp": (
            "nuslerp",
            {**ones, **flags, "nuslerp_flatten": True},
            lambda x: methods.nuslerp(x.models[:2], x.base, out=x.out),
        ),
        "nuslerp, rows": (
            "nuslerp",
            {**ones, **flags},
            lambda x: methods.nuslerp(x.models[:2], x.base, nuslerp_flatten=False, out=x.out),
        ),
        "multislerp": (
            "multislerp",
            {**ones, "normalize_weights": True, "eps": 1e-8},
            lambda x: methods.multislerp(x.models, x.base, out=x.out),
        ),
        "karcher": (
            "karcher",
            {"max_iter": 10, "tol": 1e-5},
            lambda x: methods.karcher(x.models, out=x.out),
        ),
        "model_stock": (
            "model_stock",
            {"filter_wise": False},
            lambda x: methods.model_stock(x.models, x.base, out=x.out),
        ),
        "model_stock, rows": (
            "model_stock",
            {"filter_wise": True},
            lambda x: methods.model_stock(x.models, x.base, filter_wise=True, out=x.out),
        ),
    }

    def pair(method: str, parameters: dict[str, Any], ours: Callable[[Tensors], object]) -> Any:
        used = {"slerp": 1, "nuslerp": 2}.get(method)
        return (
            lambda x: _mergekit(method, parameters, matrix(x.head(used or len(x.models)))),
            lambda x: ours(matrix(x)),
        )

    return {name: pair(*case) for name, case in cases.items()}


def _mergekit(method: str, parameters: dict[str, Any], tensors: Tensors) -> object:
    from mergekit.merge_methods import merge_tensors

    given = [*tensors.models] if method == "karcher" else [tensors.base, *tensors.models]
    base = None if method == "karcher" else 0
    return merge_tensors(given, method, parameters=parameters, base_index=base)
