"""The coefficients of slerp, nuslerp, multislerp, karcher and model_stock from the Gram matrices of
their inputs (docs/spec/gram.md, G6 to G10), in binary64.

Imports numpy and not torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.rules.gram import GramOptions

Floats = NDArray[np.float64]
# (coefficients (B, K), flags of the groups in which mergekit's numbers are not those of the mended
# rule)
_Found = tuple[Floats, "NDArray[np.bool_] | None"]

_PARALLEL = 0.9995  # cosines beyond are interpolated linearly (G6)
_NO_DIRECTION = 1e-5  # a mean of unit vectors below is rounding (G8)
_SINE = 1e-10  # squared sines below: no plane is spanned (G7, G9)


def full(products: Floats, count: int) -> Floats:
    """(B, K, K) Gram matrices from (B, pairs) products."""
    gram = np.empty((len(products), count, count))
    rows, columns = np.triu_indices(count)
    gram[:, rows, columns] = products
    gram[:, columns, rows] = products
    return gram


def coefficients(options: GramOptions, products: Floats) -> tuple[Floats, str]:
    """(B, K) coefficients for (B, pairs) products, and a remark where mergekit's numbers were
    followed against the mended rule; "" where they do not differ.
    """
    gram = full(products, options.count)
    values = dict(options.values)
    if options.count == 1:
        return np.ones((len(gram), 1)), ""
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN comes from NaN alone
        found, differs = _METHODS[options.method](gram, options.as_mergekit, **values)
    if differs is None or not differs.any():
        return found, ""
    return found, _REMARKS[options.method]


def _cosine(gram: Floats, least: float = 0.0) -> Floats:
    """Of the first two inputs; 0 where one of them is 0. least: a smaller norm counts as that."""
    norms = np.sqrt(gram[:, [0, 1], [0, 1]])
    divisor = np.maximum(norms, least).prod(axis=1)
    divisor = np.where(divisor == 0, 1, divisor)
    return np.clip(gram[:, 0, 1] / divisor, -1, 1)


def _on_sphere(cosine: Floats, linear: NDArray[np.bool_], t: float) -> Floats:
    """G6: the coefficients of spherical interpolation, or of a linear one."""
    angle = np.arccos(np.where(linear, 0, cosine))
    sine = np.sin(angle)
    spherical = np.stack([np.sin((1 - t) * angle) / sine, np.sin(t * angle) / sine], axis=1)
    return np.where(linear[:, None], np.array([1 - t, t]), spherical)


def _zero(gram: Floats) -> NDArray[np.bool_]:
    """Where one of two inputs has no direction."""
    zero: NDArray[np.bool_] = (gram[:, 0, 0] == 0) | (gram[:, 1, 1] == 0)
    return zero


def slerp(gram: Floats, as_mergekit: bool, *, t: float) -> _Found:
    """G6."""
    norms = np.sqrt(gram[:, [0, 1], [0, 1]])
    divisor = np.where(norms > 1e-8, norms, 1).prod(axis=1) if as_mergekit else None
    cosine = _cosine(gram) if divisor is None else np.clip(gram[:, 0, 1] / divisor, -1, 1)
    linear = np.abs(cosine) > _PARALLEL
    zero = _zero(gram) & (0 < t < 1)
    if as_mergekit:
        return _on_sphere(cosine, linear, t), zero & (norms.max(axis=1) > 0)
    return _on_sphere(cosine, linear | _zero(gram), t), None


def nuslerp(gram: Floats, as_mergekit: bool, *, weights: tuple[float, float]) -> _Found:
    """G7."""
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    cosine = _cosine(gram, 1e-7 if as_mergekit else 0.0)
    linear = 1 - cosine**2 <= _SINE
    opposite = cosine < -_PARALLEL
    if not as_mergekit:
        return _on_sphere(cosine, linear | _zero(gram) | opposite, t), None
    some = gram[:, [0, 1], [0, 1]].max(axis=1) > 0
    return _on_sphere(cosine, linear, t), (_zero(gram) & some) | (opposite & ~linear)


def multislerp(
    gram: Floats,
    as_mergekit: bool,
    *,
    weights: tuple[float, ...],
    normalize_weights: bool,
    eps: float,
) -> _Found:
    """G8."""
    w = np.array(weights)
    if normalize_weights:
        w = w / w.sum()
    norms = np.sqrt(np.einsum("bkk->bk", gram))
    units = 1 / (norms + eps)  # of x_k: what makes it the unit vector u_k
    directions = gram * units[:, :, None] * units[:, None, :]  # <u_j, u_k>
    along = directions @ w  # <u_k, sum_j w_j u_j>
    length = np.sqrt(np.maximum(along @ w, 0))
    flat = length < max(eps, _NO_DIRECTION * float(np.abs(w).sum()))
    mean = w / np.where(flat, 1, length)[:, None]  # of u_k
    dots = np.einsum("bjk,bk->bj", directions, mean)
    tangent = w - (dots @ w)[:, None] * mean  # sum_k w_k (u_k - dots_k mean)
    size = np.einsum("bj,bjk,bk->b", tangent, directions, tangent)
    size = np.sqrt(np.maximum(size, 0)) + eps
    on_sphere = mean * np.cos(size)[:, None] + tangent * (np.sin(size) / size)[:, None]
    spherical = on_sphere * (norms @ w)[:, None] * units
    return np.where(flat[:, None], w, spherical), None


def karcher(gram: Floats, as_mergekit: bool, *, max_iter: int, tol: float) -> _Found:
    """G9."""
    return np.stack([_karcher_of(each, max_iter, tol) for each in gram]), None


def _karcher_of(gram: Floats, max_iter: int, tol: float) -> Floats:
    count = len(gram)
    norms = np.sqrt(np.diag(gram))
    if not np.isfinite(norms).all():
        return np.full(count, np.nan)
    valid = norms > tol
    if not valid.any():
        return np.full(count, 1 / count)
    units = np.where(valid, 1 / np.where(valid, norms, 1), 0)
    directions = gram * units[:, None] * units[None, :]
    shares = valid / valid.sum()
    mean = shares.copy()  # coefficients of the unit vectors
    length = _length(mean, directions)
    mean = np.eye(count)[np.argmax(valid)] if length < tol else mean / length
    for _ in range(max_iter):
        dots = np.clip(directions @ mean, -1, 1)
        angles = np.arccos(dots)
        # A direction from the mean to its own antipode does not exist.
        counts = valid & (angles >= tol) & ((dots > 0) | (1 - dots**2 > _SINE))
        factors = np.where(counts, shares * angles / np.where(counts, np.sin(angles), 1), 0)
        tangent = factors - (factors @ dots) * mean
        size = _length(tangent, directions)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * tangent
        length = _length(mean, directions)
        if length > tol:
            mean = mean / length
    return np.asarray(norms.mean() * mean * units)


def _length(coefficients: Floats, directions: Floats) -> float:
    return math.sqrt(max(0.0, float(coefficients @ directions @ coefficients)))


def model_stock(gram: Floats, as_mergekit: bool) -> _Found:
    """G10."""
    count = gram.shape[1]
    norms = np.sqrt(np.einsum("bkk->bk", gram))
    first, second = np.triu_indices(count, 1)
    products = norms[:, first] * norms[:, second]
    least = np.maximum(products, 1e-6) if as_mergekit else np.where(products == 0, 1, products)
    cosine = np.clip(gram[:, first, second] / least, -1, 1).mean(axis=1)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6
    t = np.where(singular, 0, count * cosine / np.where(singular, 1, divisor))
    differs = None
    if as_mergekit:
        differs = (t < 0) | ((products > 0) & (products < 1e-6)).any(axis=1)
    else:
        t = np.where(np.isnan(t), t, np.clip(t, 0, 1))
    return np.repeat(t[:, None] / count, count, axis=1), differs


_METHODS: dict[str, Callable[..., Any]] = {
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
}

_REMARKS = {
    "slerp": (
        "between zero and another tensor, slerp scales by sin(t pi / 2) as mergekit does; flavor"
        " paper interpolates linearly"
    ),
    "nuslerp": (
        "of zero or nearly opposite tensors, nuslerp has mergekit's numbers; flavor paper"
        " interpolates linearly"
    ),
    "model_stock": (
        "of small or opposing differences, model_stock has mergekit's ratio t; flavor paper takes"
        " their true cosine, and t in [0, 1]"
    ),
}
